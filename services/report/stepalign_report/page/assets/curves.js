// The learning curve, and small charts of training's own records.

const TRAINING = [
  ["loss", "Loss", "nats a token"],
  ["entropy", "Entropy of the student", "nats"],
  ["advantage_at_error", "Advantage at the error", "nats"],
  ["advantage_correct", "Advantage, correct tokens", "nats"],
  ["signal_share", "Tokens with signal", "share in scope"],
  ["mean_tokens", "Length of rollouts", "tokens"],
  ["truncated", "Cut rollouts", "share"],
  ["grad_norm", "Gradient norm", ""],
  ["reward_mean", "Reward", "mean"],
  ["groups_without_signal", "Groups without a signal", ""],
  ["kl_to_base", "KL to the base", "nats a token"],
];

function showCurves(section, data) {
  const curves = data.curves.filter((curve) => curve.steps.length);
  if (!curves.length) {
    section.append(
      el("p", {}, "The run had no evaluation problems: set data.validation and data.test to have a curve here."),
    );
    return;
  }
  const measures = measuresOf(
    data,
    curves.map((curve) => Object.fromEntries(MEASURES.map(({ key }) => [key, curve[key].some(Boolean)]))),
  );
  const reading = el("p", { class: "reading", "aria-live": "polite" });
  const host = el("div", {
    class: "readable",
    tabindex: "0",
    role: "group",
    "aria-label": "Learning curve; left and right arrow keys read its values",
  });
  const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const state = { measure: measures[0], step: null };
  const chart = lineChart(host, curveSpec(data, curves, state.measure, read));

  function read(step) {
    state.step = step;
    chart.show(step);
    const when = step === null ? "Last step" : `Step ${step}`;
    reading.replaceChildren(el("strong", {}, when), ...curves.map((curve, index) => curveReading(curve, index, state)));
  }

  function choose(key) {
    state.measure = measures.find((one) => one.key === key);
    chart.draw(curveSpec(data, curves, state.measure, read));
    read(null);
  }

  host.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -steps.length, End: steps.length };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const at = (state.step === null ? steps.length - 1 : steps.indexOf(state.step)) + moves[event.key];
    read(steps[Math.max(0, Math.min(steps.length - 1, at))]);
  });
  host.addEventListener("blur", () => read(null));
  const level = Math.round(data.resampling.level);
  section.append(
    el(
      "p",
      {},
      `${data.problems.validation} validation problems, ${data.samples} samples each, by number of updates. ` +
        `Bands: ${level} % bootstrap intervals. A ring marks the checkpoint that validation selected.`,
    ),
    choice(
      "Measure",
      "measure",
      measures.map(({ key, label }) => ({ value: key, label })),
      choose,
    ),
    reading,
    host,
    curveTables(curves, measures),
  );
  read(null);
}

function curveSpec(data, curves, measure, onPoint) {
  const series = curves.map((curve, index) => ({
    colour: colourOf(index),
    shape: shapeOf(index),
    label: curve.label,
    points: curve.steps
      .map((step, at) => [step, curve[measure.key][at]?.value ?? null])
      .filter((point) => point[1] !== null),
    band: curve.steps
      .map((step, at) => [step, curve[measure.key][at]?.low, curve[measure.key][at]?.high])
      .filter((point) => point[1] !== undefined),
    selected: curve.selected.map((one) => one.step),
  }));
  const shown = series.filter((one) => one.points.length);
  const last = shown.map((one) => `${one.label} ends at ${figure(one.points.at(-1)[1])}`).join(", ");
  return {
    title: `${measure.label} on validation by number of updates`,
    description: `${last}.`,
    height: 340,
    xLabel: "updates",
    yLabel: `${measure.label}, %`,
    xDomain: [0, Math.max(...curves.map((curve) => curve.steps.at(-1)))],
    yDomain: [0, 100],
    labels: true,
    series: shown,
    onPoint,
  };
}

function curveReading(curve, index, state) {
  const values = curve[state.measure.key];
  const value = state.step === null ? values.at(-1) : values[curve.steps.indexOf(state.step)];
  const text = value ? `${figure(value.value)} (${figure(value.low)}–${figure(value.high)})` : "–";
  return legendItem(index, curve.label, el("span", { class: "value" }, text));
}

function curveTables(curves, measures) {
  const tables = curves.map((curve) => {
    const rows = curve.steps.map((step, at) => {
      const chosen = curve.selected.filter((one) => one.step === step).map((one) => one.seed);
      const note = chosen.length ? (curve.seeds.length > 1 ? `selected by seed ${chosen.join(", ")}` : "selected") : "";
      const cells = measures.map(({ key }) => estimateCell(curve[key][at]));
      return el("tr", {}, el("th", { scope: "row", class: "number" }, String(step)), ...cells, el("td", {}, note));
    });
    return table(`${curve.label}: validation`, ["Step", ...measures.map((one) => one.label), [""]], rows);
  });
  return el("details", {}, el("summary", {}, "The curve as a table"), ...tables);
}

function showTraining(section, data) {
  const shown = TRAINING.filter(([key]) => data.runs.some((run) => run.updates[key]?.some((value) => value !== null)));
  if (!shown.length) {
    section.append(el("p", {}, "There is no metrics.jsonl beside the report."));
    return;
  }
  const grid = el("div", { class: data.runs.length > data.arms.length ? "multiples crowded" : "multiples" });
  const charts = [];
  const show = (step) => charts.forEach((chart) => chart.show(step));
  for (const [key, title, unit] of shown) charts.push(trainingChart(grid, data, { key, title, unit }, show));
  section.append(
    el("p", {}, "Every update, from metrics.jsonl. Where a run has no value, as without a critique, there is no line."),
  );
  if (data.arms.length > 1)
    section.append(el("p", { class: "legend" }, ...data.arms.map((label, index) => legendItem(index, label))));
  section.append(grid);
  show(null);
}

/** One small chart. It shows the step under the pointer in all of them. */
function trainingChart(grid, data, { key, title, unit }, onPoint) {
  const series = data.runs
    .filter((run) => run.updates[key])
    .map((run) => ({
      run,
      colour: colourOf(run.arm),
      bare: true,
      points: run.updates.step.map((step, at) => [step, run.updates[key][at]]),
    }));
  const values = series.flatMap((one) => one.points.map((point) => point[1])).filter((value) => value !== null);
  const reading = el("span", { class: "value" });
  const host = el("figure", {}, el("figcaption", {}, el("strong", {}, title), unit ? ` ${unit}` : "", reading));
  const chart = lineChart(host, {
    title,
    description: `${unit ? `${unit}; ` : ""}from ${adaptive(Math.min(...values))} to ${adaptive(Math.max(...values))}.`,
    height: 150,
    xDomain: [0, Math.max(...series.flatMap((one) => one.points.map((point) => point[0])))],
    yDomain: roundDomain(values),
    zero: true,
    series,
    onPoint,
  });
  grid.append(host);
  return {
    show(step) {
      chart.show(step);
      reading.textContent =
        series.length === 1 ? readingAt(series[0].points, step) : step === null ? "" : `step ${step}`;
    },
  };
}

function readingAt(points, step) {
  const known = points.filter((point) => point[1] !== null);
  const found = step === null ? known.at(-1) : known.find((point) => point[0] === step);
  return found === undefined ? "–" : `${adaptive(found[1])} at step ${found[0]}`;
}
