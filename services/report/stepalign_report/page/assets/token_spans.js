// Tokens as elements: their colour, the readout of one of them, and moving among them by key.

const OPENING_TAG = /<(?:step_\d+|answer)>/g;

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
