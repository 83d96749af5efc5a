"use strict";
// Draws tokens and what is known of each. Texts become text nodes, never HTML.
//
// token   {piece, text, position, token, rank, forced, drafted, candidates: [{text, probability, margin, margins}]}
// answer  {aligned, agents: {name: part}, threshold, strategy, order, fallback}

const KINDS = {
  first: "accepted at rank 1",
  changed: "changed",
  forced: "forced",
  only: "no choice",
  drawn: "drawn",
  plain: "plain",
};
const EXPLAINED = {
  first: "The agent accepted the LLM's first choice",
  changed: "The agent accepted another candidate than the LLM's first choice; the small figure is its rank",
  forced: "The agent rejected every candidate, and the fallback was taken",
  only: "There was one candidate, and nothing to decide",
  drawn: "Sampled, and not the LLM's first choice",
  plain: "The LLM's first choice; no agent was asked",
  drafted: "Guessed from a repetition, and confirmed in the same pass",
};
const MOST_CANDIDATES = 40;
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/u;

/** An element. properties: attributes; those that are false or null are left out, "on…" are listeners. */
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

function kindOf(token, aligned) {
  if (!aligned) return token.rank === 1 ? "plain" : "drawn";
  if (token.forced) return "forced";
  if (token.candidates.every((candidate) => candidate.margin == null)) return "only";
  return token.rank === 1 ? "first" : "changed";
}

const mark = (sign) => el("span", { class: "mark", "aria-hidden": "true" }, sign);

/** A text as nodes: line ends and tabs have a sign before them, other control characters one in their place. */
function visible(text) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(plain);
    plain = "";
  };
  for (const character of text) {
    if (character === "\n" || character === "\t") {
      flush();
      nodes.push(mark(character === "\n" ? "↵" : "⇥"), character);
    } else if (CONTROL.test(character)) {
      flush();
      nodes.push(el("span", { class: "mark" }, escaped(character)));
    } else plain += character;
  }
  flush();
  return nodes;
}

function escaped(character) {
  const code = character.codePointAt(0);
  return code < 32 ? String.fromCodePoint(0x2400 + code) : `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
}

/** A token's text in one line, with spaces at its ends shown. */
function quoted(text) {
  if (text === "") return "∅";
  const [, before, inner, after] = text.match(/^( *)([^]*?)( *)$/u);
  const shown = [...inner].map((c) => (c === "\n" ? "↵" : c === "\t" ? "⇥" : CONTROL.test(c) ? escaped(c) : c));
  return "␣".repeat(before.length) + shown.join("") + "␣".repeat(after.length);
}

const number = (value) => (value == null ? "" : value.toFixed(2).replace("-", "−"));
const given = (value) => String(value).replace("-", "−");
const percent = (p) => (p >= 0.9995 ? "100 %" : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %");

/** A token in the text. shown: its part of the piece, where Markdown takes signs away; default all. */
function tokenElement(token, kind, shown = token.piece) {
  const [space, rest] = shown.match(/^( *)([^]*)$/u).slice(1);
  const nodes = visible(rest || space);
  const classes = ["t", kind];
  if (token.drafted) classes.push("drafted");
  if (!token.piece) {
    const part = token.text.includes("\ufffd");
    classes.push(part ? "part" : "apart");
    nodes.push(part ? "◌" : quoted(token.text));
  }
  if (space && !rest) classes.push("blank");
  if (kind === "changed" || kind === "drawn") {
    const end = nodes.findIndex((node) => node instanceof Element && node.textContent === "↵");
    nodes.splice(end < 0 ? nodes.length : end, 0, el("sup", { "aria-hidden": "true" }, token.rank));
  }
  const properties = { class: classes.join(" "), role: "option", tabindex: "-1", "aria-selected": "false" };
  return el("span", properties, rest ? space : null, el("span", { class: "w" }, ...nodes));
}

/** Tokens in a row of text: arrow keys move between those that a filter shows; pointer, tap and focus show one. */
class TokenText {
  /** show: called with (index, whether it is selected), or (null, false) when the pointer leaves. */
  constructor(label, answer, show) {
    Object.assign(this, { answer, show, tokens: [], elements: [], filter: new Set(), selected: null });
    this.root = el("div", {
      class: "tokens show-all",
      role: "listbox",
      "aria-label": label,
      "aria-orientation": "horizontal",
      dir: "auto",
      onkeydown: (event) => this.onKey(event),
      onfocusin: (event) => this.select(this.indexOf(event.target)),
      onclick: (event) => this.focus(this.indexOf(event.target)),
      onpointerover: (event) => event.pointerType !== "touch" && this.hover(this.indexOf(event.target)),
      onpointerleave: () => this.show(this.selected, true),
    });
  }

  append(tokens) {
    const fragment = document.createDocumentFragment();
    for (const token of tokens) {
      const kind = kindOf(token, this.answer.aligned);
      const element = tokenElement(token, kind);
      this.adopt(token, element, kind);
      fragment.append(element);
    }
    this.root.append(fragment);
  }

  /** Take a token's element; what is drawn of a token in several parts has the same index. */
  adopt(token, element, kind, index = this.tokens.length) {
    const drafted = token.drafted ? ", drafted" : "";
    element.setAttribute("aria-label", `${quoted(token.piece || token.text)}, ${KINDS[kind]}${drafted}`);
    element.dataset.index = index;
    if (index === this.tokens.length) {
      this.tokens.push(token);
      this.elements.push(element);
    } else this.elements[index] ??= element;
    if (index === (this.selected ?? 0)) element.tabIndex = 0;
  }

  indexOf(target) {
    const element = target.closest(".t");
    return element && this.root.contains(element) ? Number(element.dataset.index) : null;
  }

  hover(index) {
    if (index !== null) this.show(index, false);
  }

  focus(index) {
    if (index !== null) this.elements[index]?.focus({ preventScroll: true });
  }

  select(index) {
    if (index === null) return;
    const before = this.elements[this.selected ?? 0];
    before?.setAttribute("tabindex", "-1");
    before?.setAttribute("aria-selected", "false");
    this.selected = index;
    this.elements[index].setAttribute("tabindex", "0");
    this.elements[index].setAttribute("aria-selected", "true");
    this.show(index, true);
  }

  /** Show only tokens of these kinds, "drafted" among them; all if there is none. */
  only(kinds) {
    this.filter = new Set(kinds);
    const shown = this.filter.size ? [...this.filter].map((kind) => `show-${kind}`) : ["show-all"];
    this.root.className = ["tokens", ...shown].join(" ");
  }

  shows(index) {
    const token = this.tokens[index];
    if (!this.elements[index]) return false;
    if (!this.filter.size || (token.drafted && this.filter.has("drafted"))) return true;
    return this.filter.has(kindOf(token, this.answer.aligned));
  }

  onKey(event) {
    const at = this.selected ?? 0;
    const last = this.tokens.length - 1;
    const target = {
      ArrowRight: () => this.next(at, 1),
      ArrowLeft: () => this.next(at, -1),
      ArrowDown: () => this.beyond(at, 1),
      ArrowUp: () => this.beyond(at, -1),
      Home: () => this.next(-1, 1),
      End: () => this.next(last + 1, -1),
    }[event.key];
    if (!target || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const index = target();
    if (index === null) return;
    this.focus(index);
    this.elements[index].scrollIntoView({ block: "nearest" });
  }

  next(from, step) {
    for (let i = from + step; i >= 0 && i < this.tokens.length; i += step) if (this.shows(i)) return i;
    return null;
  }

  /** The token nearest to this one in the line after it, or before it. */
  beyond(from, step) {
    const box = this.elements[from].getClientRects()[0];
    let best = null;
    let line = null;
    let distance = Infinity;
    for (let i = this.next(from, step); i !== null; i = this.next(i, step)) {
      const other = this.elements[i].getClientRects()[0];
      if (!other || Math.abs(other.top - box.top) < box.height / 2) continue;
      line ??= other.top;
      const away = Math.abs(other.left - box.left);
      if (Math.abs(other.top - line) > box.height / 2 || away > distance) break;
      [best, distance] = [i, away];
    }
    return best;
  }
}

/** How a token was chosen, in a sentence. */
function verdict(token, answer) {
  const first = token.candidates[0];
  const drafted = token.drafted ? " It was drafted: guessed from a repetition, and confirmed." : "";
  const said = {
    first: () => "Accepted at rank 1: the LLM's own first choice.",
    changed: () => {
      const fate =
        first.margin == null ? "was not examined" : first.margin > answer.threshold ? "was accepted, too" : "was rejected";
      return `Changed: rank ${token.rank} was accepted; the LLM's first choice, ${quoted(first.text)}, ${fate}.`;
    },
    forced: () => `Forced: all ${token.candidates.length} candidates were rejected, and the ${answer.fallback} was taken.`,
    only: () => "No choice: the only candidate.",
    drawn: () => `Drawn at rank ${token.rank}; no agent was asked.`,
    plain: () => "The LLM's first choice; no agent was asked.",
  };
  return said[kindOf(token, answer.aligned)]() + drafted;
}

/** What is known of a token. count: tokens of the answer. */
class Detail {
  constructor() {
    this.heading = el("h2", { id: "detail-heading" }, "A token");
    this.said = el("p", { class: "verdict", "aria-live": "polite" });
    this.body = el("div", { class: "candidates" });
    const close = el("button", { class: "close", type: "button", onclick: () => this.clear() }, "Close");
    this.root = el("aside", { class: "detail", "aria-labelledby": "detail-heading" });
    this.root.append(el("div", { class: "detail-head" }, this.heading, close), this.said, this.body);
    this.clear();
  }

  clear() {
    this.heading.textContent = "A token";
    this.said.textContent = "Point at a token, tap it, or move with the arrow keys to see its candidates.";
    this.body.replaceChildren();
    this.root.classList.add("empty");
  }

  /** told: read aloud by a screen reader, as what was selected is. */
  show(token, answer, index, count, told) {
    this.root.classList.remove("empty");
    this.heading.replaceChildren(`Token ${index + 1} of ${count}  `, el("q", {}, quoted(token.piece || token.text)));
    this.said.setAttribute("aria-live", told ? "polite" : "off");
    this.said.textContent = verdict(token, answer);
    this.said.className = `verdict ${kindOf(token, answer.aligned)}`;
    const facts = `Token id ${token.token}, at position ${token.position}.`;
    this.body.replaceChildren(candidateTable(token, answer), el("p", { class: "soft" }, facts));
  }
}

function candidateTable(token, answer) {
  const asked = token.candidates.some((candidate) => candidate.margin != null);
  const mixed = asked && token.candidates.some((candidate) => candidate.margins);
  const agents = mixed ? Object.entries(answer.agents) : [];
  const head = (text, title) => el("th", { scope: "col", title }, text);
  const titles = [head("rank"), head("candidate"), head("LLM", "probability, over the whole vocabulary")];
  if (asked) titles.push(head(mixed ? "sum" : "margin", "accepted above the threshold"));
  for (const [name, part] of agents) {
    titles.push(head(part === 1 ? name : `${given(part)} × ${name}`, "margin of this agent alone"));
  }
  const listed = Math.max(MOST_CANDIDATES, token.rank);
  const rows = token.candidates.slice(0, listed).map((candidate, i) => {
    const chosen = i + 1 === token.rank;
    const bar = el("span", { class: "bar" });
    bar.style.setProperty("--share", candidate.probability);
    const cells = [
      el("td", {}, i + 1),
      el("th", { scope: "row", title: quoted(candidate.text) }, quoted(candidate.text)),
      el("td", {}, bar, percent(candidate.probability)),
      asked ? el("td", {}, fate(candidate, answer, chosen), number(candidate.margin)) : null,
      ...agents.map(([name]) => el("td", {}, number(candidate.margins?.[name]))),
    ];
    return el("tr", { class: chosen ? "chosen" : null }, ...cells);
  });
  const left = token.candidates.length - rows.length;
  const caption = asked ? `Candidates; accepted above ${given(answer.threshold)}` : "Candidates";
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": "candidates" },
    el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, ...titles)), el("tbody", {}, ...rows)),
    left > 0 ? el("p", { class: "soft" }, `and ${left} more of lower rank`) : null,
  );
}

function fate(candidate, answer, chosen) {
  const [sign, words] =
    candidate.margin == null
      ? ["", "not examined"]
      : candidate.margin > answer.threshold
        ? ["✓", chosen ? "accepted" : "accepted, not chosen"]
        : ["✗", chosen ? "rejected, taken as the fallback" : "rejected"];
  return el("span", { class: "fate", title: words }, sign, el("span", { class: "words" }, ` ${words} `));
}

/** Legend and filter in one: buttons of the kinds that occur. change: called with the pressed ones. */
function legend(tokens, aligned, change) {
  const counts = {};
  for (const token of tokens) {
    const kind = kindOf(token, aligned);
    counts[kind] = (counts[kind] ?? 0) + 1;
    if (token.drafted) counts.drafted = (counts.drafted ?? 0) + 1;
  }
  const pressed = new Set();
  const buttons = [...Object.keys(KINDS), "drafted"]
    .filter((kind) => counts[kind])
    .map((kind) =>
      el(
        "button",
        {
          type: "button",
          "aria-pressed": "false",
          title: EXPLAINED[kind],
          onclick: (event) => {
            if (!pressed.delete(kind)) pressed.add(kind);
            event.currentTarget.setAttribute("aria-pressed", pressed.has(kind));
            change([...pressed]);
          },
        },
        el("span", { class: `sample ${kind}`, "aria-hidden": "true" }, el("span", { class: "w" }, "abc")),
        ` ${KINDS[kind] ?? kind} `,
        el("b", {}, counts[kind]),
      ),
    );
  return el("div", { class: "legend", role: "group", "aria-label": "show only" }, el("span", {}, "Show only"), ...buttons);
}
