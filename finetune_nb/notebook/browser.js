// The trajectory browser's page side, in one ES module without imports or a build step. It begins with mount.js.
//
// Texts come from models, tools and datasets: they go in as text nodes only, never as markup. The kernel is asked by custom
// messages; what it sends are plain records with binary columns.

// ── data ────────────────────────────────────────────────────────────────────────────────────────────────────────────

export const ROW_HEIGHT = 52;
export const FAILED = 1;
export const CUT = 2;
const FOLD_CHARACTERS = 1500; // a text that was not sampled and is longer than this is folded

/** A typed array from a DataView of a message. A copy, because the view need not be aligned. */
export function column(Type, view) {
  return new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

/** Texts in one UTF-8 blob, decoded one by one. */
export function texts(blob, offsets) {
  const bytes = new Uint8Array(blob.buffer, blob.byteOffset, blob.byteLength);
  const starts = offsets.byteLength ? column(Uint32Array, offsets) : new Uint32Array(1);
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return {
    length: starts.length - 1,
    at: (i) => decoder.decode(bytes.subarray(starts[i], starts[i + 1])),
  };
}

/** The index of an epoch; see `packed` in analysis/browse_index.py for the columns. */
export function readIndex(about, b) {
  const starts = column(Uint32Array, b[0]);
  return {
    ...about,
    starts,
    groups: starts.length - 1,
    rollouts: starts[starts.length - 1],
    signals: column(Uint8Array, b[1]),
    examples: texts(b[2], b[3]),
    means: column(Float32Array, b[4]),
    spreads: column(Float32Array, b[5]),
    before: column(Float32Array, b[6]),
    rewards: column(Float32Array, b[7]),
    advantages: column(Float32Array, b[8]),
    tokens: column(Uint32Array, b[9]),
    turns: column(Uint16Array, b[10]),
    flags: column(Uint8Array, b[11]),
    generations: column(Int32Array, b[12]),
    rows: column(Uint32Array, b[13]),
  };
}

/** One rollout; see `RolloutBody` in analysis/rollout_body.py for the columns. */
export function readBody(about, b) {
  const entropies = column(Float32Array, b[5]);
  const starts = b[6].byteLength ? column(Uint32Array, b[6]) : null;
  const others = texts(b[7], b[8]);
  const otherLogprobs = column(Float32Array, b[9]);
  return {
    ...about,
    texts: texts(b[0], b[1]),
    tokens: texts(b[2], b[3]),
    logprobs: column(Float32Array, b[4]),
    entropies: entropies.length ? entropies : null,
    alternatives(token) {
      if (!starts) return [];
      const found = [];
      for (let i = starts[token]; i < starts[token + 1]; i++) found.push([others.at(i), otherLogprobs[i]]);
      return found;
    },
    bytes: b.reduce((sum, each) => sum + each.byteLength, 0),
  };
}

/** Keeps what was used last, up to so many bytes. */
export class Cache {
  constructor(most) {
    this.most = most;
    this.size = 0;
    this.entries = new Map();
  }
  get(key) {
    const entry = this.entries.get(key);
    if (!entry) return undefined;
    this.entries.delete(key);
    this.entries.set(key, entry);
    return entry.value;
  }
  put(key, value, size) {
    this.size -= this.entries.get(key)?.size ?? 0;
    this.entries.delete(key);
    this.entries.set(key, { value, size });
    this.size += size;
    for (const [old, entry] of this.entries) {
      if (this.size <= this.most || this.entries.size === 1) break;
      this.entries.delete(old);
      this.size -= entry.size;
    }
  }
}

/** Places of tokens, least likely first; those without a logprob are left out. */
export function leastLikely(logprobs) {
  const places = [];
  for (let i = 0; i < logprobs.length; i++) if (!Number.isNaN(logprobs[i])) places.push(i);
  return Uint32Array.from(places).sort((a, b) => logprobs[a] - logprobs[b] || a - b);
}

/** How many characters of a reply are its thinking. 0: none, or nothing comes after it, so that folding would hide it all. */
export function thinkingLength(text) {
  const found = /^\s*(?:<think(?:ing)?>)?[\s\S]*?<\/think(?:ing)?>\s*/.exec(text);
  return found && found[0].length < text.length ? found[0].length : 0;
}

/** Where two rollouts part: the first turn that differs, and in it the first token and character. null: nowhere. */
export function parting(a, b) {
  const essence = (body, i) => JSON.stringify([body.turns[i].role, body.texts.at(i), body.turns[i].calls]);
  const shared = Math.min(a.turns.length, b.turns.length);
  for (let turn = 0; turn < shared; turn++) {
    if (essence(a, turn) === essence(b, turn)) continue;
    const [one, other] = [a.turns[turn], b.turns[turn]];
    let token = 0;
    while (
      one.start + token < one.stop &&
      other.start + token < other.stop &&
      a.tokens.at(one.start + token) === b.tokens.at(other.start + token)
    ) token++;
    return { turn, token };
  }
  return a.turns.length === b.turns.length ? null : { turn: shared, token: 0 };
}

/** Places of tokens, the most changed first. */
export function mostChanged(changes) {
  const places = [];
  for (let i = 0; i < changes.length; i++) if (!Number.isNaN(changes[i])) places.push(i);
  return Uint32Array.from(places).sort((a, b) => Math.abs(changes[b]) - Math.abs(changes[a]) || a - b);
}

/** Whether two bodies are of one rollout, which was scored or recorded meanwhile: what was said is the same. */
export function sameConversation(a, b) {
  if (a.turns.length !== b.turns.length || a.logprobs.length !== b.logprobs.length) return false;
  return a.turns.every((turn, i) => turn.stop === b.turns[i].stop && a.texts.at(i) === b.texts.at(i));
}

// ── text and elements ───────────────────────────────────────────────────────────────────────────────────────────────

// Characters that are unseen, or that reorder or hide their neighbours; as text.plain in Python.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\u{e0000}-\u{e0fff}]/gu;

/** A text with unseen characters made visible: control characters as pictures, the others as [U+202E]. */
export function visible(text) {
  return text.replace(/\r\n/g, "\n").replace(UNSEEN, (character) => {
    const code = character.codePointAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return code === 0x7f ? "␡" : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
  });
}

/** A number to three significant digits; "–" where it is missing. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

const signed = (value) => (value > 0 ? `+${number(value)}` : number(value));
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const words = (name) => name.replaceAll("_", " ");

/** JSON on several lines; any other text as it is. */
export function pretty(text) {
  if (!/^\s*[[{]/.test(text)) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** An element. `text` is put in as text. */
function make(tag, { text, kind, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined && text !== null) element.textContent = visible(String(text));
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function drawn(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A button. One whose text has no word is named by its hint. */
function button(text, hint, press) {
  const element = make("button", { text, type: "button", "aria-label": /\p{L}{2}/u.test(text) ? null : hint, title: hint });
  element.addEventListener("click", press);
  return element;
}

/** A select of [value, words] pairs. */
function choice(label, options, change) {
  const element = make("select", { "aria-label": label, title: label });
  for (const [value, text] of options) element.append(make("option", { text, value }));
  element.addEventListener("change", () => change(element.value));
  return element;
}

const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));

// ── the kernel ──────────────────────────────────────────────────────────────────────────────────────────────────────

const SLOW = 1500; // milliseconds until a person is told that the kernel has not answered
const LOST = 10_000; // ... and, if it has answered nothing else meanwhile, until what is shown is greyed out
const UNANSWERED = "the kernel has not answered yet: it is busy, or gone";

/** Asks the kernel. Several views of a model hear each other's answers, so ids are unique over views. */
class Kernel {
  constructor(model, onState) {
    this.model = model;
    this.onState = onState; // "ready", "slow" (no answer yet), "lost" (none for long, or none possible)
    this.waiting = new Map();
    this.later = new Map(); // id of a question that is answered later -> what takes the answer
    this.overdue = 0; // messages that a person was told of
    this.lastHeard = performance.now();
    this.next = Math.floor(Math.random() * 2 ** 40);
    this.onEvent = () => {};
    this.gone = false;
    this.hear = (content, buffers) => this.heard(content, buffers);
    model.on("msg:custom", this.hear);
  }

  ask(op, args = {}) {
    if (this.gone) return Promise.reject(new Error("there is no kernel behind this any more"));
    const id = ++this.next;
    return new Promise((done, fail) => {
      const waiting = { done, fail, overdue: false };
      const slow = setTimeout(() => {
        waiting.overdue = true;
        this.overdue++;
        this.onState("slow");
      }, SLOW);
      const lost = setTimeout(() => performance.now() - this.lastHeard >= LOST && this.onState("lost"), LOST);
      this.waiting.set(id, Object.assign(waiting, { timers: [slow, lost] }));
      this.model.send({ id, op, ...args });
    });
  }

  /** Asks for something that takes longer than an answer may: the kernel takes note of it, and tells of it when it is done. */
  async askLong(op, args = {}) {
    const id = this.next + 1;
    let told;
    const done = new Promise((resolve) => { told = resolve; });
    this.later.set(id, told);
    try {
      await this.ask(op, args);
      const [content, buffers] = await done;
      if (content.problem) throw new Error(content.problem);
      return [content, buffers];
    } finally {
      this.later.delete(id);
    }
  }

  heard(content, buffers) {
    if (content.event === "change") return this.later.get(content.of)?.([content, buffers]);
    if (content.event) return this.onEvent(content);
    const waiting = this.waiting.get(content.id);
    if (!waiting) return;
    this.lastHeard = performance.now();
    waiting.timers.forEach(clearTimeout);
    this.waiting.delete(content.id);
    if (waiting.overdue) this.overdue--;
    this.onState(this.overdue ? "slow" : "ready");
    if (content.problem) waiting.fail(new Error(content.problem));
    else waiting.done([content, buffers]);
  }

  lose() {
    this.gone = true;
    for (const { timers, fail } of this.waiting.values()) {
      timers.forEach(clearTimeout);
      fail(new Error("the kernel is gone"));
    }
    this.waiting.clear();
    for (const told of this.later.values()) told([{ problem: "the kernel is gone" }, []]);
    this.overdue = 0;
    this.onState("lost");
  }

  close() {
    this.gone = true;
    for (const { timers } of this.waiting.values()) timers.forEach(clearTimeout);
    this.waiting.clear();
    this.model.off("msg:custom", this.hear);
  }
}

// ── the list of groups ──────────────────────────────────────────────────────────────────────────────────────────────

/** A virtual list: only the rows in sight are elements. */
class GroupList {
  constructor(view) {
    this.view = view;
    this.rows = make("div", { kind: "rows", role: "presentation" });
    this.element = make("div", { kind: "list", role: "listbox", tabindex: "0", "aria-label": "examples" }, this.rows);
    this.pool = new Map();
    this.histories = new Map();
    this.element.addEventListener("scroll", () => this.paint(), { passive: true });
  }

  /** Everything anew: another epoch, filter or order. */
  reset() {
    this.rows.replaceChildren();
    this.pool.clear();
    this.rows.style.height = `${this.view.order.length * ROW_HEIGHT}px`;
    this.paint();
  }

  paint() {
    const { order, position } = this.view;
    const height = this.element.clientHeight || 600;
    const first = Math.max(0, Math.floor(this.element.scrollTop / ROW_HEIGHT) - 4);
    const last = Math.min(order.length, Math.ceil((this.element.scrollTop + height) / ROW_HEIGHT) + 4);
    for (const [place, row] of this.pool) {
      if (place < first || place >= last) {
        row.remove();
        this.pool.delete(place);
      }
    }
    const wanted = [];
    for (let place = first; place < last; place++) {
      let row = this.pool.get(place);
      if (!row) {
        row = this.row(order[place], place);
        this.pool.set(place, row);
        this.rows.append(row);
      }
      row.setAttribute("aria-selected", String(place === position));
      if (!this.histories.has(order[place])) wanted.push(order[place]);
    }
    const active = this.pool.get(position);
    if (active) this.element.setAttribute("aria-activedescendant", active.id);
    else this.element.removeAttribute("aria-activedescendant");
    if (wanted.length) this.fetchHistories(wanted);
  }

  row(group, place) {
    const { index, matched, signals } = this.view;
    const example = visible(index.examples.at(group));
    const { name: kind, meaning } = signals[index.signals[group]];
    const [start, stop] = [index.starts[group], index.starts[group + 1]];
    let failed = 0;
    let scored = 0;
    for (let i = start; i < stop; i++) {
      failed += index.flags[i] & FAILED ? 1 : 0;
      scored += Number.isNaN(index.rewards[i]) ? 0 : 1;
    }
    const unfinished = index.version !== null;
    const signal = unfinished && !scored ? this.view.unfinished : words(kind);
    const said = unfinished ? `${this.view.unfinished}: ${scored ? "" : "no rollout is scored yet, and "}others may come` : meaning;
    const row = make("div", {
      kind: unfinished ? "row unfinished" : "row", role: "option", id: `${this.view.prefix}-${place}`, "aria-setsize": this.view.order.length,
      "aria-posinset": place + 1,
      title: `${example}\n${said}`,
    });
    row.style.top = `${place * ROW_HEIGHT}px`;
    const change = index.means[group] - index.before[group];
    const facts = make("span", { kind: "facts", text: number(index.means[group]), title: "mean reward" });
    if (!Number.isNaN(change) && Math.abs(change) > 1e-6) {
      facts.append(make("span", { kind: change > 0 ? "up" : "down", text: ` ${change > 0 ? "▲" : "▼"}${number(Math.abs(change))}` }));
    }
    const history = make("span", { kind: "history", "aria-hidden": "true" });
    row.append(
      make("div", { kind: "line" }, make("span", { kind: "id", text: example }),
        make("span", { kind: "unseen", text: `, ${plural(stop - start, "rollout")}${failed ? `, ${failed} failed` : ""}, mean ` }), facts),
      make("div", { kind: "line" }, this.strip(group, matched), history),
      make("div", { kind: "line" }, make("span", { kind: `signal ${unfinished ? "" : kind}`, text: signal }), this.tagsOf(group), make("span", { kind: "facts", text: `spread ${number(index.spreads[group])}` })),
    );
    row.history = history;
    this.drawHistory(row, group);
    row.addEventListener("click", () => this.view.openPlace(place));
    return row;
  }

  /** The labels of a group and of its rollouts. */
  tagsOf(group) {
    const tags = this.view.tagsByGroup.get(group) ?? [];
    const text = tags.map(visible).join(", ");
    return make("span", { kind: "tags", text: text && `⚑ ${text}`, title: text && `labels: ${text}` });
  }

  retag() {
    for (const [place, row] of this.pool) {
      const fresh = this.tagsOf(this.view.order[place]);
      row.querySelector(".tags").replaceWith(fresh);
    }
  }

  /** A dot a rollout, placed by its reward; equal ones are stacked. Failed and missing ones have a lane of their own. */
  strip(group, matched) {
    const { index } = this.view;
    const [low, high] = this.view.range;
    const strip = make("span", { kind: "strip", "aria-hidden": "true" });
    const heights = new Map();
    let lane = 0;
    for (let i = index.starts[group]; i < index.starts[group + 1]; i++) {
      const reward = index.rewards[i];
      const kind = index.flags[i] & FAILED ? "failed" : Number.isNaN(reward) ? "missing" : "dot";
      const dot = make("i", { kind: matched[i] ? kind : `${kind} other`, text: kind === "failed" ? "×" : null });
      if (kind === "dot") {
        const share = clamp((reward - low) / (high - low), 0, 1);
        const column = Math.round(share * 24);
        const height = heights.get(column) ?? 0;
        heights.set(column, height + 1);
        dot.style.left = `${28 + share * 66}%`;
        dot.style.bottom = `${1 + (height % 3) * 5}px`;
        dot.style.marginLeft = `${-3 + Math.floor(height / 3) * 3}px`;
      } else {
        dot.style.left = `${1 + (lane % 4) * 6}%`;
        dot.style.bottom = `${1 + Math.floor(lane / 4) * 7}px`;
        lane++;
      }
      strip.append(dot);
    }
    return strip;
  }

  async fetchHistories(groups) {
    const { index } = this.view;
    if (this.view.epochs.length < 2) return;
    for (const group of groups) this.histories.set(group, null);
    let found;
    try {
      [found] = await this.view.kernel.ask("history", { epoch: index.epoch, groups });
    } catch {
      return;
    }
    if (this.view.index !== index) return;
    found.groups.forEach((group, i) => this.histories.set(group, found.means[i]));
    for (const [place, row] of this.pool) this.drawHistory(row, this.view.order[place]);
  }

  drawHistory(row, group) {
    const means = this.histories.get(group);
    if (!means || row.history.childNodes.length || means.filter((mean) => mean !== null).length < 2) return;
    row.history.append(sparkline(means, this.view.range, 60, 16));
  }

  /** Everything anew, with the row of the open group where it was. */
  renew(before, now) {
    this.rows.style.height = `${this.view.order.length * ROW_HEIGHT}px`;
    this.element.scrollTop += (now - before) * ROW_HEIGHT;
    this.reset();
  }

  /** Scrolls so that the row is in sight. */
  reveal(place) {
    const top = place * ROW_HEIGHT;
    const height = this.element.clientHeight || 600;
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    else if (top + ROW_HEIGHT > this.element.scrollTop + height) this.element.scrollTop = top + ROW_HEIGHT - height;
  }
}

/** A line through values; null leaves it out. */
function sparkline(values, [low, high], width, height) {
  const points = [];
  values.forEach((value, i) => {
    if (value === null) return;
    const x = 2 + (i / Math.max(1, values.length - 1)) * (width - 4);
    const y = height - 2 - clamp((value - low) / (high - low), 0, 1) * (height - 4);
    points.push([x.toFixed(1), y.toFixed(1)]);
  });
  const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  if (points.length > 1) {
    svg.append(drawn("polyline", { points: points.join(" "), fill: "none", stroke: "currentColor", "stroke-width": 1.5 }));
  }
  const end = points.at(-1);
  if (end) svg.append(drawn("circle", { cx: end[0], cy: end[1], r: 2, fill: "currentColor" }));
  return svg;
}

// ── the conversation ────────────────────────────────────────────────────────────────────────────────────────────────

/** The name after that one in a list of [name, words], from the start again after the last one. */
const after = (list, name) => list[(list.findIndex(([each]) => each === name) + 1) % list.length][0];
export const TINTS = [["probability", "tint: probability"], ["entropy", "tint: entropy"], ["advantage", "tint: advantage"], ["change", "tint: change"], ["none", "no tint"]];
const ORANGE = "217,95,2", GREEN = "27,127,59", RED = "192,57,43", BLUE = "0,119,204";
const MUCH = 0.7; // nats beyond which a change is marked by a line as well

const ROLES = new Set(["assistant", "tool", "function"]); // that look different

/** One rollout as a conversation. Turns are laid out by the browser when they come near; tokens are made then, too. */
class Reader {
  constructor(view, label) {
    this.view = view;
    this.head = make("div", { kind: "head" });
    this.turns = make("div", { kind: "turns" });
    this.notes = make("div", { kind: "note", hidden: "" });
    this.element = make("div", { kind: "reader", tabindex: "0", role: "region", "aria-label": label }, this.head, this.notes, this.turns);
    this.element.addEventListener("scroll", () => this.scrolled(), { passive: true });
    this.turns.addEventListener("click", (event) => {
      const token = event.target.token;
      if (token !== undefined) view.focusToken(this, token);
    });
    this.sections = [];
    this.turn = 0;
    this.token = -1;
  }

  /** Shows a rollout. at: {epoch, index, rollout}. */
  show(body, at) {
    Object.assign(this, { body, at, turn: 0, token: -1, rank: -1, unlikely: null, shared: undefined, marked: null, changes: null });
    this.note("");
    this.turns.replaceChildren();
    this.sections = body.turns.map((turn, i) => this.section(turn, i));
    this.paintHead();
    this.element.scrollTop = 0;
    this.ends = [make("div", {}), make("div", {})];
    this.turns.append(this.ends[0]);
    if (!body.turns.length) this.turns.append(make("p", { kind: "dim", text: "no message was recorded" }));
    this.turns.append(...this.sections, this.ends[1]);
    this.paintEnds();
    this.fill();
  }

  /** Before the turns its error, after them its output. */
  paintEnds() {
    const { body, ends: [before, after] } = this;
    before.replaceChildren();
    after.replaceChildren();
    if (body.error && !this.unscored) before.append(make("div", { kind: "error" }, make("strong", { text: "error " }), make("pre", { text: body.error })));
    if (body.output) after.append(make("div", { kind: "turn" }, make("strong", { text: "output " }), make("pre", { text: pretty(body.output) })));
  }

  /** Whether it has finished in an epoch that has not, and waits for its reward. */
  get unscored() {
    const { index, rollout } = this.at;
    return index.version !== null && Number.isNaN(index.rewards[rollout]) && !(index.flags[rollout] & FAILED);
  }

  /** The same rollout from a newer record of its epoch: what a person looks at stays where it is. */
  renew(body, at) {
    const focused = this.head.contains(this.view.host.shadowRoot.activeElement);
    body.changes ??= this.body.changes;
    Object.assign(this, { body, at });
    this.paintHead();
    this.paintEnds();
    this.retint();
    if (focused) this.head.querySelector(".switch [aria-pressed=true]")?.focus();
    [...(this.bars?.children ?? [])].forEach((bar, i) => bar.classList.toggle("here", i === this.turn));
  }

  /** What is said of the tint above the turns; "": nothing. */
  note(text) {
    this.notes.textContent = visible(text);
    this.notes.hidden = !text;
  }

  clear(text) {
    this.body = this.at = this.wanted = this.changes = null;
    this.note("");
    this.sections = [];
    this.head.replaceChildren();
    this.turns.replaceChildren(make("p", { kind: "dim", text }));
  }

  paintHead() {
    const { index, rollout } = this.at;
    const group = groupOf(index, rollout);
    const switcher = make("div", { kind: "switch", role: "group", "aria-label": "generations" });
    for (let i = index.starts[group]; i < index.starts[group + 1]; i++) {
      const reward = index.flags[i] & FAILED ? "×" : Number.isNaN(index.rewards[i]) ? "○" : number(index.rewards[i]);
      const chosen = i === rollout;
      const element = button(`${generationText(index, i)}: ${reward}`, `generation ${generationText(index, i)}: ${reward}`, () => this.view.openRollout(this, i));
      element.setAttribute("aria-pressed", String(chosen));
      element.tabIndex = chosen ? 0 : -1;
      switcher.append(element);
    }
    const facts = [];
    if (this.unscored) facts.push(["not scored yet", ""]);
    else if (!(index.flags[rollout] & FAILED)) facts.push(["reward", number(index.rewards[rollout])], ["advantage", signed(index.advantages[rollout])]);
    else facts.push(["failed", ""]);
    for (const [name, value] of Object.entries(this.body.scores ?? {})) if (name !== "reward") facts.push([name, typeof value === "number" ? number(value) : value ?? "–"]);
    facts.push(["tokens", this.body.logprobs.length.toLocaleString("en")], ["turns", this.body.turns.length.toLocaleString("en")]);
    if (index.flags[rollout] & CUT) facts.push(["cut at the token limit", ""]);
    const line = make("div", { kind: "what" }, make("strong", { kind: "id", text: index.examples.at(group), title: visible(index.examples.at(group)) }));
    if (this.view.readers.length > 1) line.append(this.epochChoice(group));
    else line.append(make("span", { kind: "dim", text: `epoch ${index.epoch}${index.version === null ? "" : `, ${this.view.unfinished}`}` }));
    const measures = make("div", { kind: "measures" });
    for (const [name, value] of facts) measures.append(make("span", {}, make("span", { kind: "dim", text: `${name} ` }), make("b", { text: value })));
    this.head.replaceChildren(line, switcher, measures, this.minimap());
  }

  /** In compare mode each side can be of another epoch. */
  epochChoice() {
    const element = choice("epoch of this rollout", this.view.epochs.map(([epoch]) => [epoch, `epoch ${epoch}`]), (value) => this.view.openEpochIn(this, Number(value)));
    element.value = String(this.at.index.epoch);
    return element;
  }

  /** A bar a turn: its height says how many tokens it has, its colour how unlikely they are. */
  minimap() {
    const { turns, logprobs } = this.body;
    const map = make("div", { kind: "minimap", "aria-hidden": "true" });
    const most = Math.max(1, ...turns.map((turn) => turn.stop - turn.start));
    turns.forEach((turn, i) => {
      const count = turn.stop - turn.start;
      let surprise = 0;
      for (let token = turn.start; token < turn.stop; token++) surprise -= logprobs[token] || 0;
      const bar = make("i", { title: `turn ${i + 1}, ${turn.role}${count ? `, ${plural(count, "token")}` : ""}` });
      bar.style.height = `${3 + Math.round(23 * (count / most))}px`;
      if (count) bar.style.background = `rgba(${ORANGE},${(0.2 + Math.min(0.8, surprise / count / 1.5)).toFixed(2)})`;
      bar.addEventListener("click", () => this.turnTo(i));
      map.append(bar);
    });
    this.bars = map;
    return map;
  }

  section(turn, i) {
    const count = turn.stop - turn.start;
    const notes = [];
    if (count) notes.push(plural(count, "token"));
    else if (turn.sampled === false) notes.push("not sampled by the policy");
    if (turn.seconds !== null) notes.push(`${number(turn.seconds)} s`);
    if (turn.finish === "length") notes.push("cut at the token limit");
    else if (turn.finish && turn.finish !== "stop") notes.push(turn.finish);
    const name = turn.name ? ` · ${turn.name}` : "";
    const title = make("button", { type: "button", "aria-expanded": "true", kind: "title", tabindex: "-1" },
      make("span", { kind: "turn-number", text: i + 1 }), make("strong", { text: `${turn.role}${name}` }), make("span", { kind: "dim", text: notes.join(" · ") }));
    const body = make("div", { kind: "body" });
    const section = make("div", { kind: `turn ${ROLES.has(turn.role) ? turn.role : ""}`, role: "group", "aria-label": `turn ${i + 1}, ${turn.role}` }, title, body);
    const before = this.body.turns[i - 1];
    if (before && before.conversation !== turn.conversation) section.prepend(make("div", { kind: "dim", text: "— a new conversation —" }));
    title.addEventListener("click", () => this.fold(section));
    section.bodyElement = body;
    section.titleElement = title;
    section.turn = turn;
    section.place = i;
    // So that the page scrolls rightly before the turn has been laid out.
    const lines = Math.ceil((count * 4.2 + (count ? 0 : Math.min(FOLD_CHARACTERS, this.body.texts.at(i).length))) / 60);
    section.style.containIntrinsicSize = `auto ${60 + 20 * lines}px`;
    return section;
  }

  fold(section, folded = !section.bodyElement.hidden) {
    section.bodyElement.hidden = folded;
    section.titleElement.setAttribute("aria-expanded", String(!folded));
    if (!folded) this.fillSection(section);
  }

  foldAll() {
    const folded = !this.sections.every((section) => section.bodyElement.hidden);
    for (const section of this.sections) this.fold(section, folded);
    this.fill();
  }

  /** Makes what the turns in sight, and those within a screen of it, consist of. Places are read first, as each one that is
   * read after a change makes the page lay everything out again. */
  fill() {
    const top = this.element.scrollTop, height = this.element.clientHeight || 700;
    const near = [];
    for (const section of this.sections) {
      if (section.filled || section.bodyElement.hidden) continue;
      if (section.offsetTop > top + 2 * height) break;
      if (section.offsetTop + section.offsetHeight > top - height) near.push(section);
    }
    for (const section of near) this.fillSection(section);
    if (near.length) requestAnimationFrame(() => this.fill()); // where they are smaller than was thought
  }

  fillSection(section) {
    if (section.filled || section.bodyElement.hidden) return;
    section.filled = true;
    const { turn, place } = section;
    const body = section.bodyElement;
    const text = this.body.texts.at(place);
    const sampled = turn.stop > turn.start;
    if (turn.thought) body.append(this.folded(`thinking, ${plural(turn.thought.length, "character")}`, () => [this.plain(turn.thought, false)]));
    if (turn.shown !== "tokens") body.append(...this.written(turn, text));
    if (sampled && turn.shown === "tokens") body.append(...this.sampled(turn));
    if (sampled && turn.shown === "both") body.append(this.folded("as it was sampled", () => this.sampled(turn)));
    for (const call of turn.calls) {
      body.append(make("div", { kind: "call" }, make("span", { kind: "dim", text: "→ calls " }), make("strong", { text: call.name ?? "?" }), make("pre", { text: pretty(call.arguments) })));
    }
    if (!body.childNodes.length) body.append(make("span", { kind: "dim", text: "(empty)" }));
    this.dim(section);
  }

  /** A text that was not sampled: thinking folded, and long ones shown by their beginning. */
  written(turn, text) {
    if (!text) return [];
    const thinking = turn.role === "assistant" ? thinkingLength(text) : 0;
    const parts = [];
    if (thinking) parts.push(this.folded(`thinking, ${plural(thinking, "character")}`, () => [this.plain(text.slice(0, thinking), false)]));
    parts.push(this.plain(text.slice(thinking), turn.role !== "assistant"));
    return parts;
  }

  plain(text, mayFold) {
    const shown = pretty(text);
    const box = make("pre", { dir: "auto" });
    if (!mayFold || shown.length <= FOLD_CHARACTERS) {
      box.append(this.withHits(shown));
      return box;
    }
    const beginning = shown.slice(0, FOLD_CHARACTERS / 2);
    box.append(this.withHits(beginning));
    const more = button(`show all ${plural(shown.length, "character")}`, "show all of it", () => {
      box.replaceChildren(this.withHits(shown));
      more.remove();
    });
    more.className = "more";
    return make("div", {}, box, more);
  }

  /** The text, with what was searched for marked. */
  withHits(text) {
    const wanted = this.view.filter.text?.toLowerCase();
    const holder = document.createDocumentFragment();
    if (!wanted) {
      holder.append(visible(text));
      return holder;
    }
    const lower = text.toLowerCase();
    let from = 0;
    for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
      holder.append(visible(text.slice(from, at)), make("mark", { text: text.slice(at, at + wanted.length) }));
      from = at + wanted.length;
    }
    holder.append(visible(text.slice(from)));
    return holder;
  }

  sampled(turn) {
    let text = "";
    const ends = [];
    for (let token = turn.start; token < turn.stop; token++) ends.push((text += this.body.tokens.at(token)).length);
    const thinking = thinkingLength(text);
    const split = turn.start + (thinking ? ends.findIndex((end) => end >= thinking) + 1 : 0);
    const parts = [];
    if (split > turn.start && split < turn.stop) {
      parts.push(this.folded(`thinking, ${plural(split - turn.start, "token")}`, () => [this.spans(turn.start, split)]));
      parts.push(this.spans(split, turn.stop));
    } else parts.push(this.spans(turn.start, turn.stop));
    return parts;
  }

  spans(start, stop) {
    const box = make("pre", { kind: "tokens", dir: "auto" });
    const advantage = this.at.index.advantages[this.at.rollout];
    for (let token = start; token < stop; token++) {
      const span = document.createElement("span");
      let text = visible(this.body.tokens.at(token));
      if (text && !text.trim()) text = text.replaceAll("\n", "↵\n"); // otherwise its colour would have no width
      span.textContent = text;
      span.token = token;
      this.tint(span, advantage);
      box.append(span);
    }
    return box;
  }

  tint(span, advantage) {
    const logprob = this.body.logprobs[span.token];
    let colour = "";
    const { tint } = this.view;
    if (tint === "probability") colour = shade(ORANGE, -logprob / 4.5);
    else if (tint === "entropy") colour = shade(ORANGE, (this.body.entropies?.[span.token] ?? 0) / 3);
    else if (tint === "advantage") colour = shade(advantage < 0 ? RED : GREEN, Math.abs(advantage) / 4);
    const change = tint === "change" ? this.changes?.[span.token] ?? 0 : 0;
    if (change) colour = shade(change < 0 ? ORANGE : BLUE, Math.abs(change) / 3);
    span.style.background = colour;
    span.classList.toggle("unlikely", tint === "change" ? change < -MUCH : logprob < Math.log(0.1));
    span.classList.toggle("likelier", change > MUCH);
  }

  /** What the tokens have changed by; null: it is not known. */
  setChanges(changes) {
    Object.assign(this, { changes, rank: -1, unlikely: null });
    this.retint();
  }

  retint() {
    const advantage = this.at?.index.advantages[this.at.rollout];
    for (const span of this.turns.querySelectorAll("pre.tokens span")) this.tint(span, advantage);
  }

  folded(title, content) {
    const inner = make("div", { hidden: "" });
    const toggle = make("button", { type: "button", kind: "more", "aria-expanded": "false", text: `▸ ${title}` });
    toggle.addEventListener("click", () => {
      if (!inner.childNodes.length) inner.append(...content());
      inner.hidden = !inner.hidden;
      toggle.setAttribute("aria-expanded", String(!inner.hidden));
      toggle.textContent = visible(`${inner.hidden ? "▸" : "▾"} ${title}`);
    });
    const box = make("div", { kind: "folded" }, toggle, inner);
    box.open = () => inner.hidden && toggle.click();
    return box;
  }

  // ── moving in it ──

  scrolled() {
    this.fill();
    const top = this.element.scrollTop + this.head.offsetHeight + 8;
    let place = 0;
    for (const section of this.sections) if (section.offsetTop <= top) place = section.place;
    this.turn = place;
    [...(this.bars?.children ?? [])].forEach((bar, i) => bar.classList.toggle("here", i === place));
    this.view.scrolledIn(this);
  }

  turnTo(place, quiet = false) {
    if (!this.sections.length) return;
    this.turn = clamp(place, 0, this.sections.length - 1);
    const section = this.sections[this.turn];
    this.fillSection(section);
    this.element.scrollTop = section.offsetTop - this.head.offsetHeight;
    if (!quiet) this.view.say(`turn ${this.turn + 1} of ${this.sections.length}`);
  }

  /** The element of a token, made and unfolded if need be. */
  elementOf(token) {
    const section = this.sections.find(({ turn }) => token >= turn.start && token < turn.stop);
    if (!section) return null;
    this.fold(section, false);
    const find = () => [...section.bodyElement.querySelectorAll("pre.tokens span")].find((span) => span.token === token);
    let span = find();
    if (!span || span.closest("[hidden]")) {
      for (const box of section.bodyElement.querySelectorAll(".folded")) box.open();
      span = find();
    }
    return span;
  }

  focus(token, scroll = true) {
    this.marked?.classList.remove("at");
    this.token = token;
    this.marked = this.elementOf(token);
    this.marked?.classList.add("at");
    if (scroll) this.marked?.scrollIntoView({ block: "center" });
  }

  /** The next less likely token, or the one before: from the least likely on. */
  nextUnlikely(step) {
    const changed = this.view.tint === "change" && this.changes;
    const logprobs = this.view.sort === "call" ? this.inCalls() : this.body.logprobs;
    this.unlikely ??= changed ? mostChanged(this.changes) : leastLikely(logprobs);
    const count = this.unlikely.length;
    if (!count) return this.view.say("no token of this rollout was sampled by the policy");
    this.rank = this.rank < 0 ? (step > 0 ? 0 : count - 1) : (this.rank + step + count) % count;
    this.view.focusToken(this, this.unlikely[this.rank], true);
    this.view.say(`${changed ? "changed" : "unlikely"} token ${this.rank + 1} of ${count}`);
  }

  /** The logprobs of what calls a tool. */
  inCalls() {
    const found = new Float32Array(this.body.logprobs.length).fill(NaN);
    for (const { calls, start, stop } of this.body.turns) if (calls.length) found.set(this.body.logprobs.subarray(start, stop), start);
    return found;
  }

  // ── beside another one ──

  /** Dims what both say, and marks where they part. where: of `parting`; undefined: nothing is compared. */
  share(where) {
    this.shared = where;
    for (const section of this.sections) this.dim(section);
  }

  dim(section) {
    const where = this.shared;
    if (where === undefined && !section.compared) return;
    section.compared = where !== undefined;
    section.classList.toggle("shared", where === null || (where !== undefined && section.place < where?.turn));
    for (const span of section.bodyElement.querySelectorAll("span.parts, span.same")) span.classList.remove("parts", "same");
    section.classList.toggle("parts", Boolean(where) && section.place === where.turn);
    if (!where || section.place !== where.turn) return;
    for (const span of section.bodyElement.querySelectorAll("pre.tokens span")) {
      const place = span.token - section.turn.start;
      span.classList.toggle("same", place < where.token);
      span.classList.toggle("parts", place === where.token);
    }
  }
}

const shade = (colour, amount) => (amount > 0.02 ? `rgba(${colour},${Math.min(0.62, amount).toFixed(2)})` : "");

export function groupOf(index, rollout) {
  let [low, high] = [0, index.groups - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (index.starts[middle] <= rollout) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** The group of an example, or null. */
function findExample(index, example) {
  for (let group = 0; group < index.groups; group++) if (index.examples.at(group) === example) return group;
  return null;
}

/** The rollout of a group with that generation, or null. */
function findGeneration(index, group, generation) {
  for (let i = index.starts[group]; i < index.starts[group + 1]; i++) if (index.generations[i] === generation) return i;
  return null;
}

function generationText(index, rollout) {
  const generation = index.generations[rollout];
  return generation >= 0 ? String(generation) : `#${-1 - generation}`;
}

// ── the epochs ──────────────────────────────────────────────────────────────────────────────────────────────────────

/** A slider on the curve of mean rewards. */
class Scrubber {
  constructor(view) {
    this.view = view;
    this.element = make("div", { kind: "scrubber", role: "slider", tabindex: "0", "aria-label": "epoch", "aria-orientation": "horizontal" });
    this.element.addEventListener("pointerdown", (event) => this.pick(event));
    this.element.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      view.stepEpoch(step);
    });
  }

  paint() {
    const { epochs, index, hitsByEpoch } = this.view;
    const place = this.view.placeOfEpoch(index?.epoch);
    const current = epochs[place];
    const [width, height] = [220, 30];
    const known = epochs.map(([, mean]) => mean).filter((mean) => mean !== null);
    const [low, high] = [Math.min(0, ...known), Math.max(1, ...known)];
    const x = (i) => 6 + (i / Math.max(1, epochs.length - 1)) * (width - 12);
    const y = (mean) => height - 4 - ((mean - low) / (high - low)) * (height - 8);
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
    const points = epochs.map(([, mean], i) => (mean === null ? null : `${x(i).toFixed(1)},${y(mean).toFixed(1)}`)).filter(Boolean);
    svg.append(drawn("polyline", { points: points.join(" "), fill: "none", stroke: "currentColor", "stroke-width": 1.5 }));
    const most = Math.max(1, ...hitsByEpoch.values());
    epochs.forEach(([epoch], i) => {
      const hits = hitsByEpoch.get(epoch);
      if (hits) svg.append(drawn("rect", { x: x(i) - 1.5, y: height - 2 - 10 * (hits / most), width: 3, height: 2 + 10 * (hits / most), class: "hits" }));
    });
    if (current) {
      svg.append(drawn("line", { x1: x(place), x2: x(place), y1: 0, y2: height, class: "here" }));
      if (current[1] !== null) svg.append(drawn("circle", { cx: x(place), cy: y(current[1]), r: 4, class: "here" }));
    }
    const unfinished = current && current[4] !== null ? this.view.unfinished : "";
    const ended = epochs.filter(([, , , , version]) => version === null).length;
    const told = unfinished ? `${unfinished}, ${plural(current[2] + current[3], "rollout")} so far` : current ? `mean ${number(current[1])}` : "";
    const labels = this.view.labels.epoch === current?.[0] ? this.view.labels.labels.filter(([level]) => level === "epoch").map(([, , tag]) => visible(tag)) : [];
    const said = current ? `epoch ${current[0]}, ${unfinished ? told : `mean reward ${number(current[1])}`}${labels.length ? `, labelled ${labels.join(", ")}` : ""}` : "no epoch yet";
    this.element.replaceChildren(svg, make("span", { kind: "said", text: current ? `epoch ${current[0]}` : "no epoch yet" }),
      make("span", { kind: "dim", text: current ? `${unfinished ? "" : ` of ${ended}`} · ${told}${labels.length ? ` · ⚑ ${labels.join(", ")}` : ""}` : "" }));
    this.element.title = said;
    for (const [name, value] of [["valuemin", epochs[0]?.[0] ?? 0], ["valuemax", epochs.at(-1)?.[0] ?? 0], ["valuenow", current?.[0] ?? 0], ["valuetext", said]]) {
      this.element.setAttribute(`aria-${name}`, value);
    }
  }

  pick(event) {
    const { epochs } = this.view;
    const box = this.element.querySelector("svg").getBoundingClientRect();
    const share = (event.clientX - box.left - 6) / (box.width - 12);
    const place = clamp(Math.round(share * (epochs.length - 1)), 0, epochs.length - 1);
    if (epochs[place]) this.view.openEpoch(epochs[place][0]);
  }
}

// ── one token, one rollout ──────────────────────────────────────────────────────────────────────────────────────────

/** What is known of the token under focus and of the rollout. */
class Inspector {
  constructor(view) {
    this.view = view;
    this.token = make("div", { kind: "token" });
    this.rollout = make("div", {});
    this.labels = make("div", { kind: "labels" });
    this.element = make("div", { kind: "inspector", role: "region", "aria-label": "token, scores and labels", tabindex: "0" }, this.token, this.rollout, this.labels);
  }

  paintToken() {
    const { body, token } = this.view.reader;
    if (!body || token < 0) {
      const count = body?.logprobs.length ?? 0;
      this.token.replaceChildren(make("h4", { text: "token" }), make("p", { kind: "dim", text: count ? "Press . for the least likely one, or click one." : "No token of this rollout was sampled by the policy." }));
      return;
    }
    const logprob = body.logprobs[token];
    const rows = [["probability", number(Math.exp(Math.min(0, logprob)))], ["logprob", number(logprob)]];
    const entropy = body.entropies?.[token];
    if (entropy !== undefined && !Number.isNaN(entropy)) rows.push(["entropy", `${number(entropy)} nats`]);
    const change = this.view.reader.changes?.[token];
    if (change !== undefined && !Number.isNaN(change)) {
      rows.push(["change", `${signed(change)} nats`], [`probability after epoch ${this.view.reader.weights}`, number(Math.exp(Math.min(0, logprob + change)))]);
    }
    if (body.version) rows.push(["policy version", body.version]);
    rows.push(["position", `${token + 1} of ${body.logprobs.length}`]);
    const alternatives = body.alternatives(token);
    this.token.replaceChildren(make("h4", { text: "token" }), make("pre", { kind: "which", text: JSON.stringify(body.tokens.at(token)) }), facts(rows));
    if (alternatives.length) {
      const table = make("table", {}, make("caption", { text: "instead" }));
      for (const [text, value] of [[body.tokens.at(token), logprob, true], ...alternatives]) {
        const probability = Math.exp(Math.min(0, value));
        const bar = make("i", { kind: "bar" });
        bar.style.width = `${Math.round(60 * probability)}px`;
        table.append(make("tr", {}, make("th", { scope: "row", text: JSON.stringify(text) }), make("td", {}, bar, make("span", { text: ` ${number(probability)}` }))));
      }
      this.token.append(table);
    }
  }

  paintRollout() {
    const { body } = this.view.reader;
    this.rollout.replaceChildren();
    if (!body) return;
    const { index, rollout } = this.view.reader.at;
    const signal = this.view.signals[index.signals[groupOf(index, rollout)]];
    const said = this.view.reader.unscored
      ? [this.view.unfinished, ": the rollouts of this epoch are scored when all of them are in"]
      : [words(signal.name), `: ${signal.meaning}${signal.advice ? `; ${signal.advice}` : ""}${index.inferred ? " (concluded)" : ""}`];
    this.rollout.append(make("h4", { text: "group" }), make("p", {}, make("strong", { text: said[0] }), make("span", { text: said[1] })));
    const names = new Set([...Object.keys(body.scores ?? {}), ...Object.keys(body.words ?? {})]);
    if (names.size) this.rollout.append(make("h4", { text: "scores" }));
    for (const name of names) {
      const score = body.scores?.[name];
      this.rollout.append(make("div", {}, make("span", { kind: "dim", text: `${name} ` }), make("b", { text: score === undefined ? "" : typeof score === "number" ? number(score) : score ?? "–" })));
      if (body.words?.[name]) this.rollout.append(make("blockquote", { text: body.words[name], dir: "auto" }));
    }
    const raw = make("div", { kind: "raw" });
    raw.append(button("raw JSON", "show the record as JSON", async () => {
      const text = await this.view.rawText();
      if (text === null) return;
      const cut = text.length > 200_000 ? `${text.slice(0, 200_000)}\n… ${plural(text.length - 200_000, "character")} more; y copies all of it` : text;
      raw.replaceChildren(make("h4", { text: "raw JSON" }), make("pre", { text: cut }));
    }));
    this.rollout.append(raw);
  }
}

/** A small table of names and values. */
function facts(rows) {
  const table = make("table", {});
  for (const [name, value] of rows) table.append(make("tr", {}, make("th", { scope: "row", text: name }), make("td", { text: value })));
  return table;
}

/** The labels of the rollout that is open, of its group and of its epoch, and a form that adds one. */
class Labels {
  constructor(view) {
    this.view = view;
    this.known = make("ul", { "aria-label": "labels" });
    this.level = choice("what is labelled", [["rollout", "this rollout"], ["group", "its group"], ["epoch", "the epoch"]], () => {});
    this.suggestions = make("datalist", { id: `${view.prefix}-tags` });
    this.tag = make("input", { type: "text", "aria-label": "label", placeholder: "label, such as hacked", list: `${view.prefix}-tags`, maxlength: "80" });
    this.score = make("input", { type: "number", step: "any", "aria-label": "score", placeholder: "score" });
    this.note = make("textarea", { rows: "2", "aria-label": "note", placeholder: "note" });
    const form = make("form", { kind: "live" }, this.tag, this.suggestions, make("div", { kind: "line" }, this.score, this.level), this.note, make("button", { type: "submit", text: "add label", title: "add the label (Enter)" }));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.add();
    });
    this.element = make("div", { kind: "labels" }, make("h4", { text: "labels" }), this.known, form);
  }

  async add() {
    const tag = this.tag.value.trim();
    if (!tag) return this.view.say("a label needs a name");
    const score = this.score.value === "" ? null : Number(this.score.value);
    const label = { tag, score, note: this.note.value, level: this.level.value };
    const done = await this.view.changeLabel(label);
    if (!done) return;
    this.last = label;
    for (const field of [this.tag, this.score, this.note]) field.value = "";
    this.view.root.focus();
  }

  /** What was labelled last is said of what is open now, too. */
  again() {
    if (this.last) this.view.changeLabel(this.last);
    else this.view.say("nothing was labelled here yet: press x");
  }

  paint() {
    const { labels, reader } = this.view;
    this.known.replaceChildren();
    this.suggestions.replaceChildren(...(labels.tags ?? []).map((tag) => make("option", { value: visible(tag) })));
    if (!reader.at) return;
    const { index, rollout } = reader.at;
    if (labels.epoch !== index.epoch) return;
    const group = groupOf(index, rollout);
    const found = labels.labels.filter(([level, place]) => level === "epoch" || (level === "group" ? place === group : place === rollout));
    for (const [level, , tag, score, note, author, time] of found) {
      const when = new Date(time * 1000).toLocaleString();
      const said = [level === "rollout" ? "" : `of the ${level}`, score === null ? "" : number(score), author].filter(Boolean).join(", ");
      const item = make("li", {}, make("b", { text: tag }), make("span", { kind: "dim", text: ` ${said}`, title: when }));
      const remove = button("×", `remove the label ${visible(tag)}`, () => this.view.changeLabel({ tag, level, author, remove: true }));
      remove.className = "live";
      item.append(remove);
      if (note) item.append(make("blockquote", { text: note, dir: "auto" }));
      this.known.append(item);
    }
  }
}

// ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────

const KEYS = [
  ["j k", "next, previous example"], ["h l", "previous, next generation"], ["[ ]", "previous, next epoch"], ["{ }", "first, newest epoch"], ["s S", "next, previous order of the list"], ["n p", "next, previous turn"],
  [". ,", "next, previous unlikely token"], ["c", "compare with the other end of the group; again: end it"], ["C", "keep this rollout on the right, and go on reading on the left"],
  ["d", "to where the two part"], ["/", "search"], ["f", "filter"], ["e E", "fold this turn, all turns"], ["t", "next tint; with the tint change, . and , go by the most changed token"], ["x", "label"], ["X", "the same label again"],
  ["y", "copy the record as JSON"], ["Y", "copy the line of Python that shows this"], ["g G", "first, last example"], ["?", "these keys"], ["Esc", "leave: the keys are JupyterLab's again"],
];
const EVERY = 1500; // milliseconds between two questions for news
let views = 0;

class BrowserView {
  constructor(model, host) {
    this.host = host;
    this.prefix = `ftb-${Math.floor(performance.now())}-${views++}`;
    this.kernel = new Kernel(model, (state) => this.onKernel(state));
    this.indexes = new Cache(24e6);
    this.bodies = new Cache(32e6);
    this.timings = []; // of the last rollouts that were opened, for tests
    Object.assign(this, {
      epochs: [], signals: [], sorts: {}, filter: {}, sort: "spread", tint: "probability", index: null, order: new Uint32Array(), matched: new Uint8Array(),
      position: 0, range: [0, 1], hitsByEpoch: new Map(), labels: { epoch: null, labels: [], tags: [] }, tagsByGroup: new Map(), change: 0, weights: null, kept: [], unfinished: "running", opening: 0, stamp: "", line: "", ticket: 0, closed: false, following: null,
    });
    this.build(model);
    this.giveKeysBack = keepKeys(this.root, () => true);
    this.kernel.onEvent = (event) => this.onEvent(event);
    this.timer = setInterval(() => this.tick(), EVERY);
    this.start();
  }

  build(model) {
    this.root = make("div", { kind: "ftb", tabindex: "0", role: "application", "aria-roledescription": "trajectory browser", "aria-label": "Trajectories. Press ? for the keys." });
    this.scrubber = new Scrubber(this);
    this.search = make("input", { type: "search", placeholder: "search  /", "aria-label": "search the text of the rollouts" });
    this.search.addEventListener("keydown", (event) => event.key === "Enter" && this.searchFor(this.search.value));
    this.filterButton = button("filter", "filter (f)", () => this.toggleFilters());
    this.sortChoice = choice("sort by", [], (value) => this.refilter({ sort: value }));
    this.tintChoice = choice("tint of the tokens", TINTS, (value) => this.setTint(value));
    this.weightsChoice = choice("weights that the change is under", [], (value) => this.setWeights(value === "" ? null : Number(value)));
    this.weightsChoice.hidden = true;
    this.compareButton = button("compare", "compare two rollouts (c)", () => this.compare());
    this.top = make("div", { kind: "top", role: "toolbar", "aria-label": "what is shown" }, this.scrubber.element, this.search, this.filterButton, this.sortChoice, this.tintChoice, this.weightsChoice, this.compareButton,
      button("?", "keys (?)", () => this.toggleHelp()));
    this.filters = make("div", { kind: "filters", hidden: "", role: "group", "aria-label": "filter" });
    this.list = new GroupList(this);
    this.readers = [new Reader(this, "rollout")];
    this.reader = this.readers[0];
    this.inspector = new Inspector(this);
    this.labelBox = new Labels(this);
    this.inspector.labels.replaceWith(this.labelBox.element);
    this.status = make("div", { kind: "say", role: "status", "aria-live": "polite" });
    this.banner = make("div", { kind: "banner", hidden: "", role: "alert" });
    this.main = make("div", { kind: "main" }, this.list.element, this.reader.element, this.inspector.element);
    this.root.append(this.banner, this.top, this.filters, this.main, this.status);
    this.root.addEventListener("keydown", (event) => this.onKey(event));

    const shadow = this.host.attachShadow({ mode: "open" });
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(model.get("sheet") ?? "");
    shadow.adoptedStyleSheets = [sheet];
    shadow.append(this.root);
    // JupyterLab pads an HTML output on its right.
    if (this.host.closest?.(".jp-RenderedHTMLCommon")) this.host.style.width = "calc(100% + 20px)";
    this.resized = new ResizeObserver(() => this.list.paint());
    this.resized.observe(this.root);
  }

  close() {
    this.closed = true;
    clearInterval(this.timer);
    this.giveKeysBack();
    this.resized.disconnect();
    this.kernel.close();
  }

  say(text) {
    this.status.textContent = visible(text);
  }

  // ── the kernel ──

  onKernel(state) {
    if (this.closed) return;
    if (state === "slow" && this.state !== "slow") this.say(UNANSWERED);
    if (state === "ready" && this.status.textContent === UNANSWERED) this.say(""); // and nothing that was said since
    this.state = state;
    const lost = state === "lost";
    this.root.classList.toggle("lost", lost);
    this.banner.hidden = !lost;
    if (lost) {
      this.banner.textContent = visible(`${this.kernel.gone ? "No kernel is behind this any more." : "The kernel does not answer: it is busy, or gone."} What is loaded can still be read. Run the cell again, or: ${this.line}`);
    }
  }

  /** Asks; what goes wrong is said, and gives null. */
  async ask(op, args) {
    try {
      return await this.kernel.ask(op, args);
    } catch (error) {
      if (!this.closed && !this.kernel.gone) this.say(error.message);
      return null;
    }
  }

  async start() {
    const began = performance.now();
    const found = await this.ask("hello");
    if (!found) return;
    const [about] = found;
    Object.assign(this, { line: about.line, signals: about.signals, sorts: about.sorts, still: Boolean(about.still) });
    this.root.classList.toggle("still", this.still); // a page without a kernel
    if (this.still) this.tintChoice.querySelector("option[value=change]")?.remove(); // the kernel's to work out
    this.sortChoice.replaceChildren(...Object.entries(about.sorts).map(([value, text]) => make("option", { value, text: `sort: ${text}` })));
    this.takeEpochs(about);
    this.buildFilters();
    await this.goTo(about);
    await painted();
    this.firstPaint = performance.now() - began;
  }

  /** Goes where the kernel says: {epoch, group, rollout, filter, sort}. */
  async goTo({ epoch, group, rollout, filter, sort }) {
    Object.assign(this, { filter: filter ?? {}, sort: sort ?? "spread" });
    this.search.value = this.filter.text ?? "";
    this.sortChoice.value = this.sort;
    this.showFilters();
    if (epoch !== null && epoch !== undefined) await this.openEpoch(epoch, { group, rollout });
    else this.reader.clear("no epoch has ended yet");
  }

  onEvent(event) {
    if (event.event === "at") this.goTo(event);
    if (event.event === "filter") {
      this.search.value = event.filter.text ?? "";
      this.sortChoice.value = event.sort;
      this.refilter(event);
    }
    if (event.event === "hits") this.takeHits(event);
  }

  takeEpochs(about) {
    Object.assign(this, { epochs: about.epochs, stamp: about.stamp, unfinished: about.unfinished });
    this.scrubber.paint();
  }

  /** The newest epoch that has ended. */
  get newestEnded() {
    return this.epochs.filter(([, , , , version]) => version === null).at(-1)?.[0];
  }

  tick() {
    if (this.host.isConnected && !document.hidden) this.askNews();
  }

  async askNews() {
    if (this.asking || this.kernel.gone) return;
    this.asking = true;
    try {
      const [found] = await this.kernel.ask("news", { stamp: this.stamp, change: this.change, epoch: this.index?.epoch ?? null });
      if (found.labels) this.takeLabels(found);
      if (this.closed) return;
      if (found.epochs) this.takeNews(found);
      await this.catchUp();
    } catch {
      // the banner says it
    } finally {
      this.asking = false;
    }
  }

  takeNews(found) {
    const newest = this.newestEnded;
    this.takeEpochs(found);
    const now = this.newestEnded;
    if (now === newest || now === undefined) return;
    if (this.index?.epoch === newest && this.readers.length === 1) this.following = now;
    this.say(`epoch ${now} has ended`);
    if (this.tint === "change") this.askWeights();
  }

  /** Brings what is open up to what is known of the epochs, unless a person is on the way to another one. */
  async catchUp() {
    if (this.opening || !this.epochs.length) return;
    const { following } = this;
    this.following = null;
    const place = this.placeOfEpoch(this.index?.epoch);
    if (place < 0) await this.openEpoch(this.epochs.at(-1)[0]);
    else if (this.epochs[place][4] !== this.index.version || this.epochs[place][5] !== this.index.started) await this.renewEpoch();
    else if (following !== null) {
      await this.openEpoch(following);
      this.say(`epoch ${following} has ended`);
    }
  }

  // ── epochs, filters, order ──

  placeOfEpoch(epoch) {
    return this.epochs.findIndex(([index]) => index === epoch);
  }

  stepEpoch(step) {
    const next = this.epochs[this.placeOfEpoch(this.index?.epoch) + step];
    if (next) this.openEpoch(next[0]);
    else this.say(step > 0 ? "this is the newest epoch" : "this is the first epoch");
  }

  async fetchIndex(epoch) {
    const place = this.placeOfEpoch(epoch);
    const [, , , , version, started] = this.epochs[place] ?? [];
    const key = `${epoch} ${place} ${version ?? ""} ${started}`;
    const known = this.indexes.get(key);
    if (known) return known;
    const found = await this.ask("index", { epoch });
    if (!found) return null;
    const index = readIndex(...found);
    this.indexes.put(key, index, found[1].reduce((sum, each) => sum + each.byteLength, 0));
    return index;
  }

  /** The index of an epoch and what of it is listed, both of one state of it. null: it was asked for anew meanwhile. */
  async fetchEpoch(epoch) {
    const ticket = ++this.ticket;
    this.opening++;
    try {
      for (let tries = 0; tries < 3; tries++) {
        const [index, listed] = await Promise.all([this.fetchIndex(epoch), this.ask("view", { epoch, filter: this.filter, sort: this.sort })]);
        if (!index || !listed || ticket !== this.ticket || this.closed) return null;
        if (index.version === listed[0].version) return [index, listed];
        this.indexes = new Cache(24e6); // an epoch that runs has gained rollouts in between
      }
      return null;
    } finally {
      this.opening--;
    }
  }

  /** Opens an epoch, where it was left: at the given group and rollout, or at the example that is open. */
  async openEpoch(epoch, { group = null, rollout = null } = {}) {
    const example = this.index && this.order.length ? this.index.examples.at(this.order[this.position]) : null;
    const { wanted } = this.readers[0];
    const generation = wanted ? wanted.index.generations[wanted.rollout] : null;
    const found = await this.fetchEpoch(epoch);
    if (!found) return;
    const [index, listed] = found;
    this.takeIndex(index, listed);
    if (group === null && example !== null) {
      group = findExample(index, example);
      if (group !== null) rollout = findGeneration(index, group, generation);
      if (rollout !== null && !this.matched[rollout]) rollout = null;
    }
    this.goToGroup(group, rollout);
    this.askLabels();
  }

  takeIndex(index, listed, quiet = false) {
    if (this.index?.epoch !== index.epoch) this.tagsByGroup.clear();
    this.index = index;
    this.takeView(listed, quiet);
    this.range = index.rewards.reduce(([low, high], value) => (Number.isFinite(value) ? [Math.min(low, value), Math.max(high, value)] : [low, high]), [0, 1]);
    this.list.histories.clear();
    this.scrubber.paint();
  }

  /** The epoch that is open has gained rollouts, or has ended: what a person looks at stays where it is. */
  async renewEpoch() {
    const { epoch } = this.index;
    const found = await this.fetchEpoch(epoch);
    if (!found) return;
    const [index, listed] = found;
    const before = this.position;
    const example = this.order.length ? this.index.examples.at(this.order[before]) : null;
    this.takeIndex(index, listed, true);
    const place = example === null ? -1 : this.order.indexOf(findExample(index, example));
    this.position = clamp(place < 0 ? before : place, 0, Math.max(0, this.order.length - 1));
    this.list.renew(before, this.position);
    for (const reader of this.readers) if (reader.at?.index.epoch === epoch) await this.renewIn(reader, index);
    if (!this.readers[0].at) this.openPlace(this.position);
    this.askLabels();
  }

  async renewIn(reader, index) {
    const { index: old, rollout: place } = reader.at;
    const group = findExample(index, old.examples.at(groupOf(old, place)));
    const rollout = group === null ? null : findGeneration(index, group, old.generations[place]);
    if (rollout === null) return;
    const { ticket } = reader;
    const before = reader.body;
    // Until it is scored, nothing of it changes.
    const scored = index.version === null || !Number.isNaN(index.rewards[rollout]);
    const body = scored ? await this.fetchBody(index, rollout) : before;
    if (!body || reader.ticket !== ticket || reader.body !== before || this.closed) return;
    reader.wanted = { index, rollout };
    if (!sameConversation(before, body)) return this.openIn(reader, index, rollout);
    reader.renew(body, { index, rollout });
    if (reader === this.reader) {
      this.inspector.paintToken();
      this.inspector.paintRollout();
      this.labelBox.paint();
    }
    this.comparePair();
  }

  takeView([about, buffers], quiet = false) {
    this.order = column(Uint32Array, buffers[0]);
    this.matched = column(Uint8Array, buffers[1]);
    this.leading = column(Uint32Array, buffers[2]); // of each listed group the rollout to open
    if (!quiet) this.say(`${plural(this.order.length, "example")}, ${plural(about.rollouts, "rollout")}`);
  }

  goToGroup(group, rollout = null) {
    const place = group === null ? -1 : this.order.indexOf(group);
    this.position = Math.max(0, place);
    this.list.reset();
    this.list.reveal(this.position);
    this.openPlace(this.position, place >= 0 ? rollout : null);
  }

  /** Another filter or order of this epoch. */
  async refilter({ filter = this.filter, sort = this.sort } = {}) {
    const group = this.order[this.position] ?? null;
    const rollout = this.readers[0].wanted?.rollout ?? null;
    Object.assign(this, { filter, sort });
    this.showFilters();
    if (!this.index) return;
    const ticket = ++this.ticket;
    const listed = await this.ask("view", { epoch: this.index.epoch, filter, sort });
    if (!listed || ticket !== this.ticket) return;
    if (listed[0].version !== this.index.version) return this.renewEpoch();
    this.takeView(listed);
    const stays = group !== null && rollout !== null && this.matched[rollout] === 1;
    this.goToGroup(stays ? group : null, stays ? rollout : null);
  }

  searchFor(text) {
    const filter = { ...this.filter, text };
    if (!text) delete filter.text;
    this.hitsByEpoch.clear();
    this.scrubber.paint();
    this.refilter({ filter });
    this.root.focus();
    this.kernel.ask("search", { text, epoch: this.index?.epoch ?? null }).catch((error) => this.say(error.message));
  }

  /** Hits in other epochs arrive epoch by epoch. */
  takeHits({ text, epoch, rollouts, done }) {
    if (text !== (this.filter.text ?? "")) return;
    if (epoch !== undefined && epoch !== null) this.hitsByEpoch.set(epoch, rollouts);
    if (done) {
      const all = [...this.hitsByEpoch.values()].reduce((sum, each) => sum + each, 0);
      this.say(`${plural(all, "rollout")} in ${plural([...this.hitsByEpoch.values()].filter(Boolean).length, "epoch")}`);
    }
    this.scrubber.paint();
  }

  buildFilters() {
    const set = (name, value) => {
      const filter = { ...this.filter, [name]: value };
      if (value === null) delete filter[name];
      this.refilter({ filter });
    };
    const states = [["", "failed or not"], ["failed", "failed"], ["cut", "cut at the limit"], ["missing", "without a reward"], ["finished", "finished"]];
    const limits = (name, words) => {
      const fields = ["lowest", "highest"].map((end) => make("input", { type: "number", step: "any", "aria-label": `${end} ${words}`, placeholder: end === "lowest" ? "from" : "to" }));
      const read = (field) => (field.value === "" ? null : Number(field.value));
      for (const field of fields) field.addEventListener("change", () => set(name, fields.every((each) => each.value === "") ? null : fields.map(read)));
      return { fields, element: make("label", {}, make("span", { text: words }), ...fields) };
    };
    this.controls = {
      signal: choice("why the group teaches or not", [["", "any signal"], ...this.signals.map(({ name }) => [name, words(name)])], (value) => set("signal", value || null)),
      state: choice("state of the rollout", states, (value) => {
        const filter = { ...this.filter };
        for (const name of ["failed", "cut", "missing"]) delete filter[name];
        if (value === "finished") filter.failed = false;
        else if (value) filter[value] = true;
        this.refilter({ filter });
      }),
      reward: limits("reward", "reward"),
      turns: limits("turns", "turns"),
      label: choice("filter by label", [["", "any or no label"]], (value) => set("label", value || null)),
    };
    const { signal, state, reward, turns, label } = this.controls;
    this.filters.replaceChildren(signal, state, reward.element, turns.element, label, button("clear", "no filter", () => {
      this.search.value = "";
      this.refilter({ filter: {} });
    }));
    this.showFilters();
  }

  /** Makes the controls say what the filter is. */
  showFilters() {
    const count = Object.keys(this.filter).length;
    this.filterButton.textContent = count ? `filter (${count})` : "filter";
    if (!this.controls) return;
    const { signal, state, reward, turns, label } = this.controls;
    const { filter } = this;
    signal.value = filter.signal ?? "";
    state.value = filter.failed === false ? "finished" : ["failed", "cut", "missing"].find((name) => filter[name]) ?? "";
    for (const [limits, values] of [[reward, filter.reward], [turns, filter.turns]]) {
      limits.fields.forEach((field, i) => { field.value = values?.[i] ?? ""; });
    }
    const tags = [["", "any or no label"], ["*", "any label"], ...(this.labels.tags ?? []).map((tag) => [tag, visible(tag)])];
    if (filter.label && !tags.some(([tag]) => tag === filter.label)) tags.push([filter.label, visible(filter.label)]);
    label.replaceChildren(...tags.map(([value, text]) => make("option", { value, text })));
    label.value = filter.label ?? "";
  }

  /** Another order, from its beginning. */
  async stepSort(step) {
    const names = Object.keys(this.sorts);
    const sort = names[(names.indexOf(this.sort) + step + names.length) % names.length];
    this.sortChoice.value = sort;
    await this.refilter({ sort });
    if (this.index) this.goToGroup(null);
    this.say(`sort: ${this.sorts[sort]}`);
  }

  toggleFilters(shown = this.filters.hidden) {
    this.filters.hidden = !shown;
    this.filterButton.setAttribute("aria-expanded", String(shown));
    if (shown) this.controls?.signal.focus();
    else this.root.focus();
  }

  // ── rollouts ──

  openPlace(place, rollout = null) {
    if (!this.order.length) {
      this.reader.clear("nothing matches the filter");
      this.inspector.paintToken();
      this.inspector.paintRollout();
      this.list.paint();
      return;
    }
    this.position = clamp(place, 0, this.order.length - 1);
    this.list.paint();
    this.openIn(this.readers[0], this.index, rollout ?? this.leading[this.position]);
  }

  /** How the kernel knows a rollout: by its place; in an epoch that may gain others meanwhile, by its name as well. */
  whereIs({ index, rollout }) {
    const where = { epoch: index.epoch, rollout };
    if (index.version === null) return where;
    return { ...where, version: index.version, example: index.examples.at(groupOf(index, rollout)), generation: generationText(index, rollout) };
  }

  async fetchBody(index, rollout) {
    const key = `${index.epoch}/${index.started}/${index.version ?? ""}/${index.rows[rollout]}`; // an epoch can be run again
    const known = this.bodies.get(key);
    if (known) return known;
    const found = await this.ask("body", this.whereIs({ index, rollout }));
    if (!found) return null;
    const body = readBody(...found);
    this.bodies.put(key, body, body.bytes);
    return body;
  }

  async openIn(reader, index, rollout) {
    const began = performance.now();
    const ticket = (reader.ticket = (reader.ticket ?? 0) + 1);
    reader.wanted = { index, rollout }; // keys that follow start from here, also before it is shown
    await this.fetching; // one after the other: who presses j ten times wants the tenth
    if (reader.ticket !== ticket || this.closed) return;
    const fetching = this.fetchBody(index, rollout);
    this.fetching = fetching;
    const body = await fetching;
    if (!body && this.still && reader.ticket === ticket) {
      reader.clear(this.status.textContent); // what it says is not in the page
      reader.wanted = { index, rollout };
      this.inspector.paintToken();
      this.inspector.paintRollout();
    }
    if (!body || reader.ticket !== ticket || this.closed) return;
    const came = performance.now();
    reader.show(body, { index, rollout });
    this.askChanges(reader);
    if (reader === this.reader) {
      this.inspector.paintToken();
      this.inspector.paintRollout();
      this.labelBox.paint();
    }
    this.comparePair();
    if (this.readers.length > 1) this.scrolledIn(this.readers.find((each) => each !== reader));
    if (reader === this.readers[0]) this.tellWhere(index, rollout);
    const built = performance.now();
    await painted();
    this.timings.push({ wait: came - began, build: built - came, all: performance.now() - began, tokens: body.logprobs.length, bytes: body.bytes });
    if (this.timings.length > 200) this.timings.shift();
  }

  /** The same example in another epoch, on one side. */
  async openEpochIn(reader, epoch) {
    if (reader === this.readers[0]) return this.openEpoch(epoch);
    const { index: before, rollout: old } = reader.at;
    const index = await this.fetchIndex(epoch);
    if (!index) return;
    const group = findExample(index, before.examples.at(groupOf(before, old)));
    if (group === null) {
      reader.paintHead();
      return this.say(`epoch ${epoch} has no such example`);
    }
    this.openIn(reader, index, findGeneration(index, group, before.generations[old]) ?? index.starts[group]);
  }

  openRollout(reader, rollout) {
    if (reader.at) this.openIn(reader, reader.at.index, rollout);
  }

  stepGeneration(step) {
    const reader = this.readers[0];
    if (!reader.wanted) return;
    const { index, rollout } = reader.wanted;
    const group = groupOf(index, rollout);
    const [start, count] = [index.starts[group], index.starts[group + 1] - index.starts[group]];
    this.openIn(reader, index, start + ((rollout - start + step + count) % count));
  }

  stepExample(step) {
    const place = clamp(this.position + step, 0, this.order.length - 1);
    if (place === this.position) return this.say(step > 0 ? "this is the last example" : "this is the first example");
    this.list.reveal(place);
    this.openPlace(place);
  }

  tellWhere(index, rollout) {
    clearTimeout(this.telling);
    this.told = null; // which rollout the kernel knows to be open
    this.telling = setTimeout(() => {
      if (this.closed) return;
      this.kernel.ask("at", this.whereIs({ index, rollout })).then(() => { this.told = rollout; }, () => {});
    }, 150);
  }

  // ── tokens ──

  focusToken(reader, token, scroll = false) {
    this.reader = reader;
    reader.focus(token, scroll);
    this.inspector.paintToken();
  }

  setTint(tint) {
    this.tint = tint;
    this.tintChoice.value = tint;
    this.weightsChoice.hidden = tint !== "change";
    for (const reader of this.readers) {
      reader.setChanges(null);
      reader.note("");
    }
    this.inspector.paintToken();
    if (tint === "change") this.askWeights();
    const bodies = this.readers.map((reader) => reader.body).filter(Boolean);
    if (tint === "entropy" && bodies.length && bodies.every((body) => !body.entropies)) this.say("no entropy was recorded for these tokens");
    else this.say(TINTS.find(([name]) => name === tint)[1]);
  }

  /** Which epochs' weights can be had: then the changes under those that were chosen, or the newest. */
  async askWeights() {
    const found = await this.ask("weights");
    if (!found || this.tint !== "change") return;
    this.kept = found[0].epochs;
    const newest = this.kept.at(-1);
    const options = [["", newest === undefined ? "no weights are kept" : `newest weights (epoch ${newest})`]];
    for (const epoch of [...this.kept].reverse()) options.push([epoch, `weights after epoch ${epoch}`]);
    this.weightsChoice.replaceChildren(...options.map(([value, text]) => make("option", { value, text })));
    if (!this.kept.includes(this.weights)) this.weights = null;
    this.weightsChoice.value = this.weights ?? "";
    for (const reader of this.readers) this.askChanges(reader);
  }

  setWeights(epoch) {
    this.weights = epoch;
    for (const reader of this.readers) this.askChanges(reader);
  }

  /** Asks what the tokens of the rollout in a reader have changed by. It may take long: the model is loaded for it. */
  async askChanges(reader) {
    if (this.tint !== "change" || !reader.body) return;
    const { body, at } = reader;
    const weights = this.weights ?? this.kept.at(-1) ?? null;
    body.changes ??= new Map();
    const current = () => reader.body === body && this.tint === "change" && (this.weights ?? this.kept.at(-1) ?? null) === weights && !this.closed;
    if (!body.logprobs.length) return reader.note("no change: no token of this rollout was sampled by the policy");
    let changes = body.changes.get(weights);
    if (!changes) {
      reader.setChanges(null);
      reader.note(weights === null ? "looking for weights …" : `computing the change under the weights after epoch ${weights} …`);
      await new Promise((done) => setTimeout(done, 250)); // who passes by on the way to another one loads nothing
      if (!current()) return;
      try {
        const [, buffers] = await this.kernel.askLong("change", { ...this.whereIs(at), weights });
        changes = column(Float32Array, buffers[0]);
        if (changes.length !== body.logprobs.length) throw new Error("the record has other tokens than are shown");
      } catch (error) {
        if (current()) reader.note(`no change can be shown: ${error.message}`);
        return;
      }
      body.changes.set(weights, changes);
    }
    if (!current()) return;
    reader.weights = weights;
    reader.setChanges(changes);
    const mean = changes.reduce((sum, value) => sum + value, 0) / changes.length;
    reader.note(`change under the weights after epoch ${weights}: ${signed(mean)} nats a token on average; blue, with a line above: more likely than when it was sampled; orange, with a line below: less`);
    if (reader === this.reader) this.inspector.paintToken();
  }

  // ── comparing ──

  /** With the other end of the group: the worst for a good one, the best for a bad one. Again: ends it. */
  compare() {
    if (this.readers.length > 1) return this.endCompare();
    const { at } = this.reader;
    if (!at) return;
    const { index, rollout } = at;
    const group = groupOf(index, rollout);
    // Where a reward is missing there is no distance: such a rollout is taken only if there is no other.
    const distance = (i) => (Number.isNaN(index.rewards[i] - index.rewards[rollout]) ? -1 : Math.abs(index.rewards[i] - index.rewards[rollout]));
    let other = null;
    for (let i = index.starts[group]; i < index.starts[group + 1]; i++) {
      if (i !== rollout && (other === null || distance(i) > distance(other))) other = i;
    }
    if (other === null) return this.say("the group has no other rollout; C keeps this one on the right");
    this.beginCompare(index, other);
  }

  pin() {
    const { at } = this.readers[0];
    if (!at) return;
    this.beginCompare(at.index, at.rollout);
    this.say("kept on the right; go to another rollout, of any epoch, on the left");
  }

  beginCompare(index, rollout) {
    if (this.readers.length === 1) {
      this.readers.push(new Reader(this, "the rollout that it is compared with"));
      this.inspector.element.before(this.readers[1].element);
    }
    this.root.classList.add("two");
    this.compareButton.setAttribute("aria-pressed", "true");
    if (this.readers[0].body) this.readers[0].paintHead();
    this.openIn(this.readers[1], index, rollout);
  }

  endCompare() {
    this.readers.pop().element.remove();
    this.root.classList.remove("two");
    this.compareButton.setAttribute("aria-pressed", "false");
    this.reader = this.readers[0];
    this.parted = undefined;
    this.reader.share(undefined);
    if (this.reader.body) this.reader.paintHead();
    this.inspector.paintToken();
  }

  comparePair() {
    const [left, right] = this.readers;
    if (!right?.body || !left.body) return;
    const same = left.at.index === right.at.index && left.at.rollout === right.at.rollout;
    this.parted = same ? undefined : parting(left.body, right.body);
    for (const reader of this.readers) reader.share(this.parted);
    if (this.parted === null) this.say("both say the same");
    else if (this.parted) this.say(`they part in turn ${this.parted.turn + 1}`);
  }

  toParting() {
    if (this.readers.length < 2) return this.say("nothing is compared: press c");
    if (!this.parted) return this.say("both say the same");
    this.locked = true;
    for (const reader of this.readers) {
      const turn = reader.body.turns[this.parted.turn];
      if (!turn) continue;
      reader.turnTo(this.parted.turn, true);
      if (turn.start + this.parted.token < turn.stop) reader.focus(turn.start + this.parted.token);
    }
    requestAnimationFrame(() => requestAnimationFrame(() => { this.locked = false; }));
    this.say(`they part in turn ${this.parted.turn + 1}`);
  }

  /** Two readers are linked by turn: the same one on top. */
  scrolledIn(reader) {
    if (this.readers.length < 2 || this.locked || !reader.body) return;
    const other = this.readers.find((each) => each !== reader);
    if (!other.body || other.turn === reader.turn || reader.turn >= other.sections.length) return;
    this.locked = true;
    other.turnTo(reader.turn, true);
    requestAnimationFrame(() => requestAnimationFrame(() => { this.locked = false; }));
  }

  // ── labels ──

  async askLabels() {
    const found = await this.ask("labels", { epoch: this.index.epoch });
    if (found) this.takeLabels(found[0]);
  }

  takeLabels({ labels, tags, change, epoch }) {
    this.labels = { labels, tags, epoch };
    this.change = change;
    this.tagsByGroup.clear();
    if (this.index && epoch === this.index.epoch) {
      for (const [level, place, tag] of labels) {
        if (level === "epoch") continue;
        const group = level === "group" ? place : groupOf(this.index, place);
        const tags = this.tagsByGroup.get(group) ?? [];
        if (!tags.includes(tag)) this.tagsByGroup.set(group, [...tags, tag]);
      }
    }
    this.list.retag();
    this.scrubber.paint();
    this.showFilters();
    this.labelBox.paint();
  }

  /** Adds or removes a label of what is open. */
  async changeLabel(label) {
    const { at } = this.reader;
    if (!at) return false;
    const found = await this.ask("label", { ...this.whereIs(at), ...label });
    if (!found) return false;
    if (at.index.epoch === found[0].epoch) this.takeLabels(found[0]);
    this.say(label.remove ? `removed ${label.tag}` : `labelled ${label.tag}`);
    return true;
  }

  // ── taking it away ──

  async rawText() {
    const { at } = this.reader;
    if (!at) return null;
    const found = await this.ask("raw", this.whereIs(at));
    return found && found[0].text;
  }

  async copyPython() {
    const { at } = this.reader;
    if (!at) return;
    const found = await this.ask("python", this.whereIs(at));
    if (found) this.copy(found[0].text, found[0].text);
  }

  async copy(text, said) {
    try {
      await navigator.clipboard.writeText(text);
      this.say(`copied ${said}`);
    } catch {
      this.say(`could not copy; here it is: ${text.slice(0, 2000)}`);
    }
  }

  // ── keys ──

  onKey(event) {
    const target = event.composedPath()[0];
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName);
    if (event.key === "Escape") {
      event.stopPropagation();
      event.preventDefault();
      return this.leave(typing);
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    if (typing || event.defaultPrevented) return;
    if (event.key.startsWith("Arrow") && target.closest(".reader, .inspector, .help")) return;
    const press = this.actions()[event.key];
    if (!press) return;
    event.preventDefault();
    press();
  }

  actions() {
    const { reader } = this;
    const ready = (call) => () => reader.body && call();
    return {
      j: () => this.stepExample(1), k: () => this.stepExample(-1), ArrowDown: () => this.stepExample(1), ArrowUp: () => this.stepExample(-1),
      h: () => this.stepGeneration(-1), l: () => this.stepGeneration(1), ArrowLeft: () => this.stepGeneration(-1), ArrowRight: () => this.stepGeneration(1),
      g: () => this.stepExample(-this.position), G: () => this.stepExample(this.order.length), "[": () => this.stepEpoch(-1), "]": () => this.stepEpoch(1),
      "{": () => this.stepEpoch(-this.placeOfEpoch(this.index?.epoch)), "}": () => this.stepEpoch(this.epochs.length - 1 - this.placeOfEpoch(this.index?.epoch)),
      s: () => this.stepSort(1), S: () => this.stepSort(-1),
      n: ready(() => reader.turnTo(reader.turn + 1)), p: ready(() => reader.turnTo(reader.turn - 1)),
      ".": ready(() => reader.nextUnlikely(1)), ",": ready(() => reader.nextUnlikely(-1)),
      c: () => this.compare(), C: () => this.pin(), d: () => this.toParting(), "/": () => this.search.focus(), f: () => this.toggleFilters(),
      e: ready(() => reader.sections[reader.turn] && reader.fold(reader.sections[reader.turn])), E: ready(() => reader.foldAll()),
      t: () => this.setTint(after(this.still ? TINTS.filter(([name]) => name !== "change") : TINTS, this.tint)),
      x: () => (this.still ? this.say("labels are made in a notebook") : this.labelBox.tag.focus()), X: () => this.labelBox.again(),
      y: async () => { const text = await this.rawText(); if (text !== null) this.copy(text, "the record as JSON"); }, Y: () => this.copyPython(), "?": () => this.toggleHelp(),
    };
  }

  leave(typing) {
    if (this.help) return this.toggleHelp();
    if (!this.filters.hidden) return this.toggleFilters(false);
    if (typing) return this.root.focus();
    const notebook = this.host.closest(".jp-Notebook");
    if (notebook) notebook.focus();
    else this.host.ownerDocument.activeElement?.blur();
  }

  toggleHelp() {
    if (this.help) {
      this.help.remove();
      this.help = null;
      this.root.focus();
      return;
    }
    const table = make("table", {});
    for (const [key, what] of KEYS) {
      const keys = make("th", { scope: "row" });
      for (const each of key.split(" ")) keys.append(make("kbd", { text: each }), " ");
      table.append(make("tr", {}, keys, make("td", { text: what })));
    }
    this.help = make("div", { kind: "help", role: "dialog", "aria-label": "keys", tabindex: "0" }, make("h4", { text: "keys" }), table, button("close", "close", () => this.toggleHelp()));
    this.root.append(this.help);
    this.help.focus();
  }
}

// ── into the page ───────────────────────────────────────────────────────────────────────────────────────────────────

function show(model, el) {
  const host = document.createElement("div");
  el.append(host);
  el.view = new BrowserView(model, host);
  return el.view;
}

// For front ends that make a widget's page only where an output shows it.
function render({ model, el, signal }) {
  const view = show(model, el);
  const unwatch = watchKernel(model, () => view.kernel.lose());
  const close = () => {
    unwatch();
    view.close();
    view.host.remove();
  };
  signal?.addEventListener("abort", close);
  return close;
}

function initialize({ model, signal }) {
  mountOver({ model, signal }, () => {
    let view = null;
    return { attach: (el) => { view = show(model, el); }, remove: () => view?.close(), gone: () => view.kernel.lose() };
  });
}

export default { initialize, render };
