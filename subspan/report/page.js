// Draws the figures. All of a figure is made anew from `data` and `state` whenever one of them is touched: Plotly.react does
// what changed. A figure waits with that until it comes into view.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const narrow = matchMedia("(max-width: 900px)"), dark = matchMedia("(prefers-color-scheme: dark)");
const all = (selector) => [...document.querySelectorAll(selector)];
const value = (id) => document.getElementById(id)?.value;
const hidden = new Set();
const state = { x: "tokens", y: "loss", raw: document.getElementById("raw")?.checked };

// ---------------------------------------------------------------------------------------------------------------- parts

const longest = Math.max(0, ...data.runs.flatMap((run) => run.loss.seconds));
const [unit, seconds] = longest > 7200 ? ["hours", 3600] : longest > 120 ? ["minutes", 60] : ["seconds", 1];
const titles = { tokens: "tokens", seconds: `time, ${unit}`, step: "steps" };
const across = (series) => (state.x === "seconds" ? series.seconds.map((x) => x === null ? x : x / seconds) : series[state.x]);
const visible = () => data.runs.map((run, i) => ({ ...run, i })).filter((run) => !hidden.has(run.i));
const cycle = (list, i) => list[i % list.length];
const median = (values) => {
  const sorted = values.filter((x) => x !== null).sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length ? (sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2) : null;
};
const short = (name) => {
  const most = narrow.matches ? 34 : 90;
  return name.length > most ? `${name.slice(0, most / 2)}…${name.slice(-most / 2)}` : name;
};
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");  // Plotly reads some HTML in texts

function line(run, series, y, more = {}) {
  const { line: own, ...others } = more;
  return {
    x: across(series), y, name: escaped(short(run.name)), mode: "lines", hovertemplate: "%{y:.4~f}", ...others,
    line: { color: cycle(data.colours, run.i), dash: cycle(data.dashes, run.i), width: 2, ...own },
  };
}

const faint = (run, series, y) => line(run, series, y, { hoverinfo: "skip", hovertemplate: null, opacity: 0.28, line: { width: 1, dash: "solid" } });

function marks(run, series, y, more = {}) {
  const marker = { symbol: cycle(data.symbols, run.i), size: 9, color: cycle(data.colours, run.i), line: { color: colours().card, width: 1.5 } };
  return line(run, series, y, { mode: "markers", ...more, marker: { ...marker, ...more.marker } });
}

function colours() {
  const of = getComputedStyle(document.body), card = getComputedStyle(document.querySelector(".figure"));
  return { ink: of.color, card: card.backgroundColor, line: card.borderTopColor, faint: getComputedStyle(document.querySelector(".faint")).color };
}

function layout(more = {}) {
  const { ink, card, line, faint } = colours(), family = getComputedStyle(document.body).fontFamily;
  const axis = { gridcolor: line, linecolor: line, zeroline: false, tickcolor: line, tickfont: { color: faint }, automargin: true };
  const spike = { showspikes: true, spikemode: "across", spikethickness: 1, spikedash: "dot", spikecolor: faint, spikesnap: "hovered data" };
  const { xaxis, yaxis, ...others } = more;
  return {
    height: narrow.matches ? 300 : 340, margin: { l: 12, r: 14, t: 14, b: 12 }, paper_bgcolor: card, plot_bgcolor: card,
    font: { family, size: 12.5, color: ink }, showlegend: false,
    hovermode: visible().length <= 5 ? "x unified" : "closest", hoverlabel: { bgcolor: card, bordercolor: line, font: { family, color: ink }, namelength: -1 },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",  // a finger scrolls the page
    ...others,
    xaxis: { ...axis, ...spike, title: { text: titles[state.x], font: { color: faint } }, uirevision: state.x, ...xaxis },
    yaxis: { ...axis, ...yaxis },
  };
}

// -------------------------------------------------------------------------------------------------------------- figures

function curves(pick, shown, more) {
  return [
    visible().flatMap((run) => {
      const series = pick(run);
      const main = series.smooth ?? series.y;
      return [...(series.smooth && state.raw ? [faint(run, series, shown(series.y))] : []), line(run, series, shown(main))];
    }),
    layout(more),
  ];
}

const same = (y) => y;
const perplexity = (y) => y.map((loss) => (loss === null ? null : Math.exp(Math.min(loss, 60))));

const figures = {
  loss() {
    const shown = state.y === "loss" ? same : perplexity;
    const [traces, form] = curves((run) => run.loss, shown, {
      height: narrow.matches ? 340 : 440, yaxis: { type: state.y === "loss" ? "linear" : "log", uirevision: state.y },
    });
    const valid = visible().map((run) => marks(run, run.valid, shown(run.valid.y), { name: `${escaped(short(run.name))}, validation` }));
    return [[...traces, ...valid], form];
  },
  scores() {
    const shown = visible().filter((run) => run.scores[value("score")]);
    return [shown.map((run) => marks(run, run.scores[value("score")], run.scores[value("score")].y, { mode: "lines+markers" })), layout()];
  },
  lr: () => curves((run) => run.lr, same, { yaxis: { exponentformat: "power", rangemode: "tozero" } }),
  norm: () => curves((run) => run.norm, same, { yaxis: { type: "log", dtick: "D2" } }),
  pace() {
    const ms = (y) => y.map((x) => (x === null ? null : 1000 * x));
    const [traces, form] = curves((run) => run.pace, ms, { yaxis: { title: { text: "milliseconds" }, type: "log", dtick: "D2" } });
    // Where refreshes are spread over all steps, rings would say nothing.
    const rings = visible().filter((run) => run.refreshed.y.length < run.pace.y.length / 4).map((run) => marks(run, run.refreshed, ms(run.refreshed.y), {
      name: `${escaped(short(run.name))}, refresh`, marker: { symbol: "circle-open", size: 8, line: { width: 1.5, color: cycle(data.colours, run.i) } },
    }));
    return [[...traces, ...rings], form];
  },
  energy() {
    const shown = visible().filter((run) => run.energy);
    return [
      shown.flatMap((run) => [
        line(run, run.energy, run.energy.stale, { name: `${escaped(short(run.name))}, old basis`, opacity: 0.5, line: { width: 1.5, dash: "2px,3px" } }),
        marks(run, run.energy, run.energy.captured, { name: `${escaped(short(run.name))}, new basis`, mode: "lines+markers", marker: { size: 7 } }),
      ]),
      layout({ yaxis: { range: [0, 1.03], tickformat: ".0%" } }),
    ];
  },
  drift() {
    const run = data.runs[value("drift-run")], field = value("drift-field"), kind = value("drift-kind");
    const { matrices, fields } = run.drift, table = fields[field];
    const name = ({ layer }) => (layer === null ? "others" : `layer ${layer}`);
    const rows = new Map();  // label -> places of its matrices
    matrices.forEach((matrix, i) => {
      if (kind && kind !== "*" && matrix.kind !== kind) return;
      const label = kind === "*" ? `${name(matrix)} ${matrix.kind}` : name(matrix);
      rows.set(label, [...(rows.get(label) ?? []), i]);
    });
    const labels = [...rows.keys()];
    const z = table ? labels.map((label) => table[0].map((_, t) => median(rows.get(label).map((i) => table[i][t])))) : [];
    const { faint, ink } = colours();
    const most = { stale: 1, captured: 1, overlap: 1, outside: 1, median_angle: 90, largest_angle: 90 }[field];
    const heat = {
      type: "heatmap", x: across(run.drift), y: labels.map((_, i) => i), z, customdata: labels.map((label) => table?.[0].map(() => label)),
      colorscale: "Viridis", xgap: 1, ygap: labels.length < 60 ? 1 : 0, zmin: most && 0, zmax: most, hoverongaps: false,
      hovertemplate: `%{customdata}<br>%{x:,.4~r} ${titles[state.x]}<br>%{z:.3~f} ${data.fields[field]}<extra></extra>`,
      colorbar: { orientation: "h", y: 1.02, yanchor: "bottom", thickness: 10, len: narrow.matches ? 1 : 0.5, x: 0, xanchor: "left", outlinewidth: 0,
        tickfont: { color: faint } },
    };
    const nothing = { text: "not logged in this run", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: { color: faint, size: 15 } };
    const skip = kind === "*" ? matrices.filter(({ layer }) => layer === matrices[0].layer).length : 1;
    const step = skip * Math.max(1, Math.ceil(labels.length / skip / 24)), ticks = labels.map((_, i) => i).filter((i) => i % step === 0);
    const height = 110 + Math.min(900, Math.max(160, labels.length * (kind === "*" ? 12 : 26)));
    const yaxis = { autorange: "reversed", tickvals: ticks, ticktext: ticks.map((i) => (kind === "*" ? labels[i].split(" ").slice(0, 2).join(" ") : labels[i])), showgrid: false };
    return [table ? [heat] : [], layout({ height, hovermode: "closest", yaxis, xaxis: { showgrid: false, showspikes: false }, annotations: table ? [] : [nothing] })];
  },
  memory() {
    const { ink, card, faint } = colours();
    const groups = data.memory.filter((group) => !hidden.has(group.run) && group.bars.length);
    const most = Math.max(1, ...groups.flatMap((group) => group.bars.map((bar) => bar.total)));
    const [unit, bytes] = most >= 2 ** 30 ? ["GiB", 2 ** 30] : ["MiB", 2 ** 20];
    let y = 0;  // downwards
    const ticks = [], texts = [], bars = [];
    for (const group of groups) {
      const alone = !group.bars[0].label;  // a plan: the name itself stands beside the bar
      if (!alone) {
        const text = `<b>${escaped(short(group.name))}</b>`;
        texts.push({ x: 0, y, xref: "paper", text, showarrow: false, xanchor: "left", xshift: -2, font: { color: ink }, bgcolor: card, borderpad: 1 });
        y += 0.85;
      }
      for (const bar of group.bars) {
        bars.push({ ...bar, y });
        ticks.push([y, escaped(bar.label || short(group.name))]);
        const text = `${(bar.total / bytes).toFixed(bytes === 2 ** 30 ? 2 : 0)} ${unit}`;
        texts.push({ x: bar.total / bytes, y, text, showarrow: false, xanchor: "left", xshift: 4, font: { color: ink }, bgcolor: card, borderpad: 1 });
        y += 1;
      }
      y += alone ? 0.15 : 0.5;
    }
    const shapes = ["", "/", ".", "x", "\\", "-", ""];
    const traces = Object.entries(data.columns).map(([name, color], i) => ({
      type: "bar", orientation: "h", name, width: 0.78, y: bars.map((bar) => bar.y), x: bars.map((bar) => (bar.parts[name] ?? 0) / bytes),
      marker: { color, line: { width: 0 }, pattern: { shape: shapes[i], fgcolor: "rgba(255,255,255,.6)", fillmode: "overlay", size: 6, solidity: 0.25 } },
      hovertemplate: `${name} %{x:.4~r} ${unit}<extra></extra>`, showlegend: bars.some((bar) => bar.parts[name] !== undefined),
    }));
    const cards = Object.entries(data.cards).filter(([, size]) => size <= 1.2 * most);
    const lines = cards.map(([, size]) => ({ type: "line", x0: size / bytes, x1: size / bytes, yref: "paper", y0: 0, y1: 1, layer: "below", line: { color: faint, width: 1, dash: "dash" } }));
    // Names of cards that would touch each other are left to the table.
    let last = -1;
    const named = cards.filter(([, size]) => size - last > most * (narrow.matches ? 0.14 : 0.06) && (last = size));
    named.forEach(([card, size]) => texts.push({ x: size / bytes, y: 1, yref: "paper", yanchor: "bottom", text: `${card} GB`, showarrow: false, font: { color: faint, size: 11 } }));
    y = Math.max(y, 3);  // also where no run is shown
    const below = narrow.matches ? 150 : 90;  // for the axis and the legend
    return [traces, layout({
      height: 26 + below + (groups.length > 8 ? 19 : 28) * y, barmode: "stack", hovermode: "closest", annotations: texts, shapes: lines, showlegend: true, margin: { l: 12, r: 14, t: 26, b: below },
      legend: { orientation: "h", yref: "container", y: 0.01, yanchor: "bottom", xref: "container", x: 0.01, traceorder: "normal", entrywidth: narrow.matches ? 72 : undefined, font: { color: ink }, itemclick: false, itemdoubleclick: false },
      xaxis: { title: { text: unit }, side: "bottom", range: [0, (narrow.matches ? 1.35 : 1.22) * most / bytes], showspikes: false, uirevision: unit, showgrid: cards.length < 3 },
      yaxis: { range: [y - 0.4, -0.7], tickvals: ticks.map((t) => t[0]), ticktext: ticks.map((t) => t[1]), showgrid: false },
    })];
  },
};

// ------------------------------------------------------------------------------------------------------------- controls

const settings = {
  responsive: true, displaylogo: false, doubleClick: "reset", displayModeBar: narrow.matches ? false : "hover",
  modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
};
const waiting = new Set(), near = new Set();

function draw() {
  for (const plot of near) {
    if (waiting.delete(plot)) Plotly.react(plot, ...figures[plot.id](), settings);
  }
}

function redraw() {
  all(".plot").forEach((plot) => waiting.add(plot));
  draw();
}

const watcher = new IntersectionObserver((entries) => {
  entries.forEach(({ target, isIntersecting }) => near[isIntersecting ? "add" : "delete"](target));
  draw();
}, { rootMargin: "600px" });
all(".plot").forEach((plot) => { waiting.add(plot); watcher.observe(plot); });
addEventListener("beforeprint", () => { all(".plot").forEach((plot) => near.add(plot)); draw(); });

function showRuns() {
  hidden.clear();
  all("input[name=run]").forEach((box) => box.checked || hidden.add(Number(box.value)));
  all("[data-run]").forEach((part) => { part.hidden = hidden.has(Number(part.dataset.run)); });
  redraw();
}

all("input[name=x], input[name=y]").forEach((choice) => choice.addEventListener("change", () => { state[choice.name] = choice.value; redraw(); }));
all("input[name=run]").forEach((box) => box.addEventListener("change", showRuns));
all("button[data-show]").forEach((button) => button.addEventListener("click", () => {
  all("input[name=run]").forEach((box) => { box.checked = button.dataset.show === "all"; });
  showRuns();
}));
document.getElementById("raw")?.addEventListener("change", (event) => { state.raw = event.target.checked; redraw(); });
all("select").forEach((choice) => choice.addEventListener("change", redraw));
all("button[data-copies]").forEach((button) => button.addEventListener("click", async () => {
  const text = document.getElementById(button.dataset.copies);
  getSelection().selectAllChildren(text);  // where a browser has no clipboard for files, a key copies it
  await navigator.clipboard?.writeText(text.textContent).then(() => { button.textContent = "Copied"; }, () => { button.textContent = "Selected"; });
}));

const theme = document.getElementById("theme");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
function showTheme() {
  theme.setAttribute("aria-pressed", isDark());
  theme.textContent = isDark() ? "Light" : "Dark";
  redraw();
}
theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; showTheme(); });
dark.addEventListener("change", showTheme);
narrow.addEventListener("change", redraw);

// A figure with the focus is read and zoomed by keys.
all(".plot").forEach((plot) => plot.addEventListener("keydown", (event) => {
  const axis = plot._fullLayout?.xaxis;
  if (!axis || !["ArrowLeft", "ArrowRight", "+", "-", "0"].includes(event.key)) return;
  event.preventDefault();
  const [low, high] = axis.range, width = high - low;
  const middle = plot.at > low && plot.at < high ? plot.at : (low + high) / 2;
  if (event.key === "0") Plotly.relayout(plot, { "xaxis.autorange": plot.id !== "memory", "yaxis.autorange": !["memory", "drift", "energy"].includes(plot.id) });
  else if (event.key.startsWith("Arrow")) {
    plot.at = Math.min(high, Math.max(low, middle + (event.key === "ArrowRight" ? width : -width) / 50));
    Plotly.Fx.hover(plot, { xval: plot.at, yval: 1 }, "xy");
  } else {
    const half = (event.key === "+" ? 0.25 : 1) * width;
    Plotly.relayout(plot, { "xaxis.range": [middle - half, middle + half] });
  }
}));

showTheme();
