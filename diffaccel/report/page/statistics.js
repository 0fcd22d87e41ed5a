/* Data, text and statistics. Text from points goes into text nodes, or through `escaped` into plotly's markup. */
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const SYMBOLS = {o: "circle", s: "square", "^": "triangle-up", D: "diamond", v: "triangle-down", P: "cross", X: "x",
  "*": "star", "<": "triangle-left", ">": "triangle-right", p: "pentagon"};
const DIVERSITY = ["recall", "coverage", "effective_n", "near_repeats"];
const TIE = 2;  // standard errors within which a distance counts as equal
const state = {view: 0, cost: data.x, hidden: new Set(), filter: "", against: null, also: "",
  sort: {grid: null, points: null}, printing: false};
const wide = matchMedia("(min-width: 900px)"), night = matchMedia("(prefers-color-scheme: dark)");

/* Text */

function number(value, digits = 4) {
  if (value === null || value === undefined || !isFinite(value)) return "-";
  if (value === 0) return "0";
  const power = Math.floor(Math.log10(Math.abs(Number(value.toPrecision(digits)))));
  if (power < -4 || power >= Math.max(digits, 5)) return value.toExponential(digits - 1).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(digits)));
}
const escaped = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
  .replace(/%\{/g, "%&#123;");
const signed = (value, digits) => (value > 0 ? "+" : value < 0 ? "−" : "") + number(Math.abs(value), digits);

function element(name, properties = {}, ...children) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in found && key !== "list") found[key] = value; else found.setAttribute(key, value);
  }
  found.append(...children.filter(child => child !== null));
  return found;
}

function lines(text, width) {  // wrapped at spaces, for hovering
  const found = [""];
  for (const word of text.split(" ")) {
    if (found.at(-1) && (found.at(-1) + " " + word).length > width) found.push(word);
    else found[found.length - 1] += (found.at(-1) ? " " : "") + word;
  }
  return found;
}

/* Statistics */

const view = () => data.views[state.view];
const cost = () => data.costs.find(one => one.name === state.cost);
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
const distance = point => point.metrics[view().key];
const error = point => point.metrics[view().key + "_se"] ?? null;

/** Mean over seeds: the error is that of their spread, or of the jackknife for one seed. */
function summary(points) {
  const known = points.filter(point => distance(point) !== undefined);
  if (!known.length) return null;
  const values = known.map(distance), errors = known.map(error), m = mean(values);
  const within = errors.includes(null) ? null : Math.hypot(...errors) / errors.length;
  const spread = values.length < 2 ? within
    : Math.sqrt(values.reduce((sum, v) => sum + (v - m) ** 2, 0) / (values.length - 1) / values.length);
  return {mean: m, se: spread, within, points: known};
}

/** Standard error of a difference, from the distances without each block of images (Busing et al., 1999). */
function jackknife(full, kept, sizes) {
  const n = sizes.reduce((a, b) => a + b, 0), h = sizes.map(size => n / size);
  const estimate = kept.length * full - kept.reduce((sum, value, k) => sum + (1 - 1 / h[k]) * value, 0);
  return Math.sqrt(mean(kept.map((value, k) => (h[k] * full - (h[k] - 1) * value - estimate) ** 2 / (h[k] - 1))));
}

function pairedError(a, b) {
  if (a.pair === null || a.pair !== b.pair || !a.parts || !b.parts) return null;
  if (String(a.parts.sizes) !== String(b.parts.sizes)) return null;
  return jackknife(distance(a) - distance(b), a.parts.kept.map((value, k) => value - b.parts.kept[k]), a.parts.sizes);
}

/** Difference of two cells: paired under common noise where every seed has its pair, else of independent images. */
function difference(a, b) {
  if (!a || !b) return null;
  const pairs = a.points.map(point => [point, b.points.find(other => other.pair !== null && other.pair === point.pair)]);
  const errors = pairs.map(([point, other]) => other ? pairedError(point, other) : null);
  if (!errors.includes(null) && a.points.length === b.points.length) {
    return {value: mean(pairs.map(([p, q]) => distance(p) - distance(q))), se: Math.hypot(...errors) / errors.length, paired: true};
  }
  const own = [a, b].map(one => one.se ?? one.within);
  return {value: a.mean - b.mean, se: own.includes(null) ? null : Math.hypot(...own), paired: false};
}
