// The page of a trace: see trace_page.py for what it finds in the element "data".

const data = JSON.parse(document.getElementById("data").textContent);

/** A token as tokens.js takes it, from arrays. */
function unpacked([position, piece, rank, flags, candidates], agents) {
  const expanded = candidates.map(([token, probability, margin = null, each]) => ({
    token,
    text: data.texts[token],
    probability,
    margin,
    margins: each && Object.fromEntries(agents.map((name, i) => [name, each[i]])),
  }));
  const { token, text } = expanded[rank - 1];
  return { position, piece, token, text, rank, forced: !!(flags & 1), drafted: !!(flags & 2), candidates: expanded };
}

for (const answer of data.answers) {
  const agents = Object.keys(answer.agents);
  answer.tokens = answer.tokens.map((token) => unpacked(token, agents));
}

const besideOf = (answer) => data.answers.find((other) => other.beside === answer.number);
const detail = new Detail();
const shown = el("div", { class: "answer" });
const page = document.getElementById("page");
const main = data.answers.filter((answer) => answer.beside === null);
const chooser = el(
  "select",
  { id: "which", onchange: (event) => draw(main[event.target.selectedIndex]) },
  ...main.map((answer, i) => el("option", {}, `${i + 1}: ${shortened(answer.title)}`)),
);

function shortened(text) {
  const letters = [...text.replace(/\s+/gu, " ")];
  return letters.length > 60 ? `${letters.slice(0, 59).join("")}…` : letters.join("");
}

/** Where two answers part: index of the first token that differs, or null. */
function parting(ours, theirs) {
  const count = Math.max(ours.length, theirs.length);
  for (let i = 0; i < count; i++) if (ours[i]?.token !== theirs[i]?.token) return i;
  return null;
}

function draw(answer) {
  const beside = besideOf(answer);
  const at = beside ? parting(answer.tokens, beside.tokens) : answer.tokens.findIndex((token) => token.rank !== 1);
  detail.clear();
  const texts = [answer, beside].filter(Boolean).map((each) => {
    const name = each.aligned ? "aligned" : "plain";
    const text = new TokenText(`tokens of the ${name} answer`, each, (index, told) => {
      if (index === null) return;
      detail.show(each.tokens[index], each, index, each.tokens.length, told);
    });
    text.append(each.tokens);
    if (beside && at !== null && text.elements[at]) {
      text.elements[at].classList.add("parts");
      text.elements[at].title = "here the answers part";
    }
    return { each, name, text };
  });
  const sides = texts.map(({ each, name, text }) =>
    el("section", { class: "side" }, el("h2", {}, `${beside ? "" : "Answer, "}${name}`), text.root, ending(each)),
  );
  const filter = legend(
    texts.flatMap(({ each }) => (each.aligned || !beside ? each.tokens : [])),
    answer.aligned,
    (kinds) => texts.forEach(({ each, text }) => each.aligned === answer.aligned && text.only(kinds)),
  );
  shown.replaceChildren(
    el("p", { class: "soft" }, settings(answer)),
    prompt(answer),
    filter,
    el("p", { class: "parting" }, partingText(answer, beside, at)),
    el("div", { class: sides.length > 1 ? "sides two" : "sides" }, ...sides),
  );
  ranks.replaceChildren(...(answer.aligned ? histogram(answer) : []));
}

function settings(answer) {
  if (!answer.aligned) return "The LLM alone, no agent.";
  const mix = Object.entries(answer.agents).map(([name, part]) => (part === 1 ? name : `${given(part)} × ${name}`));
  const order = answer.order === "ranked" ? "" : `, order ${answer.order}`;
  return (
    `${mix.length > 1 ? "Agents" : "Agent"} ${mix.join(" + ")}, threshold ${given(answer.threshold)}, ` +
    `strategy ${answer.strategy}${order}, fallback ${answer.fallback}.`
  );
}

function prompt(answer) {
  const turns = answer.prompt.map(({ role, content }) =>
    el("div", { class: "turn" }, el("span", { class: "role" }, role), el("div", { class: "said", dir: "auto" }, ...visible(content))),
  );
  const last = turns.pop();
  const before = turns.length ? el("details", {}, el("summary", {}, `${turns.length} messages before`), ...turns) : null;
  return el("section", { class: "prompt", "aria-label": "prompt" }, before, last);
}

function ending(answer) {
  const how = { stop: "It ended by itself, or at a stop text.", length: "It was cut off at the most tokens allowed." };
  const end = answer.finish_reason === null ? "The trace breaks off here." : how[answer.finish_reason] ?? "";
  return el("p", { class: "soft" }, `${answer.tokens.length} tokens. ${end}`);
}

function partingText(answer, beside, at) {
  if (!answer.aligned) return "";
  if (!beside) {
    const where = at < 0 ? "Every token is the LLM's first choice" : `Up to token ${at} it is plain decoding's, token by token`;
    return `${where}. mara-run --trace FILE --beside-plain puts the plain answer beside it.`;
  }
  if (at === null) return "Both answers have the same tokens.";
  const rest = (each) => quoted(each.tokens.slice(at, at + 6).map((token) => token.piece).join("")) || "the end";
  return `The answers part at token ${at + 1}: ${rest(answer)} … instead of ${rest(beside)} …`;
}

/** How often the candidate of each rank was accepted. */
function histogram(answer) {
  const counts = new Map();
  let forced = 0;
  for (const token of answer.tokens) {
    const kind = kindOf(token, true);
    if (kind === "forced") forced++;
    else if (kind !== "only") counts.set(token.rank, (counts.get(token.rank) ?? 0) + 1);
  }
  const rows = [...counts].sort(([a], [b]) => a - b).map(([rank, n]) => [`rank ${rank}`, n, rank === 1 ? "first" : "changed"]);
  if (forced) rows.push(["all rejected", forced, "forced"]);
  const decisions = rows.reduce((sum, [, n]) => sum + n, 0);
  const most = Math.max(...rows.map(([, n]) => n));
  const heading = el("h2", {}, "Accepted ranks");
  if (!decisions) return [heading, el("p", {}, "No position had more than one candidate: there was nothing to decide.")];
  const lines = rows.map(([name, n, kind]) => {
    const bar = el("span", { class: `column ${kind}` });
    bar.style.setProperty("--share", n / most);
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, name),
      el("td", {}, n),
      el("td", {}, `${((100 * n) / decisions).toFixed(0)} %`),
      el("td", { class: "wide" }, bar),
    );
  });
  const titles = ["accepted", "times", "share", ""].map((text) => el(text ? "th" : "td", text ? { scope: "col" } : {}, text));
  const others = answer.tokens.length - decisions;
  return [
    heading,
    el("table", {}, el("thead", {}, el("tr", {}, ...titles)), el("tbody", {}, ...lines)),
    el("p", { class: "soft" }, `${decisions} decisions; at ${others} more positions there was one candidate only.`),
  ];
}

const ranks = el("section", { class: "ranks" });
page.replaceChildren();
if (main.length > 1) page.append(el("p", { class: "which" }, el("label", { for: "which" }, "Answer "), chooser));
page.append(el("div", { class: "layout" }, shown, detail.root, ranks));
draw(main[0]);
