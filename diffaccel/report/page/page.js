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
  const cells = view().strip.cells.filter(([label]) => names.has(label));
  $("strips").hidden = !cells.length;
  const columns = [...new Set(cells.map(([, budget]) => budget))].sort((a, b) => a - b);
  $("strips-title").textContent = view().strip.title;
  const rows = [...new Set(cells.map(([label]) => label))].map(label => element("tr", {}, element("th", {scope: "row"}, label),
    ...columns.map(budget => {
      const cell = cells.find(one => one[0] === label && one[1] === budget);
      return element("td", {}, cell ? element("img", {src: data.pictures[cell[2]], alt: `${label}, ${head(budget)}`}) : "");
    })));
  $("strip").replaceChildren(element("thead", {}, element("tr", {}, element("th", {scope: "col"}, ""),
    ...columns.map(budget => element("th", {scope: "col"}, head(budget))))), element("tbody", {}, ...rows));
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
  if (data.command) $("made").append(`Made with diffaccel ${data.version}: `, element("code", {}, data.command));
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
