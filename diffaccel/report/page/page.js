"use strict";
/* The page of a comparison. Text from points goes into text nodes, or through `escaped` into plotly's markup. */
(() => {
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

/* Curves and cells */

function shown() {  // curves that pass the filter, with their points
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  return view().curves.map((curve, index) => ({...curve, index, points: view().points.filter(p => p.curve === index)}))
    .filter(curve => words.every(word => curve.label.toLowerCase().includes(word)));
}
const visible = () => shown().filter(curve => !state.hidden.has(curve.label));
const budgets = () => [...new Set(view().points.map(point => point.budget))]
  .sort((a, b) => (a ?? Infinity) - (b ?? Infinity));
const head = budget => budget === null ? (view().points.some(p => p.budget === null && p.nfe) ? "adaptive" : "no NFE")
  : `NFE ${number(budget)}`;

function averaged(curve) {
  const key = cost().key;
  return budgets().map(budget => curve.points.filter(p => p.budget === budget && p.drawn && p[key] > 0))
    .filter(points => points.length)
    .map(points => ({x: mean(points.map(p => p[key])), points, ...summary(points)}))
    .sort((a, b) => a.x - b.x);
}

/* Chart */

const dark = () => night.matches && !state.printing;
const variable = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function hover(curve, at) {
  const point = at.points[0], card = data.cards[point.card], count = at.points.length;
  const scores = DIVERSITY.filter(name => point.metrics[name] !== undefined)
    .map(name => `${name} ${number(point.metrics[name], 3)}`);
  const settings = card.sections.filter(([name]) => name === "sampling").flatMap(([, entries]) => entries)
    .filter(([name]) => name === "solver" || name === "prior").map(([name, text]) => `${name}: ${text}`);
  const parts = [
    `<b>${escaped(curve.label)}</b>`,
    `${escaped(view().key)} ${number(at.mean)}${at.se === null ? "" : ` ± ${number(at.se, 2)}`}${count > 1 ? ` (${count} seeds)` : ""}`,
    `NFE ${number(mean(at.points.map(p => p.nfe)))}, ${number(point.seconds_per_image, 3)} s and ${number(point.gflops_per_image, 3)} GFLOPs per image`,
    scores.join(" · "),
    ...settings.flatMap(text => lines(text, 72).slice(0, 3)).map(escaped),
    ...(card.command ? lines(card.command, 72).slice(0, 5).map(text => `<span style="font-family:monospace">${escaped(text)}</span>`) : []),
  ];
  return parts.filter(Boolean).join("<br>");
}

function traces(curves) {
  const found = [];
  const ends = curves.flatMap(curve => averaged(curve)).sort((a, b) => a.x - b.x || a.mean - b.mean);
  const front = ends.reduce((kept, at) => kept.length && at.mean >= kept.at(-1).mean ? kept : [...kept, at], []);
  if ($("front").checked && curves.length > 1) {
    found.push({x: front.map(at => at.x), y: front.map(at => at.mean), mode: "lines", hoverinfo: "skip",
      line: {color: variable("--faint"), width: 12}, opacity: .22, name: "Pareto front"});
  }
  if ($("published").checked && state.cost === "nfe" && view().published.length) {
    const all = view().published;
    found.push({x: all.map(p => p.nfe), y: all.map(p => p.value), mode: "markers", hoverinfo: "text", opacity: .6,
      marker: {symbol: "x-thin", color: variable("--faint"), size: 7, line: {width: 1.5, color: variable("--faint")}},
      hovertext: all.map(p => `${escaped(p.label)}: ${number(p.value)} at NFE ${number(p.nfe)}<br>${escaped(p.source)}`)});
  }
  for (const curve of curves) {
    const at = averaged(curve), colour = dark() ? curve.dark : curve.colour;
    const ownError = $("bars").checked ? {type: "data", array: at.map(one => one.se ?? 0), color: colour, thickness: 1.2, width: 3} : undefined;
    found.push({x: at.map(one => one.x), y: at.map(one => one.mean), error_y: ownError, mode: "lines+markers",
      name: escaped(curve.label), customdata: at.map(one => one.points.map(p => view().points.indexOf(p))),
      line: {color: colour, width: 2, dash: curve.dashes.length ? curve.dashes.map(d => `${1.6 * d}px`).join(",") : "solid"},
      marker: {symbol: SYMBOLS[curve.marker], size: 9, color: colour, line: {color: variable("--ground"), width: 1}},
      hoverinfo: "text", hovertext: at.map(one => hover(curve, one))});
  }
  return found;
}

function logTicks(low, high) {
  const steps = high / low > 12 ? [1, 2, 5] : high / low > 3 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : null, found = [];
  if (!steps) {
    const raw = (high - low) / 6, unit = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find(s => s * unit >= raw) * unit;
    for (let k = Math.ceil(low / step); k * step <= high; k++) if (k > 0) found.push(k * step);
  } else {
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++) found.push(...steps.map(s => s * 10 ** p));
  }
  return found.filter(value => value >= low * .999 && value <= high * 1.001);
}

function axis(values, ticks) {
  if (!values.length) return {type: "log"};
  const low = Math.min(...values), high = Math.max(...values), pad = Math.max(1.06, (high / low) ** .06);
  const own = ticks ?? logTicks(low / pad, high * pad);
  return {type: "log", range: [Math.log10(low / pad), Math.log10(high * pad)], tickvals: own, ticktext: own.map(v => number(v)),
    gridcolor: variable("--grid"), linecolor: variable("--faint"), tickcolor: variable("--faint"), ticks: "outside", zeroline: false};
}

/** Labels at the ends of few curves, moved apart; the others are named by the legend below. */
function endLabels(curves, yaxis, height) {
  if (curves.length > 10 || !(wide.matches || state.printing)) return [];
  const [low, high] = yaxis.range, pixel = (high - low) / height;
  const ends = curves.map(curve => ({curve, at: averaged(curve).at(-1)})).filter(one => one.at)
    .map(one => ({...one, y: Math.log10(one.at.mean)})).sort((a, b) => a.y - b.y);
  const size = one => (1 + .9 * (lines(one.curve.label, 30).slice(0, 3).length - 1)) * 17 * pixel;
  for (let pass = 0; pass < 200; pass++) {
    for (let k = 0; k + 1 < ends.length; k++) {
      const lack = (size(ends[k]) + size(ends[k + 1])) / 2 - (ends[k + 1].y - ends[k].y);
      if (lack > 0) { ends[k].y -= lack / 2; ends[k + 1].y += lack / 2; }
    }
  }
  return ends.map(({curve, at, y}) => ({xref: "paper", x: 1, xanchor: "left", yref: "y", y, yanchor: "middle",
    text: lines(curve.label, 30).slice(0, 3).map(escaped).join("<br>"), showarrow: false, align: "left", xshift: 12,
    font: {color: dark() ? curve.dark : curve.colour, size: 12.5}, captureevents: false}));
}

function drawChart() {
  const curves = visible().filter(curve => averaged(curve).length), at = curves.flatMap(averaged);
  const narrow = !wide.matches && !state.printing, height = narrow ? 380 : state.printing ? 420 : 520;
  const nfe = state.cost.startsWith("nfe");
  const ticks = nfe ? budgets().filter(b => b).reduce((kept, b) => kept.length && b < 1.2 * kept.at(-1) ? kept : [...kept, b], []) : null;
  const published = $("published").checked && state.cost === "nfe" ? view().published : [];
  const yaxis = axis([...at.flatMap(one => [one.mean, Math.max(one.mean - (one.se ?? 0), one.mean / 2)]), ...published.map(p => p.value)]);
  const labels = curves.length ? endLabels(curves, yaxis, height - 90) : [];
  const n = [...new Set(view().points.map(point => point.n))];
  const layout = {
    height, autosize: true, showlegend: false, annotations: labels, hovermode: "closest", dragmode: narrow ? false : "zoom",
    margin: {l: narrow ? 46 : 64, r: labels.length ? 230 : 14, t: 14, b: 54},
    width: state.printing ? 680 : undefined,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {family: "system-ui, sans-serif", color: variable("--text"), size: 13},
    hoverlabel: {align: "left", bgcolor: variable("--raised"), bordercolor: variable("--line"), font: {color: variable("--text"), size: 12}},
    xaxis: {...axis([...at.map(one => one.x), ...published.map(p => p.nfe)], ticks), title: {text: escaped(cost().label), standoff: 10}},
    yaxis: {...yaxis, title: {text: `${escaped(view().key)}${n.length === 1 && n[0] ? `@${n[0]}` : ""} (lower is better)`, standoff: 6}},
  };
  const config = {displaylogo: false, responsive: true, displayModeBar: narrow ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
  return Plotly.react("chart", traces(curves), layout, config);
}

function retick(changed) {  // round numbers on the axes after a zoom
  const full = $("chart")._fullLayout, update = {};
  for (const name of ["xaxis", "yaxis"]) {
    if (!Object.keys(changed).some(key => key.startsWith(name + ".range"))) continue;
    const [low, high] = full[name].range.map(power => 10 ** power);
    const fit = (full[name].tickvals ?? []).filter(v => v >= low && v <= high);
    if (fit.length >= 4) continue;
    const ticks = logTicks(low, high);
    Object.assign(update, {[name + ".tickvals"]: ticks, [name + ".ticktext"]: ticks.map(v => number(v))});
  }
  if (Object.keys(update).length) Plotly.relayout("chart", update);
}

function drawChips() {
  const namespace = "http://www.w3.org/2000/svg";
  $("chips").replaceChildren(...shown().map(curve => {
    const svg = document.createElementNS(namespace, "svg"), colour = dark() ? curve.dark : curve.colour;
    const shape = (name, values) => {
      const found = document.createElementNS(namespace, name);
      for (const [key, value] of Object.entries(values)) found.setAttribute(key, value);
      svg.append(found);
    };
    for (const [key, value] of Object.entries({width: 30, height: 12, "aria-hidden": "true"})) svg.setAttribute(key, value);
    shape("line", {x1: 0, x2: 30, y1: 6, y2: 6, stroke: colour, "stroke-width": 2, "stroke-dasharray": curve.dashes.map(d => 1.6 * d).join(" ")});
    shape("path", {d: MARKS[curve.marker] ?? MARKS.o, fill: colour});
    const count = Math.max(...budgets().map(b => curve.points.filter(p => p.budget === b).length));
    return element("button", {type: "button", className: "chip", "aria-pressed": String(!state.hidden.has(curve.label)),
      onclick: () => { state.hidden.has(curve.label) ? state.hidden.delete(curve.label) : state.hidden.add(curve.label); drawn(); },
      ondblclick: () => { state.hidden = new Set(shown().map(c => c.label).filter(l => l !== curve.label)); drawn(); }},
      svg, curve.label + (count > 1 ? `, ${count} seeds` : ""));
  }));
}
const MARKS = {o: "M11 6a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", s: "M11 2h8v8h-8z", "^": "M15 1.5l4.5 8.5h-9z", D: "M15 1l5 5l-5 5l-5 -5z",
  v: "M15 10.5l4.5 -8.5h-9z", P: "M13 2h4v2.5h2.5v3H17V10h-4V7.5h-2.5v-3H13z", X: "M11 3.5l1.5 -1.5l2.5 2.5l2.5 -2.5l1.5 1.5l-2.5 2.5l2.5 2.5l-1.5 1.5l-2.5 -2.5l-2.5 2.5l-1.5 -1.5l2.5 -2.5z",
  "*": "M15 .8l1.5 3.6l3.9 .3l-3 2.5l1 3.8l-3.400 -2.100l-3.400 2.100l1 -3.800l-3 -2.500l3.900 -.300z", "<": "M10.500 6l8.500 -4.500v9z", ">": "M19.500 6l-8.500 -4.500v9z", p: "M15 1.500l4.600 3.400l-1.800 5.400h-5.600l-1.800 -5.400z"};

/* Tables */

function sortable(table, name, heads, rows) {
  const sort = state.sort[name];
  if (sort) {
    const order = (a, b) => typeof a === "string" || typeof b === "string" ? String(a).localeCompare(String(b), "en", {numeric: true}) : a - b;
    const key = row => row.keys[sort.column];
    rows = rows.filter(row => key(row) !== null && key(row) !== undefined).sort((a, b) => sort.up * order(key(a), key(b)))
      .concat(rows.filter(row => key(row) === null || key(row) === undefined));
  }
  const toggle = column => { state.sort[name] = sort?.column === column ? (sort.up === 1 ? {column, up: -1} : null) : {column, up: 1}; drawTables(); };
  const cells = heads.map((text, column) => element("th", {scope: "col", tabIndex: 0, onclick: () => toggle(column),
    onkeydown: event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(column); } },
    "aria-sort": sort?.column === column ? (sort.up === 1 ? "ascending" : "descending") : "none"}, text));
  table.replaceChildren(element("thead", {}, element("tr", {}, ...cells)), element("tbody", {}, ...rows.map(row => row.element)));
  return rows;
}

function chainText(points) {
  const names = DIVERSITY.filter(name => points.every(point => point.metrics[name] !== undefined));
  return names.map(name => `${name.replace("_", " ")} ${number(mean(points.map(p => p.metrics[name])), 3)}`);
}
const isChain = curve => curve.points.some(point => point.chains);

function grid() {
  const curves = visible(), columns = budgets().filter(b => curves.some(c => c.points.some(p => p.budget === b)));
  const cells = curves.map(curve => columns.map(b => summary(curve.points.filter(p => p.budget === b))));
  const best = columns.map((_, k) => cells.map(row => row[k]).filter(Boolean).sort((a, b) => a.mean - b.mean)[0]);
  const tied = (cell, k) => { const d = difference(cell, best[k]); return d.se !== null && d.value < TIE * d.se; };
  const reference = curves.findIndex(curve => curve.label === state.against);
  return {curves, columns, cells, best, tied, reference};
}

function drawGrid() {
  const {curves, columns, cells, best, tied, reference} = grid();
  let unpaired = false;
  const rows = curves.map((curve, i) => {
    const own = columns.map((budget, k) => {
      const cell = cells[i][k];
      if (!cell) return element("td", {}, "");
      const kind = columns[k] === null ? "" : cell === best[k] ? "best" : tied(cell, k) ? "tie" : "";
      const text = element("button", {type: "button", className: "cell", title: "open the card", onclick: () => openCard(curve, cell.points)},
        number(cell.mean), element("span", {className: "error"}, cell.se === null ? "" : ` ± ${number(cell.se, 2)}`));
      const under = [];
      const spent = mean(cell.points.map(p => p.nfe));
      if (cell.points.length > 1) under.push(`${cell.points.length} seeds`);
      if (spent && (budget === null || Math.abs(spent - budget) > 1e-6 * budget)) under.push(`at NFE ${number(spent)}`);
      if (reference >= 0 && i !== reference) {
        const d = difference(cell, cells[reference][k]);
        if (d && d.se) { under.push(`z ${signed(d.value / d.se, 2)}${d.paired ? "" : "*"}`); unpaired ||= !d.paired; }
      }
      const also = state.also ? [`${state.also} ${number(mean(cell.points.map(p => p.metrics[state.also] ?? NaN)), 3)}`] : [];
      const more = curve.points.some(p => p.chains) ? chainText(cell.points) : also;
      return element("td", {className: kind}, text, ...[...under, ...more].map(line => element("small", {}, line)));
    });
    return {element: element("tr", {className: i === reference ? "reference" : ""}, element("th", {scope: "row"}, curve.label), ...own),
      keys: [curve.label, ...cells[i].map(cell => cell ? cell.mean : null)]};
  });
  sortable($("grid"), "grid", [view().key, ...columns.map(head)], rows);
  const floor = view().points.map(p => p.metrics[view().key + "_floor"]).find(value => value !== undefined);
  if (floor !== undefined) {
    $("grid").tBodies[0].append(element("tr", {className: "floor"}, element("th", {scope: "row"}, "held-out real images"),
      ...columns.map(() => element("td", {}, number(floor, 2)))));
  }
  $("grid-notes").textContent = "Shaded and bold: lowest of the column. Dotted: within two standard errors of it, paired where noise is common. " +
    (reference < 0 ? "" : "z: difference to the reference row in standard errors of the difference under common noise, negative is better. ") +
    (unpaired ? "An asterisk marks differences of points that contain no blocks, or do not share their noise: their error is that of independent images. " : "") +
    "Click a figure for its provenance and command.";
}

function pointRows() {
  const names = [view().key, view().key + "_se", view().key + "_inf", ...view().metrics];
  const heads = ["curve", "budget", "nfe", "nfe_equivalent", "n", "seed", ...names, "seconds_per_image", "gflops_per_image"];
  const rows = visible().flatMap(curve => curve.points.map(point => ({curve, point, keys: [curve.label, point.budget, point.nfe,
    point.nfe_equivalent, point.n, point.seed, ...names.map(name => point.metrics[name] ?? null), point.seconds_per_image, point.gflops_per_image]})));
  return {heads, rows};
}

function drawPoints() {
  const {heads, rows} = pointRows();
  for (const row of rows) {
    const cells = row.keys.slice(1).map((value, k) => element("td", {}, value === null || value === undefined ? "-"
      : typeof value === "number" ? number(value, heads[k + 1] === "n" || heads[k + 1] === "seed" ? 12 : 4) : String(value)));
    const open = element("button", {type: "button", className: "link", onclick: () => openCard(row.curve, [row.point])}, row.curve.label);
    row.element = element("tr", {}, element("th", {scope: "row"}, open), ...cells);
  }
  sortable($("points"), "points", heads, rows);
}
const drawTables = () => { drawGrid(); drawPoints(); };

/* Card */

function openCard(curve, points) {
  const close = element("button", {type: "button", className: "close", onclick: () => $("card").close(), "aria-label": "close"}, "✕");
  const parts = points.flatMap((point, k) => {
    const card = data.cards[point.card];
    const found = [k ? element("hr") : null, element("h3", {}, `${curve.label}, ${head(point.budget)}${points.length > 1 ? `, seed ${point.seed}` : ""}`)];
    if (card.command) {
      const copy = element("button", {type: "button", onclick: event => { copied(card.command); event.target.textContent = "copied"; }}, "copy");
      found.push(element("div", {className: "command"}, element("code", {}, card.command), copy));
    }
    if (card.warning) found.push(element("p", {className: "quiet"}, card.warning));
    if (point.difference) found.push(element("p", {className: "quiet"}, `difference to the first row: ${signed(point.difference[0], 3)}${point.difference[1] === null ? "" : ` ± ${number(point.difference[1], 2)}`}`));
    for (const [name, entries] of card.sections) {
      found.push(element("h4", {}, name), element("dl", {}, ...entries.flatMap(([term, text]) => [element("dt", {}, term), element("dd", {}, text)])));
    }
    return found.filter(Boolean);
  });
  $("card").replaceChildren(close, ...parts);
  $("card").showModal();
  $("card").scrollTop = 0;
}

function copied(text) {
  if (navigator.clipboard && isSecureContext) { navigator.clipboard.writeText(text).catch(() => {}); return; }
  const area = element("textarea", {value: text});
  $("card").append(area); area.select(); document.execCommand("copy"); area.remove();
}

/* Strips */

function drawStrips() {
  const names = new Set(visible().map(curve => curve.label));
  const cells = data.strips.cells.filter(([label]) => names.has(label));
  $("strips").hidden = !cells.length;
  const columns = [...new Set(cells.map(([, budget]) => budget))].sort((a, b) => a - b);
  $("strips-title").textContent = data.strips.title;
  const rows = [...new Set(cells.map(([label]) => label))].map(label => element("tr", {}, element("th", {scope: "row"}, label),
    ...columns.map(budget => {
      const cell = cells.find(one => one[0] === label && one[1] === budget);
      return element("td", {}, cell ? element("img", {src: cell[2], alt: `${label}, ${head(budget)}`}) : "");
    })));
  $("strip").replaceChildren(element("thead", {}, element("tr", {}, element("th", {scope: "col"}, ""),
    ...columns.map(budget => element("th", {scope: "col"}, head(budget))))), element("tbody", {}, ...rows));
}

/* Downloads */

function save(name, kind, text) {
  const address = URL.createObjectURL(new Blob([text], {type: kind}));
  element("a", {href: address, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
const csvCell = value => {
  let text = value === null || value === undefined ? "" : String(value);
  if (typeof value === "string" && /^[=+\-@]/.test(text)) text = "'" + text;  // no formula
  return /[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
};
const markdownCell = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/([\\|`*$~[\]])/g, "\\$1");

function csv() {
  const {heads, rows} = pointRows();
  return [["judge", ...heads], ...rows.map(row => [view().judge, ...row.keys])].map(row => row.map(csvCell).join(",")).join("\r\n") + "\r\n";
}
function markdown() {
  const {curves, columns, cells, best, tied} = grid();
  const text = (cell, k) => {
    if (!cell) return "";
    const own = `${number(cell.mean)}${cell.se === null ? "" : ` ± ${number(cell.se, 2)}`}${cell.points.length > 1 ? ` (${cell.points.length} seeds)` : ""}`;
    return cell === best[k] ? `**${own}**` : tied(cell, k) ? `_${own}_` : own;
  };
  const rows = curves.map((curve, i) => [markdownCell(curve.label), ...cells[i].map(text)]);
  return [[view().key, ...columns.map(head)], columns.map(() => "---:").reduce((kept, one) => [...kept, one], ["---"]), ...rows]
    .map(row => `| ${row.join(" | ")} |\n`).join("");
}

/* Page */

function options(select, pairs, value) {
  select.replaceChildren(...pairs.map(([key, text]) => element("option", {value: key}, text)));
  select.value = value;
}

function drawn() { drawChart(); drawChips(); drawTables(); drawStrips(); }

function chooseView(index) {
  state.view = index;
  state.sort = {grid: null, points: null};
  const labels = view().curves.map(curve => curve.label);
  if (!labels.includes(state.against)) state.against = labels.length > 1 ? labels[0] : null;
  options($("against"), [["", "none"], ...labels.map(label => [label, label])], state.against ?? "");
  if (!view().metrics.includes(state.also)) state.also = "";
  options($("also"), [["", "nothing"], ...view().metrics.map(name => [name, name])], state.also);
  $("published-field").hidden = !view().published.length;
  $("notes").replaceChildren(...view().notes.map(text => element("li", {}, text)));
  $("summary").textContent = `${view().points.length} points of ${labels.length} curves, judged by ${view().judge}` +
    `; the mean of several seeds has its number of seeds, nothing else is averaged`;
  drawn();
}

function start() {
  $("title").textContent = data.title || "comparison";
  if (data.command) $("made").append(`diffaccel ${data.version}: `, element("code", {}, data.command));
  options($("judge"), data.views.map((one, k) => [String(k), `${one.judge} (${one.points.length} points)`]), "0");
  $("judge-field").hidden = data.views.length < 2;
  options($("cost"), data.costs.filter(one => data.views.some(v => v.points.some(p => p[one.key] > 0))).map(one => [one.name, one.label]), state.cost);
  $("judge").onchange = event => chooseView(Number(event.target.value));
  $("cost").onchange = event => { state.cost = event.target.value; drawChart(); };
  $("filter").oninput = event => { state.filter = event.target.value; drawn(); };
  $("against").onchange = event => { state.against = event.target.value || null; drawGrid(); };
  $("also").onchange = event => { state.also = event.target.value; drawGrid(); };
  for (const id of ["front", "bars", "published"]) $(id).onchange = drawChart;
  $("controls").onsubmit = event => event.preventDefault();
  $("all").onclick = () => { state.hidden.clear(); drawn(); };
  $("none").onclick = () => { state.hidden = new Set(shown().map(curve => curve.label)); drawn(); };
  $("csv").onclick = () => save("points.csv", "text/csv", csv());
  $("markdown").onclick = () => save("table.md", "text/markdown", markdown());
  $("card").onclick = event => { if (event.target === $("card")) $("card").close(); };
  chooseView(0);
  $("chart").on("plotly_click", event => {
    const indices = event.points[0].customdata;
    if (indices) { const points = indices.map(k => view().points[k]); openCard(view().curves[points[0].curve], points); }
  });
  $("chart").on("plotly_relayout", retick);
  night.addEventListener("change", () => { drawChart(); drawChips(); });
  wide.addEventListener("change", () => drawChart());
  addEventListener("beforeprint", () => { state.printing = true; drawChart(); drawChips(); });
  addEventListener("afterprint", () => { state.printing = false; drawChart(); drawChips(); });
}
start();
})();
