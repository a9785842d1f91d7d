// Conversations and settings, kept in this browser. A full or forbidden store is no failure: the page works on.

const CONVERSATIONS = "persimmon.conversations";
const SETTINGS = "persimmon.settings";
const CURRENT = "persimmon.current";

export const DEFAULTS = {
  system: "",
  temperature: 0.7,
  top_p: 0.95,
  top_k: 0,
  repetition_penalty: 1.1,
  max_tokens: null,
  seed: null,
  theme: "light dark",
};

function read(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? fallback;
  } catch {
    return fallback;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function stored() {
  const found = read(CONVERSATIONS, []);
  return Array.isArray(found) ? found.filter((c) => Array.isArray(c?.messages)) : [];
}

/** An answer that was being written when the page went away is one that was stopped. */
function afterReload(conversation) {
  const messages = conversation.messages.filter((m) => !m.partial || m.text);
  return { ...conversation, messages: messages.map(({ partial, ...m }) => (partial ? { ...m, stopped: true } : m)) };
}

export class Store {
  constructor() {
    this.conversations = stored().map(afterReload);
    this.settings = { ...DEFAULTS, ...read(SETTINGS, {}) };
    this.unsaved = new Set(); // conversations that say something here which is not stored yet
    this.answering = null; // the one that an answer is being written to
  }

  /** Save a conversation; false when the browser has no room. What other tabs saved meanwhile is kept. */
  save(conversation) {
    conversation.changed = Date.now();
    this.unsaved.add(conversation);
    return this.write();
  }

  saveSettings() {
    return write(SETTINGS, this.settings);
  }

  /** Another tab has saved something. */
  sync() {
    this.merge();
    Object.assign(this.settings, DEFAULTS, read(SETTINGS, {}));
  }

  write(removed = null) {
    this.merge(removed);
    const done = write(CONVERSATIONS, this.conversations.filter((c) => c.messages.length));
    if (done) this.unsaved.clear();
    return done;
  }

  /** Of every conversation the newer state; what is stored no more was deleted in another tab. */
  merge(removed = null) {
    const others = new Map(stored().map((c) => [c.id, c]));
    if (removed) others.delete(removed.id);
    const kept = this.conversations.filter((c) => {
      const other = others.get(c.id);
      others.delete(c.id);
      const own = this.unsaved.has(c) || c === this.answering || !c.messages.length;
      if (other && !own && (other.changed ?? 0) > (c.changed ?? 0)) Object.assign(c, other);
      return c !== removed && (other || own);
    });
    this.conversations = [...kept, ...others.values()].sort((a, b) => b.created - a.created);
  }

  create() {
    const empty = this.conversations.find((c) => !c.messages.length);
    if (empty) return empty;
    const conversation = { id: crypto.randomUUID?.() ?? String(Date.now()), created: Date.now(), messages: [] };
    this.conversations.unshift(conversation);
    return conversation;
  }

  /** The conversation that this tab showed last. */
  current() {
    const id = sessionStorage.getItem(CURRENT);
    return this.conversations.find((c) => c.id === id);
  }

  remember(conversation) {
    sessionStorage.setItem(CURRENT, conversation.id);
  }

  remove(conversation) {
    this.unsaved.delete(conversation);
    this.write(conversation);
  }
}

export function title(conversation) {
  const first = conversation.messages.find((m) => m.role === "user");
  const text = first ? first.text.trim() || first.files?.[0]?.name || "" : "";
  return text.split("\n")[0].slice(0, 80) || "New conversation";
}

/** What the model is shown of a message: its files as the terminal chat shows them, then its text. */
export function contentOf(message) {
  return [...(message.files ?? []).map(fenced), message.text].filter(Boolean).join("\n\n");
}

/** The name, and the text between fences longer than any run of backticks in it. */
function fenced(file) {
  const runs = file.text.match(/`{3,}/g) ?? [];
  const fence = "`".repeat(Math.max(2, ...runs.map((run) => run.length)) + 1);
  return `${file.name}:\n${fence}\n${file.text.trimEnd()}\n${fence}`;
}

export function asMarkdown(conversation) {
  const parts = conversation.messages.map((m) => `**${m.role === "user" ? "You" : "Persimmon"}**\n\n${contentOf(m)}\n`);
  return `# ${title(conversation)}\n\n${parts.join("\n")}`;
}

export function asJson(conversation) {
  const messages = conversation.messages.map((m) => ({ role: m.role, content: contentOf(m) }));
  return JSON.stringify({ title: title(conversation), created: new Date(conversation.created).toISOString(), messages }, null, 2);
}
