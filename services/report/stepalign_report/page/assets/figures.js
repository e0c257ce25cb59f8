// The head of the page and its result tables.

const MEASURES = [
  { key: "avg", name: "Avg", says: "share of right samples" },
  { key: "maj", name: "Maj", says: "share of problems whose most voted answer is right" },
  { key: "pass", name: "Pass", says: "share of problems with a right sample" },
  { key: "trace", name: "Trace", says: "share of samples in which every step is right" },
];

function measuresOf(data, rows) {
  return MEASURES.filter(({ key }) => rows.some((row) => row[key])).map((one) => ({
    ...one,
    label: `${one.name}@${data.samples}`,
  }));
}

function duration(seconds) {
  if (seconds < 100) return `${figure(seconds, 1)} s`;
  const minutes = Math.floor(seconds / 60);
  return `${whole(minutes)} min ${String(Math.round(seconds % 60)).padStart(2, "0")} s`;
}

function total(counts) {
  return Object.values(counts).reduce((sum, count) => sum + count, 0);
}

function conditionsOf(run) {
  const parts = [
    run.objective && words(run.objective),
    run.context && `context ${words(run.context)}`,
    run.scope && `scope ${words(run.scope)}`,
  ];
  return parts.filter(Boolean).join(" · ");
}

function showSummary(section, data) {
  const [first] = data.runs;
  const single = data.runs.length === 1;
  const seeds = [...new Set(data.runs.map((run) => run.seed))];
  section.append(
    el("h1", { id: "summary-heading" }, single ? first.name : `${data.runs.length} runs`),
    el("p", { class: "lead" }, single ? leadOfRun(data, first) : leadOfRuns(data, seeds)),
    ...alarms(data.runs),
    single ? facts(first) : runTable(data),
    el("p", { class: "small" }, `Versions: ${versions(data.runs)}`),
  );
  if (data.warnings.length) {
    const items = data.warnings.map((text) => el("li", {}, text));
    section.append(
      el(
        "div",
        { class: "notice" },
        el("p", {}, "These runs were not made on the same terms. Compare their figures with care."),
        el("ul", {}, ...items),
      ),
    );
  }
}

function leadOfRun(data, run) {
  const conditions = conditionsOf(run);
  const arm = `Arm ${data.arms[run.arm]}${conditions ? ` (${conditions})` : ""}`;
  return `${arm}, seed ${run.seed}, ${whole(run.steps)} updates.`;
}

function leadOfRuns(data, seeds) {
  const arms = data.arms.length === 1 ? "One arm" : `${data.arms.length} arms`;
  return `${arms}, ${seedNames(seeds)}.`;
}

/** Seeds by name, which are numbers: never alone, where they would read as a count. */
function seedNames(seeds) {
  if (!seeds.length) return "no common seed";
  return `${seeds.length === 1 ? "seed" : "seeds"} ${seeds.join(", ")}`;
}

function alarms(runs) {
  const raised = runs.flatMap((run) => Object.entries(run.alarms).map(([name, alarm]) => ({ run, name, alarm })));
  if (!raised.length) return [];
  const items = raised.map(({ run, name, alarm }) => {
    const where = runs.length > 1 ? `${run.name}: ` : "";
    const count = `${alarm.updates} ${alarm.updates === 1 ? "update" : "updates"}`;
    return el("li", {}, where, el("strong", {}, words(name)), `, first at step ${alarm.first_step}, in ${count}`);
  });
  return [
    el(
      "div",
      { class: "alarms" },
      el("h2", {}, `⚠ ${raised.length === 1 ? "Alarm" : "Alarms"}`),
      el("ul", {}, ...items),
    ),
  ];
}

function facts(run) {
  const skipped = total(run.rollouts.skipped);
  const pairs = [
    ["Seed", String(run.seed)],
    ["Updates", whole(run.steps)],
    ["Rollouts trained on", whole(run.rollouts.trained)],
    ["Skipped", whole(skipped)],
    ["Wall time", duration(run.wall_seconds)],
    ["Selected step", run.selected_step === null ? "–" : String(run.selected_step)],
  ];
  return el(
    "dl",
    { class: "facts" },
    ...pairs.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))),
  );
}

function runTable(data) {
  const headings = ["Run", ["Arm"], "Seed", "Updates", "Trained on", "Skipped", "Wall time", ["Alarms"]];
  const rows = data.runs.map((run) => {
    const names = Object.keys(run.alarms);
    const cells = [
      String(run.seed),
      whole(run.steps),
      whole(run.rollouts.trained),
      whole(total(run.rollouts.skipped)),
      duration(run.wall_seconds),
    ];
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, run.name),
      el("td", { title: conditionsOf(run) }, legendItem(run.arm, data.arms[run.arm])),
      ...cells.map((text) => el("td", { class: "number" }, text)),
      el("td", { class: names.length ? "alarm" : null }, names.length ? `⚠ ${names.map(words).join(", ")}` : "none"),
    );
  });
  return table("Runs on this page", headings, rows, { class: "runs" });
}

function versions(runs) {
  const all = {};
  for (const run of runs) {
    for (const [name, version] of Object.entries({ ...run.versions, threads: run.threads }))
      (all[name] ??= new Set()).add(version);
  }
  return Object.entries(all)
    .map(([name, found]) => `${name} ${[...found].join(" and ")}`)
    .join(", ");
}

function showResult(section, data) {
  if (!data.results.length) {
    section.append(
      el("p", {}, "The run had no evaluation problems: set data.validation and data.test to have results here."),
    );
    return;
  }
  const measures = measuresOf(data, data.results);
  const level = Math.round(data.resampling.level);
  const several = data.results.some((row) => row.kind === "seed");
  section.append(
    el(
      "p",
      {},
      `${data.problems.test} test problems, ${data.samples} samples each. ` +
        `The checkpoint was picked on ${data.problems.validation} validation problems. ` +
        `Percent, with ${level} % bootstrap intervals over ${several ? "seeds and problems" : "problems"}.`,
    ),
    dotPlots(data, measures),
    resultTable(data, measures),
    ...differences(data, measures),
  );
}

function rowLabel(data, row) {
  if (row.kind === "base") return "base";
  if (row.kind === "chance") return "chance";
  if (row.kind === "seed") return `seed ${row.seeds[0]}`;
  return data.arms[row.arm];
}

function dotPlots(data, measures) {
  const grid = el("div", { class: "multiples wide" });
  const rows = data.results.filter((row) => row.kind === "base" || row.kind === "arm");
  const chance = data.results.find((row) => row.kind === "chance");
  for (const { key, label, says } of measures) {
    const shown = rows
      .filter((row) => row[key])
      .map((row) => ({
        label: rowLabel(data, row),
        colour: row.kind === "base" ? "arm-base" : colourOf(row.arm),
        shape: row.kind === "base" ? "circle" : shapeOf(row.arm),
        ...row[key],
      }));
    const level = chance?.[key]?.value ?? null;
    const host = el("figure", {}, el("figcaption", {}, el("strong", {}, label), ` ${says}`));
    const description = shown.map((row) => `${row.label} ${figure(row.value)}`).join(", ");
    intervalPlot(host, { title: `${label} on the test problems`, description, rows: shown, chance: level });
    if (level !== null) host.append(el("p", { class: "small" }, `Dashed: chance, ${figure(level)}`));
    grid.append(host);
  }
  return grid;
}

function resultTable(data, measures) {
  const rows = data.results.map((row) => {
    const name = rowLabel(data, row);
    const notes = [
      row.kind !== "seed" && row.seeds.length > 1 && `mean of ${row.seeds.length} seeds`,
      row.step !== null && `step ${row.step}`,
    ];
    const note = el("span", { class: "small" }, notes.filter(Boolean).join(", "));
    const label = row.kind === "arm" ? legendItem(row.arm, name, note) : el("span", {}, name, note);
    return el(
      "tr",
      { class: `row-${row.kind}` },
      el("th", { scope: "row" }, label),
      ...measures.map(({ key }) => estimateCell(row[key])),
      el("td", { class: "number" }, figure(row.mean_tokens)),
    );
  });
  const headings = ["", ...measures.map((one) => one.label), "Mean tokens"];
  return table("Figures on the test problems", headings, rows, { class: "results" });
}

function estimateCell(value) {
  if (!value) return el("td", { class: "number" }, "–");
  const range =
    value.low === undefined ? null : el("span", { class: "range" }, `${figure(value.low)}–${figure(value.high)}`);
  return el("td", { class: "number" }, el("span", { class: "value" }, figure(value.value)), range);
}

function differences(data, measures) {
  if (!data.differences.length) {
    if (data.runs.length === 1) return [];
    const text = "This page shows no comparison. `stepalign compare` prints paired differences with intervals.";
    return [el("h3", {}, "Differences"), el("p", {}, text)];
  }
  const level = Math.round(data.resampling.level);
  const first = data.differences.filter((row) => row.headline);
  const others = data.differences.filter((row) => !row.headline);
  const says =
    `Each pair of arms on the same problems and seeds, in percentage points, with ${level} % intervals. ` +
    "A filled mark: the interval does not hold zero.";
  const rest =
    others.length && first.length
      ? [el("details", {}, el("summary", {}, "Every other pair"), differenceTable("Other pairs", others, measures))]
      : [];
  return [
    el("h3", {}, "Differences"),
    el("p", {}, says),
    differenceTable("Paired differences", first.length ? first : others, measures),
    ...rest,
    ...data.remarks.map((remark) => el("p", { class: "small" }, remark)),
  ];
}

function differenceTable(caption, pairs, measures) {
  const rows = pairs.map((pair) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, `${pair.a} − ${pair.b}`),
      ...measures.map(({ key }) => differenceCell(pair.metrics[key])),
      el("td", {}, seedNames(pair.seeds)),
    ),
  );
  return table(caption, ["Difference", ...measures.map((one) => one.label), ["Compared on"]], rows, {
    class: "results differences",
  });
}

function differenceCell(found) {
  if (!found || found.value === null) return el("td", { class: "number" }, "–");
  const mark = el("span", {
    class: found.apart ? "apart" : "not-apart",
    role: "img",
    "aria-label": found.apart ? "apart from zero" : "not apart from zero",
  });
  const range = el("span", { class: "range" }, `${signed(found.low)} to ${signed(found.high)}`);
  return el("td", { class: "number" }, mark, el("span", { class: "value" }, signed(found.value)), range);
}

function signed(value) {
  return value > 0 ? `+${figure(value)}` : figure(value);
}
