// Line charts and interval plots as inline SVG. A chart is drawn anew when its place changes width, so that its text
// keeps its size.

const SHAPES = ["circle", "square", "triangle", "diamond", "wedge", "cross"];
const COLOURS = 8;

/** About `count` round values that cover low to high. */
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

/** Round ends for values, a little beyond them. */
function roundDomain(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  if (low === 0 && high === 0) return [0, 1];
  const pad = high === low ? Math.abs(high) * 0.1 || 1 : (high - low) * 0.06;
  const from = low >= 0 && low < 0.3 * high ? 0 : low - pad;
  return [from, high <= 0 && high + pad > 0 ? 0 : high + pad];
}

function tickText(values) {
  const step = values.length > 1 ? Math.abs(values[1] - values[0]) : Math.abs(values[0] ?? 1);
  const digits = step > 0 ? Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) : 0;
  return values.map((value) => figure(value, Math.min(digits, 8)));
}

function scale([from, to], [start, end]) {
  const factor = to === from ? 0 : (end - start) / (to - from);
  return (value) => start + (value - from) * factor;
}

function linePath(points) {
  return points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

/** Runs of neighbouring points that have values. */
function segments(points) {
  const found = [[]];
  for (const point of points) {
    if (point[1] === null || point[1] === undefined) found.push([]);
    else found.at(-1).push(point);
  }
  return found.filter((part) => part.length);
}

/** A marker of one of the six shapes around a point. */
function marker(shape, x, y, size, attributes) {
  const d = {
    circle: `M${x - size} ${y}a${size} ${size} 0 1 0 ${2 * size} 0a${size} ${size} 0 1 0 ${-2 * size} 0Z`,
    square: `M${x - size} ${y - size}h${2 * size}v${2 * size}h${-2 * size}Z`,
    triangle: `M${x} ${y - size * 1.2}L${x + size * 1.15} ${y + size}H${x - size * 1.15}Z`,
    diamond: `M${x} ${y - size * 1.35}L${x + size * 1.35} ${y}L${x} ${y + size * 1.35}L${x - size * 1.35} ${y}Z`,
    wedge: `M${x} ${y + size * 1.2}L${x + size * 1.15} ${y - size}H${x - size * 1.15}Z`,
    cross: `M${x - size} ${y - size}L${x + size} ${y + size}M${x - size} ${y + size}L${x + size} ${y - size}`,
  }[shape];
  return svg("path", { d, ...attributes });
}

function shapeOf(index) {
  return SHAPES[index % SHAPES.length];
}

function colourOf(index) {
  return `arm-${index % COLOURS}`;
}

/** The key of one series: its line and marker, then its name. */
function legendItem(index, ...label) {
  const line = svg("path", { class: "line", d: "M1 7H21" });
  const drawing = svg("svg", { width: 22, height: 14, class: colourOf(index), "aria-hidden": "true" }, line);
  drawing.append(marker(shapeOf(index), 11, 7, 3.5, { class: "marker" }));
  return el("span", { class: "legend-item" }, drawing, ...label.filter(Boolean));
}

/** Places for labels beside a chart: near their points, apart from one another, inside the chart. */
function spread(places, gap, top, bottom) {
  const order = places.map((y, index) => ({ y, index })).sort((a, b) => a.y - b.y);
  order.forEach((item, at) => {
    item.y = Math.max(item.y, at ? order[at - 1].y + gap : top);
  });
  for (let at = order.length - 1; at >= 0; at -= 1) {
    order[at].y = Math.min(order[at].y, at < order.length - 1 ? order[at + 1].y - gap : bottom);
  }
  const found = [];
  for (const item of order) found[item.index] = item.y;
  return found;
}

/**
 * A line chart in a host element.
 *
 * spec: title, description, height, xLabel, yLabel, xDomain, yDomain, labels (at the ends of the lines), zero,
 * rules [{x, label}], shade {from, label}, onPoint(x or null), and
 * series [{colour, label, points [[x, y]], band [[x, low, high]], thin, bare, selected [x]}].
 * Returns {show(x), draw(spec)}: show marks a place on the x axis.
 */
function lineChart(host, spec) {
  const state = { spec, at: null, geometry: null };
  const place = el("div", { class: "plot" });
  host.append(place);

  function draw() {
    const width = Math.floor(place.clientWidth);
    if (width < 40) return;
    state.geometry = layOut(state.spec, width);
    const drawing = drawChart(state.spec, state.geometry);
    place.replaceChildren(drawing);
    listen(drawing);
    mark();
  }

  function mark() {
    const cursor = place.querySelector(".cursor");
    if (cursor === null) return;
    const { x, y, top, bottom } = state.geometry;
    const series = state.spec.series.filter((one) => !one.thin);
    const found =
      state.at === null ? [] : series.map((one) => [one, one.points.find((point) => point[0] === state.at)]);
    const dots = found
      .filter(([, point]) => point !== undefined && point[1] !== null)
      .map(([one, point]) => svg("circle", { class: `dot ${one.colour}`, cx: x(point[0]), cy: y(point[1]), r: 4.5 }));
    const line = state.at === null ? [] : [svg("path", { class: "guide", d: `M${x(state.at)} ${top}V${bottom}` })];
    cursor.replaceChildren(...line, ...dots);
  }

  function listen(drawing) {
    if (!state.spec.onPoint) return;
    const values = [...new Set(state.spec.series.flatMap((one) => one.points.map((point) => point[0])))];
    drawing.addEventListener("pointermove", (event) => {
      const at = event.clientX - drawing.getBoundingClientRect().left;
      const distance = (value) => Math.abs(state.geometry.x(value) - at);
      state.spec.onPoint(values.reduce((best, value) => (distance(value) < distance(best) ? value : best)));
    });
    drawing.addEventListener("pointerleave", () => state.spec.onPoint(null));
  }

  new ResizeObserver(draw).observe(place);
  return {
    show(at) {
      state.at = at;
      mark();
    },
    draw(next) {
      state.spec = next;
      draw();
    },
  };
}

/** Margins, scales and ticks for a width. */
function layOut(spec, width) {
  const named = spec.series.filter((one) => one.label && !one.thin);
  const longest = Math.max(0, ...named.map((one) => one.label.length));
  const labels = Boolean(spec.labels) && width >= 620 && named.length > 1;
  const margin = {
    top: spec.rules?.length ? 20 : 10,
    right: labels ? 22 + longest * 6.7 : 14,
    bottom: spec.xLabel ? 40 : 24,
  };
  const yTicks = ticks(...spec.yDomain, spec.height > 160 ? 5 : 4);
  const yTexts = tickText(yTicks);
  margin.left = (spec.yLabel ? 24 : 8) + Math.max(...yTexts.map((text) => text.length)) * 7.2;
  const right = width - margin.right;
  const bottom = spec.height - margin.bottom;
  return {
    width,
    labels,
    named,
    right,
    bottom,
    yTicks,
    yTexts,
    left: margin.left,
    top: margin.top,
    xTicks: ticks(...spec.xDomain, Math.max(2, Math.min(10, Math.floor((right - margin.left) / 70)))).filter(
      Number.isInteger,
    ),
    x: scale(spec.xDomain, [margin.left, right]),
    y: scale(spec.yDomain, [bottom, margin.top]),
  };
}

function drawChart(spec, geometry) {
  const attributes = {
    width: geometry.width,
    height: spec.height,
    viewBox: `0 0 ${geometry.width} ${spec.height}`,
    role: "img",
  };
  return svg(
    "svg",
    { class: "chart", ...attributes, "aria-label": `${spec.title}. ${spec.description}` },
    svg("title", {}, spec.title),
    svg("desc", {}, spec.description),
    axes(spec, geometry),
    ...spec.series.map((one) => band(one, geometry)),
    ...spec.series.map((one) => line(one, geometry)),
    ...(spec.rules ?? []).map((rule) => ruler(rule, geometry)),
    endLabels(geometry),
    svg("g", { class: "cursor" }),
  );
}

function axes(spec, geometry) {
  const { x, y, left, right, top, bottom } = geometry;
  const group = svg("g", { class: "axes" });
  if (spec.shade) {
    const from = x(spec.shade.from);
    group.append(
      svg("rect", { class: "shade", x: from, y: top, width: Math.max(0, right - from), height: bottom - top }),
    );
  }
  geometry.yTicks.forEach((value, index) => {
    const zero = spec.zero && value === 0;
    group.append(
      svg("path", { class: zero ? "zero" : "grid", d: `M${left} ${y(value)}H${right}` }),
      svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, geometry.yTexts[index]),
    );
  });
  for (const value of geometry.xTicks) {
    group.append(svg("text", { x: x(value), y: bottom + 16, "text-anchor": "middle" }, String(value)));
  }
  if (spec.xLabel) {
    const attributes = { class: "axis-label", x: (left + right) / 2, y: bottom + 34, "text-anchor": "middle" };
    group.append(svg("text", attributes, spec.xLabel));
  }
  if (spec.yLabel) {
    const middle = (top + bottom) / 2;
    const attributes = {
      class: "axis-label",
      transform: `translate(12 ${middle}) rotate(-90)`,
      "text-anchor": "middle",
    };
    group.append(svg("text", attributes, spec.yLabel));
  }
  return group;
}

function band(series, { x, y }) {
  if (!series.band?.length) return null;
  const upper = series.band.map(([at, , high]) => [x(at), y(high)]);
  const lower = series.band.map(([at, low]) => [x(at), y(low)]).reverse();
  return svg("path", { class: `band ${series.colour}`, d: `${linePath([...upper, ...lower])}Z` });
}

function line(series, { x, y }) {
  const group = svg("g", { class: `series ${series.colour}${series.thin ? " thin" : ""}` });
  for (const part of segments(series.points)) {
    group.append(svg("path", { class: "line", d: linePath(part.map(([at, value]) => [x(at), y(value)])) }));
  }
  if (!series.thin && !series.bare) {
    for (const [at, value] of series.points)
      group.append(marker(series.shape, x(at), y(value), 3, { class: "marker" }));
  }
  for (const at of series.selected ?? []) {
    const found = series.points.find((point) => point[0] === at);
    if (found) group.append(svg("circle", { class: "selected", cx: x(at), cy: y(found[1]), r: 8 }));
  }
  return group;
}

function ruler(rule, { x, left, right, top, bottom }) {
  const at = x(rule.x);
  const anchor = at - left < 50 ? "start" : right - at < 50 ? "end" : "middle";
  return svg(
    "g",
    { class: "ruler" },
    svg("path", { d: `M${at} ${top - 4}V${bottom}` }),
    svg("text", { x: at, y: top - 8, "text-anchor": anchor }, rule.label),
  );
}

function endLabels(geometry) {
  if (!geometry.labels) return null;
  const lastSteps = [...new Set(geometry.named.map((one) => one.points.at(-1)[0]))];
  return svg("g", {}, ...lastSteps.flatMap((step) => labelsAt(step, geometry)));
}

/** Names of the lines that end at a step, beside their ends. */
function labelsAt(step, { x, y, top, bottom, named }) {
  const ending = named.filter((one) => one.points.at(-1)[0] === step);
  const ends = ending.map((one) => y(one.points.at(-1)[1]));
  const places = spread(ends, 15, top + 4, bottom);
  return ending.map((one, index) =>
    svg(
      "g",
      { class: one.colour },
      svg("path", { class: "leader", d: `M${x(step) + 6} ${ends[index]}L${x(step) + 12} ${places[index]}` }),
      svg("text", { class: "end-label", x: x(step) + 15, y: places[index] + 4 }, one.label),
    ),
  );
}

/** Dots with intervals on a percent scale: rows [{label, colour, shape, value, low, high}], chance a line or null. */
function intervalPlot(host, { title, description, rows, chance }) {
  const place = el("div", { class: "plot" });
  host.append(place);
  const longest = Math.max(...rows.map((row) => row.label.length));

  function draw() {
    const width = Math.floor(place.clientWidth);
    if (width < 40) return;
    const height = rows.length * 24 + 34;
    const left = Math.min(longest * 6.9 + 12, width * 0.45);
    const x = scale([0, 100], [left, width - 46]);
    const bottom = height - 24;
    const drawing = svg(
      "svg",
      {
        class: "chart",
        width,
        height,
        viewBox: `0 0 ${width} ${height}`,
        role: "img",
        "aria-label": `${title}. ${description}`,
      },
      svg("title", {}, title),
      svg("desc", {}, description),
    );
    for (const value of [0, 25, 50, 75, 100]) {
      drawing.append(
        svg("path", { class: "grid", d: `M${x(value)} 4V${bottom}` }),
        svg("text", { x: x(value), y: bottom + 16, "text-anchor": "middle" }, String(value)),
      );
    }
    if (chance !== null) drawing.append(svg("path", { class: "chance", d: `M${x(chance)} 4V${bottom}` }));
    rows.forEach((row, index) => drawing.append(intervalRow(row, x, index * 24 + 18, left, width)));
    place.replaceChildren(drawing);
  }

  new ResizeObserver(draw).observe(place);
}

function intervalRow(row, x, y, left, width) {
  const group = svg(
    "g",
    { class: row.colour },
    svg("text", { class: "row-label", x: left - 10, y: y + 4, "text-anchor": "end" }, row.label),
  );
  if (row.low !== undefined) group.append(svg("path", { class: "interval", d: `M${x(row.low)} ${y}H${x(row.high)}` }));
  group.append(
    marker(row.shape, x(row.value), y, 4, { class: "marker" }),
    svg("text", { class: "row-value", x: width - 2, y: y + 4, "text-anchor": "end" }, figure(row.value)),
  );
  return group;
}
