// The page: one conversation at a time, streamed answers, files as context.

import * as api from "/web/api.js";
import { addFiles, watchDrops } from "/web/files.js";
import { asJson, asMarkdown, contentOf, DEFAULTS, Store, title } from "/web/store.js";
import { chip, messageElement, showContent } from "/web/view.js";
import { icon, iconButton } from "/web/markdown.js";

const $ = (id) => document.getElementById(id);
const SUGGESTIONS = ["Tell me a short story about a fox", "Explain what a stack is", "Write a Python function that reverses a list"];
const SECONDS_BETWEEN_RENDERS = 0.06;
const SECONDS_BETWEEN_SAVES = 3;

const store = new Store();
let conversation = store.current() ?? store.create();
let files = []; // attached to the message being written: {name, text}
let editing = null; // index of the message being edited
let running = null; // AbortController of the answer being written
let limit = 0;
let leaving = false; // the page goes away: a broken stream is no fault of the server

// -- Showing ---------------------------------------------------------------------------------------------------

function showAll() {
  store.remember(conversation);
  $("title").textContent = title(conversation);
  document.title = conversation.messages.length ? `${title(conversation)} · Persimmon` : "Persimmon";
  $("welcome").hidden = conversation.messages.length > 0;
  $("export").disabled = !conversation.messages.length;
  $("messages").replaceChildren(...conversation.messages.map((m, i) => messageElement(m, actions(m, i))));
  showConversations();
  showFiles();
  updateGauge();
}

function actions(message, index) {
  if (running) return {};
  const last = index === conversation.messages.length - 1;
  if (message.role === "user") return { edit: () => startEdit(index) };
  return { again: last ? () => regenerate(index) : null };
}

function showConversations() {
  const items = store.conversations.filter((c) => c.messages.length || c === conversation).map((c) => {
    const item = document.createElement("li");
    item.classList.toggle("current", c === conversation);
    const open = document.createElement("button");
    open.className = "open";
    open.textContent = title(c);
    if (c === conversation) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => select(c));
    item.append(open);
    if (c.messages.length) item.append(iconButton("trash", `Delete “${title(c)}”`, () => remove(c)));
    return item;
  });
  $("conversations").replaceChildren(...items);
}

function showFiles() {
  $("files").replaceChildren(
    ...files.map((file) => chip(file, () => {
      files = files.filter((f) => f !== file);
      showFiles();
      updateGauge();
    })),
  );
}

function showSendButton() {
  $("send").replaceChildren(icon(running ? "stop" : "send"));
  $("send").setAttribute("aria-label", running ? "Stop" : "Send");
  $("send").disabled = !running && !$("prompt").value.trim() && !files.length;
}

function say(text) {
  $("status").textContent = text;
}

// -- Conversations ---------------------------------------------------------------------------------------------

function select(chosen) {
  running?.abort();
  running = null;
  conversation = chosen;
  endEdit();
  toggleSidebar(false);
  $("speed").textContent = "";
  showAll();
  $("scroll").scrollTop = $("scroll").scrollHeight;
  $("prompt").focus();
}

function remove(chosen) {
  if (!confirm(`Delete “${title(chosen)}”?`)) return;
  store.remove(chosen);
  if (chosen === conversation) select(store.conversations[0] ?? store.create());
  else showConversations();
}

/** Another tab has saved: show what is new, and leave alone what is being written here. */
function syncTabs() {
  const before = JSON.stringify(conversation);
  store.sync();
  applyTheme();
  if (!store.conversations.includes(conversation)) select(store.conversations[0] ?? store.create());
  else if (!running && JSON.stringify(conversation) !== before) showAll();
  else showConversations();
}

function toggleSidebar(shown) {
  $("sidebar").classList.toggle("shown", shown);
  $("veil").hidden = !shown;
  $("menu").setAttribute("aria-expanded", String(shown));
}

// -- Writing and answering -------------------------------------------------------------------------------------

function startEdit(index) {
  const message = conversation.messages[index];
  editing = index;
  files = [...(message.files ?? [])];
  $("prompt").value = message.text;
  $("editing").hidden = false;
  fitPrompt();
  showFiles();
  $("prompt").focus();
}

function endEdit() {
  editing = null;
  files = [];
  $("prompt").value = "";
  $("editing").hidden = true;
  fitPrompt();
  showFiles();
}

function send() {
  const text = $("prompt").value.trim();
  if (running || (!text && !files.length)) return;
  if (editing !== null) conversation.messages.length = editing;
  conversation.messages.push({ role: "user", text, files });
  endEdit();
  answer();
}

function regenerate(index) {
  conversation.messages.length = index;
  answer();
}

function shownMessages(messages) {
  const system = store.settings.system.trim();
  const head = system ? [{ role: "system", content: system }] : [];
  return [...head, ...messages.map((m) => ({ role: m.role, content: contentOf(m) }))];
}

function sampling() {
  const { temperature, top_p, top_k, repetition_penalty, max_tokens, seed } = store.settings;
  const chosen = { temperature, top_p, top_k, repetition_penalty };
  if (max_tokens !== null) chosen.max_tokens = max_tokens;
  if (seed !== null) chosen.seed = seed;
  return chosen;
}

async function answer() {
  const here = conversation;
  const asked = shownMessages(here.messages);
  const message = { role: "assistant", text: "", partial: true };
  here.messages.push(message);
  store.answering = here;
  store.save(here);
  const mine = (running = new AbortController());
  showAll();
  const element = $("messages").lastElementChild;
  element.classList.add("streaming");
  element.setAttribute("aria-busy", "true");
  showSendButton();
  scrollDown(true);
  say("Answering");
  try {
    await follow(api.stream(asked, sampling(), mine.signal), here, message, element);
  } catch (error) {
    if (leaving || error.name === "AbortError") message.stopped = true;
    else message.problem = error instanceof api.ApiError ? error.message : `Something went wrong: ${error.message}`;
  }
  delete message.partial;
  if (running === mine) running = null;
  if (!message.text && !message.problem && message.stopped) here.messages = here.messages.filter((m) => m !== message);
  const stored = store.save(here);
  if (store.answering === here && !running) store.answering = null;
  if (here === conversation) {
    showAll();
    showSendButton();
    scrollDown();
  }
  say(message.problem ?? (stored ? "Answer complete" : "This browser has no room to keep the conversation."));
}

/** Put the parts of a stream into a message and onto the page. */
async function follow(parts, here, message, element) {
  let rendered = 0;
  let saved = performance.now() / 1000;
  for await (const part of parts) {
    if (part.text) {
      message.text += part.text;
      const now = performance.now() / 1000;
      // Rendering takes longer the longer the text: leave the page as much time as it took.
      if (now - rendered > Math.max(SECONDS_BETWEEN_RENDERS, message.text.length / 50_000)) {
        showContent(element, message);
        rendered = now;
        scrollDown();
      }
      if (now - saved > SECONDS_BETWEEN_SAVES) {
        store.save(here);
        saved = now;
      }
    }
    if (part.progress) showProgress(part.progress, message, element);
    if (part.usage) showGauge(part.usage.total_tokens, limit);
    if (part.finished === "length") message.cut = true;
  }
}

function showProgress(progress, message, element) {
  if (!message.text) showContent(element, message, progress);
  const speed = progress.tokens_per_second ? `${progress.tokens_per_second.toFixed(1)} tokens/s` : "";
  const zeros = progress.zeros !== null ? `${(100 * progress.zeros).toFixed(0)} % zeros` : "";
  $("speed").textContent = [speed, zeros].filter(Boolean).join(" · ");
}

function scrollDown(always = false) {
  const area = $("scroll");
  if (always || area.scrollHeight - area.scrollTop - area.clientHeight < 140) area.scrollTop = area.scrollHeight;
}

// -- The context gauge -----------------------------------------------------------------------------------------

let counting = null;
let countSoon = 0;

function updateGauge() {
  clearTimeout(countSoon);
  countSoon = setTimeout(count, 250);
}

async function count() {
  counting?.abort();
  counting = new AbortController();
  const draft = { role: "user", text: $("prompt").value, files };
  const messages = conversation.messages.slice(0, editing ?? undefined);
  if (running) return;
  const whole = messages.at(-1)?.role === "user" ? messages : [...messages, draft];
  try {
    const { used, limit: most } = await api.countTokens(shownMessages(whole), counting.signal);
    showGauge(used, most);
  } catch {
    // The gauge is a convenience; the answer itself will say what is wrong.
  }
}

function showGauge(used, most) {
  limit = most || limit;
  if (!limit) return;
  $("gauge").value = used / limit;
  $("gauge-text").textContent = `${used.toLocaleString("en")} of ${limit.toLocaleString("en")} tokens`;
}

function fitPrompt() {
  const area = $("prompt");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
  showSendButton();
}

// -- Settings and export ---------------------------------------------------------------------------------------

function fillSettings() {
  for (const field of $("settings").querySelectorAll("[name]")) field.value = store.settings[field.name] ?? "";
}

function readSettings() {
  for (const field of $("settings").querySelectorAll("[name]")) {
    if (field.type !== "number") store.settings[field.name] = field.value;
    else if (field.value === "" && DEFAULTS[field.name] === null) store.settings[field.name] = null;
    else if (field.value !== "" && field.validity.valid) store.settings[field.name] = Number(field.value);
  }
  applyTheme();
  store.saveSettings();
  updateGauge();
}

function applyTheme() {
  document.documentElement.style.colorScheme = store.settings.theme;
}

function download(kind) {
  const [text, type] = kind === "md" ? [asMarkdown(conversation), "text/markdown"] : [asJson(conversation), "application/json"];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = `${title(conversation).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 50) || "conversation"}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// -- Wiring ----------------------------------------------------------------------------------------------------

async function attach(list) {
  const { added, refused } = await addFiles(list);
  files = [...files, ...added];
  showFiles();
  showSendButton();
  updateGauge();
  if (refused.length) alert(`Not attached:\n${refused.join("\n")}`);
  say(added.length ? `Attached ${added.map((f) => f.name).join(", ")}` : "");
}

function wire() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else send();
  });
  $("prompt").addEventListener("input", () => {
    fitPrompt();
    updateGauge();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (running) running.abort();
    else if (editing !== null) endEdit();
    else toggleSidebar(false);
  });
  $("new").addEventListener("click", () => select(store.create()));
  $("menu").addEventListener("click", () => toggleSidebar(!$("sidebar").classList.contains("shown")));
  $("veil").addEventListener("click", () => toggleSidebar(false));
  $("cancel-edit").addEventListener("click", endEdit);
  $("attach").addEventListener("click", () => $("file-input").click());
  $("file-input").addEventListener("change", () => {
    attach([...$("file-input").files]);
    $("file-input").value = "";
  });
  watchDrops($("drop"), attach);
  $("open-settings").addEventListener("click", () => {
    fillSettings();
    $("settings").showModal();
  });
  $("settings").addEventListener("close", readSettings);
  $("reset-settings").addEventListener("click", () => {
    Object.assign(store.settings, DEFAULTS);
    fillSettings();
  });
  $("export").addEventListener("click", () => {
    $("export-dialog").returnValue = "";
    $("export-dialog").showModal();
  });
  $("export-dialog").addEventListener("close", () => $("export-dialog").returnValue && download($("export-dialog").returnValue));
  addEventListener("storage", syncTabs);
  addEventListener("pagehide", () => {
    leaving = true;
    if (store.answering) store.save(store.answering);
  });
  // A reload may break the stream before pagehide; one that is called off leaves the page as it was.
  addEventListener("beforeunload", () => {
    leaving = true;
    setTimeout(() => (leaving = false), 5000);
  });
  addEventListener("pageshow", () => (leaving = false));
  $("messages").addEventListener("retry", () => regenerate(conversation.messages.length - 1));
}

function suggest() {
  $("suggestions").replaceChildren(
    ...SUGGESTIONS.map((text) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => {
        $("prompt").value = text;
        send();
      });
      return button;
    }),
  );
}

async function start() {
  applyTheme();
  wire();
  suggest();
  showAll();
  fitPrompt();
  $("prompt").focus();
  try {
    const served = await api.model();
    $("model").textContent = served.id;
    limit = served.max_model_len;
  } catch {
    $("model").textContent = "offline";
  }
}

start();
