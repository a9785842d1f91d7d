// One message as elements.

import { copyButton, icon, iconButton, render } from "/web/markdown.js";
import { contentOf } from "/web/store.js";

/** `actions`: edit() for questions, again() for answers. */
export function messageElement(message, actions) {
  const item = document.createElement("li");
  item.className = `message ${message.role}`;
  const who = document.createElement("span");
  who.className = "visually-hidden";
  who.textContent = message.role === "user" ? "You:" : "Persimmon:";
  const body = document.createElement("div");
  body.className = "body";
  item.append(who);
  if (message.files?.length) {
    const chips = document.createElement("div");
    chips.className = "chips";
    chips.append(...message.files.map((file) => chip(file)));
    item.append(chips);
  }
  const content = document.createElement("div");
  content.className = "content";
  if (message.role === "assistant" || message.text) item.append(content);
  showContent(item, message);
  if (message.problem) item.append(problem(message.problem));
  const note = message.stopped ? "Stopped." : message.cut ? "The answer reached its longest length." : "";
  if (note) item.append(line(note));
  const bar = document.createElement("div");
  bar.className = "actions";
  if (message.text) bar.append(copyButton(() => contentOf(message), "Copy"));
  if (actions.edit) bar.append(iconButton("edit", "Edit", actions.edit));
  if (actions.again) bar.append(iconButton("again", "Answer again", actions.again));
  item.append(bar);
  return item;
}

/** Fill in the text; before there is any, how far the prompt is read. */
export function showContent(item, message, progress = null) {
  const content = item.querySelector(".content");
  if (!content) return;
  if (message.role === "user") content.textContent = message.text;
  else if (!message.text && progress && progress.prompt_done < progress.prompt_tokens) content.replaceChildren(reading(progress));
  else content.replaceChildren(render(message.text));
}

function reading(progress) {
  const box = document.createElement("div");
  box.className = "reading";
  const bar = document.createElement("progress");
  bar.max = progress.prompt_tokens;
  bar.value = progress.prompt_done;
  bar.setAttribute("aria-label", "Reading the prompt");
  box.append(line(`Reading ${progress.prompt_done.toLocaleString("en")} of ${progress.prompt_tokens.toLocaleString("en")} tokens`), bar);
  return box;
}

function line(text) {
  const note = document.createElement("div");
  note.className = "note";
  note.textContent = text;
  return note;
}

function problem(text) {
  const box = document.createElement("div");
  box.className = "problem";
  box.setAttribute("role", "alert");
  const words = document.createElement("span");
  words.textContent = text.charAt(0).toUpperCase() + text.slice(1);
  const again = document.createElement("button");
  again.type = "button";
  again.className = "link";
  again.textContent = "Try again";
  again.addEventListener("click", () => again.dispatchEvent(new Event("retry", { bubbles: true })));
  box.append(words, again);
  return box;
}

/** A file's name and size; with `remove`, a button for it. */
export function chip(file, remove = null) {
  const box = document.createElement(remove ? "li" : "span");
  box.className = "chip";
  const name = document.createElement("span");
  name.textContent = `${file.name} · ${Math.max(1, Math.round(file.text.length / 1024)).toLocaleString("en")} KB`;
  box.append(name);
  if (remove) box.append(iconButton("close", `Remove ${file.name}`, remove));
  else box.prepend(icon("clip"));
  return box;
}
