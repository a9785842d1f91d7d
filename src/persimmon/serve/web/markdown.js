// Model output as elements. HTML in it is shown as text; what marked makes goes through DOMPurify, which keeps a short
// list of harmless elements, and enters the page as nodes, never as a string.

import DOMPurify from "/web/vendor/dompurify.js";
import { Marked } from "/web/vendor/marked.js";

const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => text.replace(/[&<>"']/g, (character) => ESCAPES[character]);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ text, href }) => escape(`[image: ${text || href}]`),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const ALLOWED_TAGS = [
  "p", "br", "strong", "em", "del", "code", "pre", "ul", "ol", "li", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6",
  "a", "hr", "table", "thead", "tbody", "tr", "th", "td",
];

const OPTIONS = {
  ALLOWED_TAGS,
  ALLOWED_ATTR: ["href", "class", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

/** Longer texts are shown plain: no person reads them, and nothing should hang. */
const LONGEST = 200_000;

export function render(text) {
  if (text.length > LONGEST) return document.createTextNode(text);
  const fragment = DOMPurify.sanitize(marked.parse(text), OPTIONS);
  for (const link of fragment.querySelectorAll("a")) secure(link);
  for (const pre of fragment.querySelectorAll("pre")) pre.replaceWith(codeBlock(pre));
  return fragment;
}

function secure(link) {
  if (!link.hasAttribute("href")) return link.replaceWith(...link.childNodes);
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
}

function codeBlock(pre) {
  const code = pre.querySelector("code");
  const language = /^language-([\w+#.-]{1,30})$/.exec(code?.className ?? "")?.[1] ?? "";
  if (code) code.removeAttribute("class");
  const block = document.createElement("div");
  block.className = "code";
  const bar = document.createElement("div");
  bar.className = "bar fine";
  const name = document.createElement("span");
  name.textContent = language;
  bar.append(name, copyButton(() => pre.textContent, "Copy code"));
  block.append(bar, pre.cloneNode(true));
  return block;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, action) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "icon";
  button.title = label;
  button.setAttribute("aria-label", label);
  button.append(icon(name));
  button.addEventListener("click", action);
  return button;
}

export function copyButton(text, label) {
  const button = iconButton("copy", label, async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      return;
    }
    button.replaceChildren(icon("check"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}
