// A critic, or two side by side, against people's labels of the first wrong step.

const QUALITIES = [
  { key: "f1", name: "F1 of the first error, %", digits: 1 },
  { key: "on_erroneous", name: "Accuracy on erroneous, %", digits: 1 },
  { key: "on_correct", name: "Accuracy on correct, %", digits: 1 },
  { key: "detected", name: "Erroneous called wrong, %", digits: 1 },
  { key: "place_accuracy", name: "Place right, if called wrong, %", digits: 1 },
  { key: "valid", name: "Valid critiques, %", digits: 1 },
  { key: "prompt_tokens", name: "Prompt tokens a critique", digits: 0 },
  { key: "completion_tokens", name: "Completion tokens a critique", digits: 0 },
  { key: "seconds", name: "Seconds a critique", digits: 2 },
];
const CALIBRATIONS = [
  { key: "ece", name: "ECE of p_wrong", digits: 3 },
  { key: "brier", name: "Brier score of p_wrong", digits: 3 },
];
const QUALITY_DIFFERENCES = [
  { key: "f1_difference", name: "F1, points", digits: 1, equal: 0 },
  { key: "f1_ratio", name: "F1, ratio A / B", digits: 2, equal: 1 },
  { key: "on_erroneous_difference", name: "Accuracy on erroneous, points", digits: 1, equal: 0 },
  { key: "on_correct_difference", name: "Accuracy on correct, points", digits: 1, equal: 0 },
  { key: "valid_difference", name: "Valid critiques, points", digits: 1, equal: 0 },
];

function showQuality(section, data) {
  const { quality } = data;
  const { critics, chosen, comparison } = quality;
  const level = Math.round(quality.bootstrap.level);
  const half = chosen.half === null ? "" : `, half ${chosen.half}`;
  const first = critics[0].figures;
  if (!data.runs.length) section.prepend(el("h1", {}, quality.data.name));
  section.append(
    el(
      "p",
      {},
      `${quality.data.name}${half}: ${whole(first.rows)} solutions of ${whole(first.questions)} questions, ` +
        `${whole(first.erroneous)} of them erroneous. With ${level} % bootstrap intervals over questions.`,
    ),
    el("ul", {}, ...critics.map((critic) => el("li", {}, criticText(critics, critic)))),
    qualityTable(critics),
    ...failureTable(critics),
    ...(comparison === null ? [] : comparisonOf(comparison)),
    ...reliability(critics),
    ...critics.flatMap((critic) => groupsOf(critics, critic)),
    ...quality.remarks.map((remark) => el("p", { class: "small" }, remark)),
  );
}

function prefix(critics, critic) {
  return critics.length > 1 ? `${critic.label}: ` : "";
}

function criticText(critics, critic) {
  const { model, backend, prompt_version } = critic.critic;
  const told = Object.entries(critic.told).map(([name, given]) => `${given ? "with" : "without"} ${words(name)}`);
  return `${prefix(critics, critic)}${model} (${backend}, ${prompt_version}), told the question, ${told.join(", ")}`;
}

function intervalCell(found, digits) {
  if (!found) return el("td", { class: "number" }, "–");
  const range = el("span", { class: "range" }, `${figure(found.low, digits)}–${figure(found.high, digits)}`);
  return el("td", { class: "number" }, el("span", { class: "value" }, figure(found.value, digits)), range);
}

function qualityTable(critics) {
  const headings = ["", ...critics.map((critic) => (critics.length > 1 ? critic.label : critic.critic.model))];
  const row = ({ name, digits }, of) =>
    el("tr", {}, el("th", { scope: "row" }, name), ...critics.map((critic) => intervalCell(of(critic), digits)));
  const calibrated = critics.some((critic) => critic.figures.calibration !== null);
  const rows = [
    ...QUALITIES.map((one) => row(one, (critic) => critic.figures[one.key])),
    ...(calibrated ? CALIBRATIONS : []).map((one) => row(one, (critic) => critic.figures.calibration?.[one.key])),
  ];
  return table("Against people's labels", headings, rows, { class: "results quality" });
}

function failureTable(critics) {
  const reasons = [...new Set(critics.flatMap((critic) => Object.keys(critic.figures.failures)))].sort();
  if (!reasons.length) return [];
  const rows = reasons.map((reason) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, words(reason)),
      ...critics.map((critic) => el("td", { class: "number" }, whole(critic.figures.failures[reason] ?? 0))),
    ),
  );
  const headings = ["Failure", ...critics.map((critic) => (critics.length > 1 ? critic.label : "Critiques"))];
  return [table("Failures, counted as wrong", headings, rows, { class: "results" })];
}

function comparisonOf(comparison) {
  const rows = QUALITY_DIFFERENCES.map(({ key, name, digits, equal }) => {
    const found = comparison[key];
    const apart = found && (found.low > equal || found.high < equal);
    const sign = (value) => (equal === 0 && value > 0 ? "+" : "") + figure(value, digits);
    const text = found ? `${sign(found.value)} (${sign(found.low)} to ${sign(found.high)})` : "–";
    const mark = el("span", {
      class: apart ? "apart" : "not-apart",
      role: "img",
      "aria-label": apart ? "apart from equal" : "not apart from equal",
    });
    return el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "number" }, mark, text));
  });
  return [
    el("h3", {}, "A beside B"),
    el(
      "p",
      {},
      `On the ${whole(comparison.rows)} solutions that both have answered, on the same draws of questions. ` +
        "A filled mark: the interval does not hold equality.",
    ),
    table("A beside B", ["", "A − B"], rows, { class: "results" }),
  ];
}

/** Observed share against stated probability, in percent; a calibrated critic follows the diagonal. */
function reliability(critics) {
  const shown = critics.filter((critic) => critic.figures.calibration !== null);
  if (!shown.length) return [];
  const series = shown.map((critic) => ({
    colour: colourOf(critics.indexOf(critic)),
    shape: shapeOf(critics.indexOf(critic)),
    label: critics.length > 1 ? critic.label : critic.critic.model,
    points: critic.figures.calibration.bins
      .filter((bin) => bin.steps)
      .map((bin) => [100 * bin.mean_p_wrong, 100 * bin.share_wrong]),
  }));
  const diagonal = { colour: "arm-base", thin: true, points: [[0, 0], [100, 100]] };
  const host = el("figure", { class: "reliability" });
  const description = series
    .map((one) => `${one.label}: ${one.points.map(([x, y]) => `${figure(x, 0)} → ${figure(y, 0)}`).join(", ")}`)
    .join("; ");
  lineChart(host, {
    title: "Reliability of p_wrong",
    description,
    height: 300,
    xLabel: "stated probability of a wrong step, %",
    yLabel: "share wrong, %",
    xDomain: [0, 100],
    yDomain: [0, 100],
    series: [diagonal, ...series],
    labels: true,
  });
  return [
    el("h3", {}, "Is its probability to be believed?"),
    el("p", {}, "Steps up to the first wrong one, in ten bins of p_wrong. A calibrated critic follows the thin line."),
    host,
    ...shown.map((critic) => binTable(critics, critic)),
  ];
}

function binTable(critics, critic) {
  const rows = critic.figures.calibration.bins.filter((bin) => bin.steps).map((bin) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, `${figure(bin.low)}–${figure(bin.high)}`),
      el("td", { class: "number" }, whole(bin.steps)),
      el("td", { class: "number" }, figure(bin.mean_p_wrong, 2)),
      el("td", { class: "number" }, figure(bin.share_wrong, 2)),
    ),
  );
  const caption = `${prefix(critics, critic)}reliability of p_wrong`;
  const content = table(caption, ["p_wrong", "Steps", "Mean", "Share wrong"], rows, { class: "results" });
  return el("details", {}, el("summary", {}, `${prefix(critics, critic)}as a table`), content);
}

function groupsOf(critics, critic) {
  const groups = [
    ["by_steps", "by number of steps"],
    ["by_generator", "by the solution's author"],
  ];
  return groups
    .filter(([key]) => critic.figures[key].length)
    .map(([key, title]) => groupTable(`${prefix(critics, critic)}${title}`, critic.figures[key]));
}

function groupTable(caption, groups) {
  const rows = groups.map((group) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, group.name),
      el("td", { class: "number" }, whole(group.rows)),
      ...["f1", "on_erroneous", "on_correct", "valid"].map((key) => intervalCell(group[key], 1)),
    ),
  );
  const headings = ["", "Solutions", "F1", "On erroneous", "On correct", "Valid"];
  return table(caption, headings, rows, { class: "results groups" });
}
