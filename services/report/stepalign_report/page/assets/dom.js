// Elements and numbers. Text always becomes a text node: nothing in this page is parsed as markup. Characters by which a
// text would be shown in another order, or not at all, are shown by their numbers.

const SVG = "http://www.w3.org/2000/svg";

const STEERING = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;

function visible(text) {
  return text.replace(STEERING, (found) => `⟨U+${found.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  const shown = children.filter((child) => child !== null && child !== undefined);
  node.append(...shown.map((child) => (typeof child === "string" ? visible(child) : child)));
  return node;
}

/** An HTML element; attributes that start with "--" are custom properties. */
function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An SVG element. */
function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** A number with a fixed count of digits and a true minus sign; a dash where there is none. */
function figure(value, digits = 1) {
  if (value === null || value === undefined) return "–";
  const text = Math.abs(value).toFixed(digits);
  return value < 0 && Number(text) !== 0 ? `−${text}` : text;
}

/** A number with as many digits as its size needs, for scales and readings of any measure. */
function adaptive(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return figure(value, size === 0 || size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 ? 2 : size >= 0.001 ? 4 : 6);
}

function whole(value) {
  return value.toLocaleString("en-US");
}

/** A name from the data, as words. */
function words(name) {
  return name.replaceAll("_", " ");
}

/**
 * A table that scrolls by itself, so that the page never does, and shows at which sides there is more of it. A heading
 * in an array stands over texts.
 */
function table(caption, headings, rows, attributes = {}) {
  const isText = (heading, index) => index === 0 || Array.isArray(heading);
  const head = headings.map((heading, index) =>
    el("th", { scope: "col", class: isText(heading, index) ? null : "number" }, String(heading)),
  );
  const body = el("tbody", {}, ...rows);
  const content = el("table", attributes, el("caption", {}, caption), el("thead", {}, el("tr", {}, ...head)), body);
  const place = el("div", { class: "scroll", role: "region", "aria-label": caption }, content);
  const hint = el("p", { class: "scroll-hint small", "aria-hidden": "true" }, "↔ The table goes on: scroll it sideways");
  const frame = el("div", { class: "table" }, hint, place);
  showScrolling(frame, place);
  return frame;
}

/** Classes of the frame for the sides that hide something. Only a scrolling box needs to be reached by the keyboard. */
function showScrolling(frame, place) {
  const say = () => {
    const hidden = place.scrollWidth - place.clientWidth;
    const scrolls = hidden > 1;
    frame.classList.toggle("scrolls", scrolls);
    frame.classList.toggle("more-left", scrolls && place.scrollLeft > 1);
    frame.classList.toggle("more-right", scrolls && place.scrollLeft < hidden - 1);
    if (scrolls) place.setAttribute("tabindex", "0");
    else place.removeAttribute("tabindex");
  };
  place.addEventListener("scroll", say, { passive: true });
  new ResizeObserver(say).observe(place);
}

/** A radio group that looks like one row of buttons. */
function choice(legend, name, options, onChange) {
  const buttons = options.map(({ value, label }, index) => {
    const input = el("input", { type: "radio", name, value, checked: index === 0 });
    input.addEventListener("change", () => onChange(value));
    return el("label", {}, input, el("span", {}, label));
  });
  return el("fieldset", { class: "choice" }, el("legend", {}, legend), ...buttons);
}

/** A labelled list of options. */
function dropdown(label, options, selected, onChange, attributes = {}) {
  const items = options.map((option) =>
    el("option", { value: option.value, selected: option.value === selected }, option.label),
  );
  const select = el("select", attributes, ...items);
  select.addEventListener("change", () => onChange(select.value));
  return el("label", { class: "dropdown" }, el("span", {}, label), select);
}
