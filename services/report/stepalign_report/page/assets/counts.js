// Outcomes of the critiques and of the rollouts: a bar for each run.

const VERDICTS = ["correct", "unjustified", "incomplete", "incorrect"];

function showCounts(section, data) {
  section.append(el("h3", {}, "Critiques by outcome"));
  if (data.runs.some((run) => total(run.critiques))) {
    section.append(
      el("p", {}, "Plain: valid critiques by verdict. Striped: refused, by reason."),
      ...barList(
        data,
        "Critiques by outcome",
        (run) => order(run.critiques, VERDICTS),
        (name) => !VERDICTS.includes(name),
      ),
    );
  } else {
    section.append(
      el("p", {}, data.runs.length > 1 ? "These runs asked for no critiques." : "This run asked for no critiques."),
    );
  }
  section.append(
    el("h3", {}, "Rollouts by outcome"),
    el("p", {}, "Plain: trained on, or not yet. Striped: not trained on, by reason."),
    ...barList(data, "Rollouts by outcome", rolloutCounts, (name) => name !== "trained" && name !== "pending"),
  );
}

function order(counts, first) {
  const names = [
    ...first,
    ...Object.keys(counts)
      .filter((name) => !first.includes(name))
      .sort(),
  ];
  return Object.fromEntries(names.filter((name) => counts[name]).map((name) => [name, counts[name]]));
}

function rolloutCounts(run) {
  const skipped = Object.entries(run.rollouts.skipped).map(([reason, count]) => [`skipped: ${reason}`, count]);
  const { trained, pending, stale, dead } = run.rollouts;
  return order({ trained, pending, ...Object.fromEntries(skipped), stale, dead }, ["trained", "pending"]);
}

/** Bars, their legend, and the same as a table. */
function barList(data, caption, countsOf, isRefused) {
  const counts = data.runs.map(countsOf);
  const names = [...new Set(counts.flatMap((each) => Object.keys(each)))];
  const plain = names.filter((name) => !isRefused(name));
  const refused = names.filter(isRefused);
  const classOf = (name) =>
    isRefused(name) ? `refused-${refused.indexOf(name) % 4}` : `kept-${plain.indexOf(name) % 4}`;
  const bars = data.runs.map((run, index) => bar(data, run, counts[index], classOf));
  const legend = names.map((name) =>
    el("span", { class: "legend-item" }, el("span", { class: `swatch ${classOf(name)}` }), words(name)),
  );
  const details = el(
    "details",
    { open: data.runs.length === 1 },
    el("summary", {}, "As a table"),
    countTable(data, caption, counts, names),
  );
  return [
    el("p", { class: "legend", "aria-hidden": "true" }, ...legend),
    el("div", { class: "bars", "aria-hidden": "true" }, ...bars),
    details,
  ];
}

function bar(data, run, counts, classOf) {
  const sum = total(counts);
  const parts = Object.entries(counts).map(([name, count]) => {
    const share = count / sum;
    const text = share > 0.12 ? `${figure(100 * share)} %` : "";
    return el(
      "span",
      { class: `part ${classOf(name)}`, "--share": String(share), title: `${words(name)}: ${whole(count)}` },
      el("span", {}, text),
    );
  });
  const label = data.runs.length > 1 ? el("span", { class: "bar-label" }, run.name) : null;
  const stack = sum ? el("span", { class: "stack" }, ...parts) : el("span", { class: "stack empty" }, "none");
  return el(
    "div",
    { class: data.runs.length > 1 ? "bar" : "bar single" },
    label,
    stack,
    el("span", { class: "bar-total value" }, whole(sum)),
  );
}

function shareText(counts, name) {
  return total(counts) ? `${figure((100 * (counts[name] ?? 0)) / total(counts))} %` : "–";
}

function countTable(data, caption, counts, names) {
  const rows = names.map((name) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, words(name)),
      ...counts.flatMap((each) => [
        el("td", { class: "number" }, whole(each[name] ?? 0)),
        el("td", { class: "number small" }, shareText(each, name)),
      ]),
    ),
  );
  const headings = data.runs.length > 1 ? data.runs.flatMap((run) => [run.name, ""]) : ["Count", "Share"];
  return table(caption, ["Outcome", ...headings], rows, { class: "counts" });
}
