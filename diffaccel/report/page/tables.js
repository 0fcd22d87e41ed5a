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
  const texts = names.map(name => `${name.replace("_", " ")} ${number(mean(points.map(p => p.metrics[name])), 3)}`);
  return [texts.slice(0, 2), texts.slice(2)].filter(pair => pair.length).map(pair => pair.join(" · "));
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
      const chain = isChain(curve) ? chainText(cell.points) : [];
      const more = chain.length ? [...chain, ...(DIVERSITY.includes(state.also) ? [] : also)] : also;
      return element("td", {className: kind}, text, ...[...under, ...more].map(line => element("small", {}, line)));
    });
    return {element: element("tr", {className: i === reference ? "reference" : ""}, element("th", {scope: "row"}, curve.label), ...own),
      keys: [curve.label, ...cells[i].map(cell => cell ? cell.mean : null)]};
  });
  sortable($("grid"), "grid", [view().key, ...columns.map(head)], rows);
  const floor = view().floor;
  if (floor) {
    $("grid").tBodies[0].append(element("tr", {className: "floor"}, element("th", {scope: "row"}, floor.label),
      ...columns.map(() => element("td", {}, number(floor.value, 2)))));
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
