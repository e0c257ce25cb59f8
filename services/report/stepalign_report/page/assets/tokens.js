// The token view: what a context does to each token of a rollout.
//
// A_t = log p(token | question, context) − log p(token | question), in nats: below zero the context says "change it".

const OPENING_TAG = /<(?:step_\d+|answer)>/g;
const CLIPS = [5, 10, 20];

function showTokens(section, data) {
  const runs = data.runs.filter((run) => run.tokens.length);
  const missing = data.runs.filter((run) => !run.tokens.length);
  if (missing.length) section.append(withoutTokens(missing, data.runs.length));
  if (!runs.length) return;
  const state = { run: runs[0], row: null, contexts: [], clip: 10, token: 0, views: [] };
  const parts = {
    controls: el("div", { class: "controls" }),
    list: el("fieldset", { class: "rollouts" }),
    panel: el("div", { class: "panel" }),
  };
  section.append(
    el(
      "p",
      {},
      "How the teacher, which sees a context, would change the probability of each token that the student wrote: ",
      "the advantage A",
      el("sub", {}, "t"),
      " = log p teacher − log p student, in nats. Hover a token, or focus one and move with the arrow keys.",
    ),
    parts.controls,
    el("div", { class: "viewer" }, parts.list, parts.panel),
  );
  chooseRun(state, parts, data, runs, runs[0]);
}

function withoutTokens(missing, count) {
  const which =
    count === 1 ? "This run has" : `${missing.length} of these ${count} runs ${missing.length === 1 ? "has" : "have"}`;
  const setting = el("code", {}, "trainer.token_view");
  return el(
    "p",
    { class: "notice" },
    `${which} no token data (tokens.jsonl). `,
    setting,
    " is how many rollouts of the first and of the last update a run keeps for this view: ",
    "12 by default, none with 0.",
  );
}

function chooseRun(state, parts, data, runs, run) {
  const steps = [...new Set(run.tokens.map((row) => row.step))].sort((a, b) => a - b);
  state.run = run;
  const label = (one) => `${one.name} (${data.arms[one.arm]}, seed ${one.seed})`;
  const runChoices = runs.map((one, index) => ({ value: String(index), label: label(one) }));
  const controls = [
    runs.length > 1
      ? dropdown(
          "Run",
          runChoices,
          String(runs.indexOf(run)),
          (value) => chooseRun(state, parts, data, runs, runs[value]),
          { id: "token-run" },
        )
      : null,
    dropdown(
      "Snapshot",
      steps.map((step) => ({ value: String(step), label: `update ${step}` })),
      String(steps[0]),
      (value) => chooseStep(state, parts, Number(value)),
      { id: "token-step" },
    ),
    dropdown(
      "Colour range",
      CLIPS.map((clip) => ({ value: String(clip), label: `±${clip} nats` })),
      String(state.clip),
      (value) => chooseClip(state, Number(value)),
      { id: "token-clip" },
    ),
  ];
  parts.controls.replaceChildren(...controls.filter(Boolean));
  chooseStep(state, parts, steps[0]);
}

/** Show a snapshot's rollouts, and of them the one whose first error is nearest to its middle. */
function chooseStep(state, parts, step) {
  const rows = state.run.tokens.filter((row) => row.step === step);
  const offMiddle = (row) =>
    row.first_error_token === null ? 1 : Math.abs(row.first_error_token / row.tokens.length - 0.5);
  const chosen = rows.reduce((best, row) => (offMiddle(row) < offMiddle(best) ? row : best));
  const options = rows.map((row) => rolloutOption(row, row === chosen, () => chooseRollout(state, parts, row)));
  parts.list.replaceChildren(el("legend", {}, "Rollouts"), el("div", { class: "rollout-list" }, ...options));
  chooseRollout(state, parts, chosen);
}

function rolloutOption(row, checked, onChange) {
  const input = el("input", { type: "radio", name: "rollout", checked, value: row.rollout_id });
  input.addEventListener("change", onChange);
  const verdict = row.verdict === null ? null : el("span", { class: "badge" }, words(row.verdict));
  const graded = row.correct === null ? "not graded" : row.correct ? "✓ right" : "✗ wrong";
  const mark = el("span", { class: row.correct === null ? "" : row.correct ? "right" : "wrong" }, graded);
  return el(
    "label",
    { class: "rollout" },
    input,
    el("span", { class: "question" }, row.problem.question),
    el("span", { class: "notes" }, mark, verdict, el("span", {}, errorText(row))),
  );
}

function errorText(row) {
  return row.first_error_token === null
    ? `no error known, ${row.tokens.length} tokens`
    : `error at ${row.first_error_token} of ${row.tokens.length}`;
}

function chooseRollout(state, parts, row) {
  const kinds = Object.keys(row.contexts);
  const preferred = [...["critique", "reference"].filter((kind) => kinds.includes(kind)), ...kinds];
  const kept = state.contexts.filter((kind) => kinds.includes(kind));
  state.row = row;
  state.contexts = [...new Set([...kept, ...preferred])].slice(0, Math.min(2, kinds.length));
  if (kept.length === 2) state.contexts = kept;
  state.token = row.first_error_token ?? 0;
  drawPanel(state, parts);
}

function drawPanel(state, parts) {
  const sides = el("div", { class: "sides" });
  const readout = el("div", { class: "readout" });
  state.readout = readout;
  parts.panel.replaceChildren(problemOf(state.row), readout, sides, legendOf(state));
  state.panel = parts.panel;
  state.views = state.contexts.map((_, index) => drawSide(sides, state, index));
  chooseClip(state, state.clip);
  activate(state, state.token);
}

function problemOf(row) {
  const { question, answer, reference_solution: reference } = row.problem;
  const pairs = [["Problem", question], ["Answer", answer], reference ? ["Reference", reference] : null];
  const ended = row.finish_reason === "length" ? "The rollout was cut at its token budget." : "";
  return el(
    "div",
    { class: "problem" },
    el("dl", {}, ...pairs.filter(Boolean).map(([term, text]) => el("div", {}, el("dt", {}, term), el("dd", {}, text)))),
    ended ? el("p", { class: "small" }, ended) : null,
  );
}

/** One context: its choice, the coloured tokens, the chart, the context itself. */
function drawSide(sides, state, index) {
  const kind = state.contexts[index];
  const { row } = state;
  const kinds = Object.keys(row.contexts).map((value) => ({ value, label: words(value) }));
  const side = el("section", { class: "side", "aria-label": `${index ? "Right" : "Left"}: ${words(kind)}` });
  const list = el("div", {
    class: "tokens",
    role: "listbox",
    "aria-label": `Tokens under the context ${words(kind)}`,
    "aria-orientation": "horizontal",
  });
  const spans = drawTokens(list, row, kind);
  const figureHost = el("figure", { class: "advantage" }, el("figcaption", {}, "Advantage by token"));
  const text = row.contexts[kind].text;
  side.append(
    dropdown(
      index ? "Right context" : "Left context",
      kinds,
      kind,
      (value) => changeContext(sides, state, index, value),
      { class: "context" },
    ),
    list,
    figureHost,
    el("details", {}, el("summary", {}, "What the teacher saw"), el("pre", {}, text === "" ? "(nothing)" : text)),
  );
  sides.append(side);
  const chart = lineChart(figureHost, advantageSpec(state, kind));
  listenToTokens(list, spans, state);
  return { kind, side, spans, chart };
}

/** Both sides are drawn anew: they share the scale of their charts. */
function changeContext(sides, state, index, kind) {
  state.contexts[index] = kind;
  sides.replaceChildren();
  state.views = state.contexts.map((_, each) => drawSide(sides, state, each));
  chooseClip(state, state.clip);
  activate(state, state.token);
  state.views[index].side.querySelector("select").focus();
}

function advantageSpec(state, kind) {
  const { row } = state;
  const values = row.contexts[kind].advantage;
  const known = values.filter((value) => value !== null);
  const shared = state.contexts.flatMap((one) => row.contexts[one].advantage).filter((value) => value !== null);
  const error = row.first_error_token;
  const outside = row.in_scope < row.tokens.length;
  const at = error === null ? "" : ` First error at token ${error}, advantage ${figure(values[error], 2)}.`;
  return {
    title: `Advantage by token under the context ${words(kind)}`,
    description: `Lowest ${figure(Math.min(...known), 2)}, highest ${figure(Math.max(...known), 2)} nats.${at}`,
    height: 220,
    xLabel: "token",
    yLabel: "advantage, nats",
    xDomain: [0, Math.max(1, row.tokens.length - 1)],
    yDomain: roundDomain([...shared, -1, 1]),
    zero: true,
    rules: error === null ? [] : [{ x: error, label: "first error" }],
    shade: outside ? { from: Math.max(0, row.in_scope - 0.5) } : null,
    series: [{ colour: "advantage-line", bare: true, points: values.map((value, index) => [index, value]) }],
    onPoint: (index) => index !== null && activate(state, index),
  };
}

/** Indices of the tokens by line: an opening tag begins one, in whatever tokens it is written. */
function stepLines(tokens) {
  const owner = tokens.flatMap((token, index) => Array(token.length).fill(index));
  const begins = new Set([...tokens.join("").matchAll(OPENING_TAG)].map((found) => owner[found.index]));
  const lines = [[]];
  tokens.forEach((_, index) => {
    if (begins.has(index) && lines.at(-1).length) lines.push([]);
    lines.at(-1).push(index);
  });
  return lines;
}

function drawTokens(list, row, kind) {
  const spans = [];
  for (const indices of stepLines(row.tokens)) {
    const line = el("div", { class: "token-line", role: "group", "aria-label": row.tokens[indices[0]].trim() });
    for (const index of indices) {
      spans[index] = tokenSpan(row, kind, index);
      if (/^ /.test(row.tokens[index]) && index !== indices[0]) line.append(" ");
      if (index === row.first_error_token)
        line.append(el("span", { class: "flag", "aria-hidden": "true" }, "first error ▸"), " ");
      line.append(spans[index]);
    }
    list.append(line);
  }
  return spans;
}

function shownText(row, index) {
  const text = row.tokens[index];
  if (text === "") return index === row.tokens.length - 1 ? "⟨end⟩" : "⟨⟩";
  return text
    .replace(/^ (?=.)/s, "")
    .replaceAll("\n", "↵\n")
    .replaceAll("\t", "⇥");
}

/** log p of the teacher; null where a part of it is not known. */
function teacherOf(row, kind, index) {
  const parts = [row.logprob[index], row.contexts[kind].advantage[index]];
  return parts.includes(null) ? null : parts[0] + parts[1];
}

function tokenSpan(row, kind, index) {
  const { advantage, kl } = row.contexts[kind];
  const isError = index === row.first_error_token;
  const outside = index >= row.in_scope;
  const classes = [
    "token",
    advantage[index] < 0 ? "negative" : "positive",
    isError && "first-error",
    outside && "outside",
    row.tokens[index] === "" && "empty",
  ];
  const said = [
    `token ${index}, ${shownText(row, index)}`,
    `advantage ${figure(advantage[index], 2)}`,
    `log p student ${figure(row.logprob[index], 2)}`,
    `log p teacher ${figure(teacherOf(row, kind, index), 2)}`,
    `KL ${figure(kl[index], 2)}`,
    isError && "first error",
    outside && "out of scope",
  ];
  return el(
    "span",
    {
      class: classes.filter(Boolean).join(" "),
      role: "option",
      tabindex: "-1",
      "data-index": String(index),
      "data-advantage": String(advantage[index] ?? 0),
      "aria-label": said.filter(Boolean).join(", "),
    },
    shownText(row, index),
  );
}

function listenToTokens(list, spans, state) {
  const indexOf = (event) => event.target.closest?.(".token")?.dataset.index;
  list.addEventListener("pointerover", (event) => indexOf(event) && activate(state, Number(indexOf(event))));
  list.addEventListener("focusin", (event) => indexOf(event) && activate(state, Number(indexOf(event))));
  list.addEventListener("click", (event) => indexOf(event) && spans[indexOf(event)].focus());
  list.addEventListener("keydown", (event) => {
    const next = moved(event.key, Number(indexOf(event)), state.row.tokens);
    if (next === null) return;
    event.preventDefault();
    spans[next].focus();
  });
}

/** The token that a key leads to: left and right by one, up and down by a line; null for other keys. */
function moved(key, index, tokens) {
  const last = tokens.length - 1;
  if (key === "Home") return 0;
  if (key === "End") return last;
  if (key === "ArrowLeft") return Math.max(0, index - 1);
  if (key === "ArrowRight") return Math.min(last, index + 1);
  if (key !== "ArrowUp" && key !== "ArrowDown") return null;
  const lines = stepLines(tokens);
  const at = lines.findIndex((line) => line.includes(index));
  const target = lines[at + (key === "ArrowUp" ? -1 : 1)];
  return target === undefined ? index : target[Math.min(lines[at].indexOf(index), target.length - 1)];
}

/** Mark a token on both sides and in both charts, and read its values out. */
function activate(state, index) {
  for (const { spans, chart } of state.views) {
    const before = spans[state.token];
    before.classList.remove("active");
    before.setAttribute("tabindex", "-1");
    before.removeAttribute("aria-selected");
    spans[index].classList.add("active");
    spans[index].setAttribute("tabindex", "0");
    spans[index].setAttribute("aria-selected", "true");
    chart.show(index);
    reveal(spans[index]);
  }
  state.token = index;
  state.readout.replaceChildren(...readoutOf(state));
}

/** Scroll a long list of tokens, and nothing else, so that a token is in it. */
function reveal(span) {
  const list = span.closest(".tokens");
  const line = span.offsetTop - list.offsetTop;
  const hidden = line < list.scrollTop || line + span.offsetHeight > list.scrollTop + list.clientHeight;
  if (hidden) list.scrollTop = line - list.clientHeight / 2;
}

function readoutOf(state) {
  const { row, token } = state;
  const notes = [token === row.first_error_token && "first error", token >= row.in_scope && "out of scope"].filter(
    Boolean,
  );
  const values = [
    ["Advantage", (kind) => row.contexts[kind].advantage[token], "advantage"],
    ["log p teacher", (kind) => teacherOf(row, kind, token), "teacher"],
    ["KL", (kind) => row.contexts[kind].kl[token], "kl"],
  ];
  const headings = ["Context", ...values.map(([name]) => name)].map((name, at) =>
    el("th", { scope: "col", class: at ? "number" : null }, name),
  );
  const rows = state.contexts.map((kind) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, words(kind)),
      ...values.map(([, of, name]) => el("td", { class: "number", "data-value": name }, figure(of(kind), 3))),
    ),
  );
  return [
    el(
      "p",
      {},
      el("span", { class: "small" }, `token ${token} of ${row.tokens.length} `),
      el("code", { class: "current" }, shownText(row, token)),
      el("span", { class: "small" }, " log p student "),
      el("span", { class: "value", "data-value": "student" }, figure(row.logprob[token], 3)),
      ...notes.map((note) => el("span", { class: "badge" }, note)),
    ),
    el(
      "table",
      {},
      el("caption", { class: "hidden" }, `Values of token ${token}`),
      el("thead", {}, el("tr", {}, ...headings)),
      el("tbody", {}, ...rows),
    ),
  ];
}

/** How much of the full colour a value gets: by the square root, so that small values show; full from the clip on. */
function shareOf(value, clip) {
  return `${(100 * Math.sqrt(Math.min(1, Math.abs(value) / clip))).toFixed(1)}%`;
}

function chooseClip(state, clip) {
  state.clip = clip;
  for (const { spans } of state.views) {
    for (const span of spans) span.style.setProperty("--share", shareOf(Number(span.dataset.advantage), clip));
  }
  state.panel.lastChild.replaceWith(legendOf(state));
}

function legendOf({ clip }) {
  const sizes = [1, 0.5, 0.2, 0.05].map((part) => part * clip);
  const values = [...sizes.map((size) => -size), 0, ...sizes.toReversed()];
  const swatches = values.map((value) => {
    const end = Math.abs(value) === clip;
    const bound = end ? (value < 0 ? "≤ " : "≥ ") : "";
    const text = `${bound}${value > 0 ? "+" : ""}${figure(value, Number.isInteger(value) ? 0 : 2)}`;
    return el("span", { class: `token ${value < 0 ? "negative" : "positive"}`, "--share": shareOf(value, clip) }, text);
  });
  return el(
    "div",
    { class: "token-legend" },
    el("p", {}, el("span", { class: "small" }, "Change it "), ...swatches, el("span", { class: "small" }, " Keep it")),
    el(
      "p",
      { class: "small" },
      el("span", { class: "flag" }, "first error ▸"),
      el("span", { class: "token first-error" }, "7"),
      " first token that is wrong · ",
      el("span", { class: "token outside" }, "7"),
      " out of scope: carries no loss in this run, grey in the chart · ",
      `colours by the square root of the advantage, full from ±${clip} nats on`,
    ),
  );
}
