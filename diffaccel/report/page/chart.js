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
  const metric = `${escaped(view().key)}${n.length === 1 && n[0] ? `@${n[0]}` : ""} (lower is better)`;
  const layout = {
    height, autosize: true, showlegend: false, annotations: labels, hovermode: "closest", dragmode: narrow ? false : "zoom",
    margin: {l: narrow ? 46 : 64, r: labels.length ? 230 : 14, t: narrow ? 34 : 14, b: 54},
    ...(narrow ? {title: {text: metric, x: 0, font: {size: 12}}} : {}),
    width: state.printing ? 680 : undefined,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {family: "system-ui, sans-serif", color: variable("--text"), size: 13},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: variable("--faint"), activecolor: variable("--text")},
    hoverlabel: {align: "left", bgcolor: variable("--raised"), bordercolor: variable("--line"), font: {family: "system-ui, sans-serif", color: variable("--text"), size: 12}},
    xaxis: {...axis([...at.map(one => one.x), ...published.map(p => p.nfe)], ticks), title: {text: escaped(cost().label), standoff: 10}},
    yaxis: {...yaxis, ...(narrow ? {} : {title: {text: metric, standoff: 6}})},
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
