// The token view: the effect of a context on each token of a rollout.
//
// A_t = log p(token | question, context) − log p(token | question), in nats: below zero the context says "change it".

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

/** Show a snapshot's rollouts, and of them the one with its first error nearest to its middle. */
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

/** Indices of the tokens by line: an opening tag begins one, however it is tokenized. */
