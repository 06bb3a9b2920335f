"use strict";
// Texts of documents and candidates are untrusted: they reach the page through textContent only.
const PAGE = 20;
const byId = (id) => document.getElementById(id);
const parse = (id) => JSON.parse(byId(id).textContent);

function make(tag, classes, ...children) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  node.append(...children.filter((child) => child !== null));
  return node;
}
const shown = (value) => (value === null ? "none" : value.toPrecision(4).replace("-", "−"));

// ---- readout under the pointer
function nearest(xs, ys, x) {
  let best = -1;
  xs.forEach((value, i) => {
    if (ys[i] !== null && (best < 0 || Math.abs(value - x) < Math.abs(xs[best] - x))) best = i;
  });
  return best;
}
function attachReadout(figure, chart) {
  const svg = figure.querySelector("svg.plot"), note = figure.querySelector(".note");
  const cross = document.createElementNS(svg.namespaceURI, "line");
  for (const [key, value] of [["class", "cross"], ["y1", "0"], ["y2", "100%"], ["visibility", "hidden"]])
    cross.setAttribute(key, value);
  svg.append(cross);
  const leave = () => {
    cross.setAttribute("visibility", "hidden");
    note.textContent = note.dataset.note;
  };
  figure.querySelector(".area").addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width;
    if (at < -0.02 || at > 1.02 || chart.high === chart.low) return leave();
    const step = chart.low + at * (chart.high - chart.low);
    const first = chart.lines[0], x = first.x[nearest(first.x, first.y, step)];
    const place = (100 * (x - chart.low)) / (chart.high - chart.low) + "%";
    cross.setAttribute("x1", place);
    cross.setAttribute("x2", place);
    cross.setAttribute("visibility", "visible");
    note.textContent = `step ${x}: ` + chart.lines
      .map((line) => `${line.label} ${shown(line.y[nearest(line.x, line.y, x)] ?? null)}`).join(", ");
  });
  figure.querySelector(".area").addEventListener("pointerleave", leave);
}
const charts = parse("chart-data");
document.querySelectorAll("figure[data-chart]").forEach((f) => attachReadout(f, charts[f.dataset.chart]));

// ---- pool browser
const { runs, pools } = parse("data");
const state = { limit: PAGE };

const rewardOf = (candidate) => (candidate.reward === null ? -Infinity : candidate.reward);
const bestOf = (pool) => pool.candidates.reduce((a, b) => (rewardOf(b) > rewardOf(a) ? b : a));
const CONDITIONS = {
  "rollout-best": (pool) => bestOf(pool).source === "rollout" && bestOf(pool).reward !== null,
  "rewrite-best": (pool) => bestOf(pool).source === "rewrite" && bestOf(pool).reward !== null,
  "rollout-wins": (pool) => {
    const suffix = pool.candidates.find((c) => c.source === "suffix" && c.reward !== null);
    return suffix !== undefined
      && pool.candidates.some((c) => c.source === "rollout" && rewardOf(c) > suffix.reward);
  },
  missing: (pool) => pool.missing > 0,
  skipped: (pool) => pool.skipped,
};

function readFilters() {
  const value = (id) => (byId(id) ? byId(id).value.trim() : "");
  const limit = (id, otherwise) => (value(id) === "" ? otherwise : Number(value(id)));
  return {
    text: value("f-text").toLowerCase(), run: value("f-run"), source: value("f-source"),
    where: value("f-where"),
    steps: [limit("f-step-low", -Infinity), limit("f-step-high", Infinity)],
    rewards: [limit("f-reward-low", -Infinity), limit("f-reward-high", Infinity)],
  };
}
function wanted(candidate, filter) {
  const bounded = filter.rewards.some(Number.isFinite);
  return (filter.source === "" || candidate.source === filter.source)
    && (!bounded || (candidate.reward !== null
      && candidate.reward >= filter.rewards[0] && candidate.reward <= filter.rewards[1]));
}
function matches(pool, filter) {
  return (filter.run === "" || pool.run === Number(filter.run))
    && pool.step >= filter.steps[0] && pool.step <= filter.steps[1]
    && pool.candidates.some((candidate) => wanted(candidate, filter))
    && (filter.where === "" || CONDITIONS[filter.where](pool))
    && (filter.text === "" || [pool.prefix, ...pool.candidates.map((c) => c.text)]
      .some((text) => text.toLowerCase().includes(filter.text)));
}

function highlighted(text, needle) {
  const fragment = document.createDocumentFragment();
  const lower = text.toLowerCase();
  let from = 0;
  for (let at = needle ? lower.indexOf(needle) : -1; at >= 0; at = lower.indexOf(needle, from)) {
    fragment.append(text.slice(from, at), make("mark", "", text.slice(at, at + needle.length)));
    from = at + needle.length;
  }
  fragment.append(text.slice(from));
  return fragment;
}
function candidateCard(candidate, index, range, needle) {
  const sign = { chosen: "✓ ", target: "✓ ", rejected: "✕ " };
  const roles = candidate.roles.map((role) => (sign[role] ?? "") + role).join(", ");
  const bar = make("div", "bar");
  if (candidate.reward !== null)
    bar.style.width = `${(100 * (candidate.reward - range[0])) / (range[1] - range[0] || 1)}%`;
  const made = candidate.version >= 0 ? `, policy ${candidate.version}` : "";
  const criteria = Object.entries(candidate.criteria);
  return make("article", `candidate ${candidate.roles.join(" ")}`,
    make("div", "head",
      make("span", `source ${candidate.source}`, candidate.source),
      make("b", "", candidate.reward === null ? "no reward" : shown(candidate.reward)),
      roles ? make("span", "role-name", roles) : null,
      ...criteria.map(([name, score]) => make("span", "", `${name} ${shown(score)}`)),
      make("span", "", `#${index}, ${candidate.tokens} tokens, ${candidate.finish}${made}`)),
    candidate.reward === null ? null : bar,
    make("div", "text", highlighted(candidate.text.replace(/^ +/, ""), needle)),
    candidate.hidden ? make("p", "small", `${candidate.hidden} more characters are not on this page`) : null);
}
function replies(pool) {
  const items = pool.replies.map((r) => make("li", "",
    `${r.criterion}, #${r.candidate}${r.opponent >= 0 ? ` against #${r.opponent}` : ""}: `
    + `${r.score === null ? "no usable verdict" : shown(r.score)}. ${r.reply}`));
  return items.length
    ? make("details", "replies", make("summary", "", "What the judge said"), make("ul", "", ...items)) : null;
}
function detail(pool, filter) {
  const rewards = pool.candidates.map((c) => c.reward).filter((reward) => reward !== null);
  const range = [Math.min(...rewards), Math.max(...rewards)];
  const order = pool.candidates.map((candidate, index) => ({ candidate, index }))
    .filter(({ candidate }) => filter.source === "" || candidate.source === filter.source)
    .sort((a, b) => rewardOf(b.candidate) - rewardOf(a.candidate) || a.index - b.index);
  const facts = [`pools/${pool.file}, position ${pool.position}`, `sample ${pool.sample}`,
    `document ${pool.document}, cut at token ${pool.cut}`,
    `chance of a rollout ${shown(pool.chance)}`, `${pool.missing} verdicts missing`];
  if (pool.skipped) facts.push("skipped: no contrast");
  return make("div", "detail",
    make("div", "prefix text",
      pool.hidden ? make("span", "small", `(${pool.hidden} characters before) … `) : null,
      highlighted(pool.prefix.replace(/^ +/, ""), filter.text)),
    make("p", "small", facts.join(" · ")),
    ...order.map(({ candidate, index }) => candidateCard(candidate, index, range, filter.text)),
    replies(pool));
}
function poolItem(pool, filter) {
  const best = bestOf(pool);
  const name = runs.length > 1 ? `${runs[pool.run]}, ` : "";
  const button = make("button", "",
    make("span", "where", `${name}step ${pool.step}, pool ${pool.position}`),
    make("span", "snippet", "… " + pool.prefix.slice(-100).replace(/^\S*\s/, "").replace(/\s+/g, " ")),
    make("span", "best", best.reward === null ? "no reward" : `best: ${best.source} ${shown(best.reward)}`));
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  const item = make("li", "pool", button);
  button.addEventListener("click", () => {
    const open = item.querySelector(".detail");
    if (open) open.remove();
    else item.append(detail(pool, filter));
    button.setAttribute("aria-expanded", String(!open));
  });
  return item;
}
function refresh() {
  const filter = readFilters();
  const found = pools.filter((pool) => matches(pool, filter));
  byId("pool-count").textContent = `${found.length} of ${pools.length} pools match`;
  byId("pool-list").replaceChildren(...found.slice(0, state.limit).map((pool) => poolItem(pool, filter)));
  byId("pool-more").hidden = found.length <= state.limit;
}
if (pools.length) {
  document.querySelectorAll(".filters input, .filters select").forEach((field) =>
    field.addEventListener("input", () => { state.limit = PAGE; refresh(); }));
  byId("f-clear").addEventListener("click", () => {
    document.querySelectorAll(".filters input, .filters select").forEach((field) => { field.value = ""; });
    state.limit = PAGE;
    refresh();
  });
  byId("pool-more").addEventListener("click", () => { state.limit += PAGE; refresh(); });
  refresh();
}
