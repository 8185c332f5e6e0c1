// Training runs: a table, one step slider over the grids of the chosen runs, curves; all of it follows runs that train.

import { chart, COLOURS } from "./chart.js";
import { ask, h, number, short } from "./dom.js";

const EVERY_MS = 2000;
const MOST = COLOURS.length; // runs compared at once
const EMPTY = { runs: "", step: "", smooth: "0.6", logy: "1", logx: "" };
const state = { ...EMPTY, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
const curves = new Map(); // id → {step, series}
const parts = Object.fromEntries(["runs", "samples", "curves"].map((id) => [id, document.getElementById(id)]));
let runs = [];

function change(values) {
  Object.assign(state, values);
  const said = Object.entries(state).filter(([name, value]) => name in EMPTY && value !== EMPTY[name]);
  history.replaceState(null, "", said.length ? `#${new URLSearchParams(said)}` : location.pathname);
}

const chosen = () => {
  const ids = state.runs ? state.runs.split(",") : runs.slice(0, 4).map((run) => run.id);
  return runs.filter((run) => ids.includes(run.id)).slice(0, MOST);
};
const colour = (run) => `var(--${COLOURS[chosen().indexOf(run)] ?? "lost"})`;

function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function showTable() {
  const measures = [...new Set(runs.flatMap((run) => Object.keys(run.evaluation)))].slice(0, 6);
  const names = ["run", "model", "state", "step", "loss", "images/s", "MFU", "time", ...measures, "samples", "checkpoints"];
  const body = runs.map((run) => {
    const box = h("input", { type: "checkbox", id: `run-${run.id}`, checked: chosen().includes(run) });
    box.addEventListener("change", () => {
      const ids = chosen().map((one) => one.id).filter((id) => id !== run.id);
      change({ runs: (box.checked ? [...ids, run.id].slice(-MOST) : ids).join(",") || "none" });
      showTable();
      showSamples();
      refreshCurves();
    });
    const swatch = h("span", { class: "swatch" });
    swatch.style.background = chosen().includes(run) ? colour(run) : "transparent";
    const cells = [run.model, h("span", { class: `state ${run.state}` }, run.state), `${number(run.step)} of ${number(run.steps)}`,
      value(run.loss), value(run.images_per_s), run.mfu === null ? "–" : `${(100 * run.mfu).toFixed(1)}%`, duration(run.seconds),
      ...measures.map((name) => value(run.evaluation[name] ?? null)), number(run.grids.length),
      run.checkpoints.length ? `${number(run.checkpoints.length)}, newest ${number(run.checkpoints.at(-1))}` : "–"];
    return h("tr", {}, h("td", {}, box, swatch, h("label", { for: `run-${run.id}` }, run.name)), cells.map((cell) => h("td", {}, cell)));
  });
  const kept = document.activeElement?.id;
  parts.runs.replaceChildren(h("h2", {}, "Runs"), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of runs" },
    h("table", {}, h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, body))));
  if (kept?.startsWith("run-")) document.getElementById(kept)?.focus();
}

const value = (one) => (one === null ? "–" : short(one));

let shownSamples = "";
function showSamples() {
  const with_ = chosen().filter((run) => run.grids.length);
  const steps = [...new Set(with_.flatMap((run) => run.grids))].sort((a, b) => a - b);
  const now = JSON.stringify([with_.map((run) => [run.id, run.grids]), state.runs]);
  if (now === shownSamples) return;
  shownSamples = now;
  if (!steps.length) {
    parts.samples.replaceChildren(h("h2", {}, "Samples"), h("p", { class: "note" }, "The chosen runs have none. train.watch.samples in a recipe draws them."));
    return;
  }
  const at = state.step ? Math.max(steps.findLastIndex((step) => step <= Number(state.step)), 0) : steps.length - 1;
  const slider = h("input", { type: "range", id: "step", min: 0, max: steps.length - 1, value: at });
  const said = h("output", { for: "step" });
  const sheets = h("div", { class: "sheets" });
  const same = new Set(with_.map((run) => run.prompts)).size < 2;
  const figures = with_.map((run) => {
    const image = h("img", { alt: "" });
    const caption = h("figcaption");
    image.addEventListener("error", () => { caption.textContent = `${run.name}: this grid cannot be read`; });
    return { run, image, caption, figure: h("figure", {}, caption, image) };
  });
  sheets.append(...figures.map((one) => one.figure));
  const show = () => {
    const step = steps[slider.value];
    said.textContent = `step ${number(step)}`;
    slider.setAttribute("aria-valuetext", said.textContent);
    for (const { run, image, caption } of figures) {
      const own = run.grids.findLast((one) => one <= step) ?? run.grids[0];
      const mark = h("span", { class: "swatch" });
      mark.style.background = colour(run);
      caption.replaceChildren(mark, `${run.name}, step ${number(own)}`);
      image.alt = `Samples of ${run.name} after step ${own}`;
      const source = `/grid/${run.id}/${own}`;
      if (image.getAttribute("src") !== source) image.src = source;
    }
  };
  slider.addEventListener("input", () => {
    change({ step: Number(slider.value) === steps.length - 1 ? "" : String(steps[slider.value]) });
    show();
  });
  show();
  parts.samples.replaceChildren(h("h2", {}, "Samples"),
    h("div", { class: "slider" }, h("label", { for: "step" }, "Step of all grids"), slider, said),
    ...(same ? [] : [h("p", { class: "note" }, "These runs have different prompts.")]), sheets);
}

async function refreshCurves() {
  const stale = chosen().filter((run) => curves.get(run.id)?.stamp !== stamp(run));
  for (const run of stale) {
    const { series } = await ask(`/api/run/${run.id}`);
    curves.set(run.id, { stamp: stamp(run), series });
  }
  drawCurves();
}
const stamp = (run) => `${run.step} ${JSON.stringify(run.evaluation)}`;

const TITLES = { loss: "Loss", grad_norm: "Norm of the gradient", lr: "Learning rate", images_per_s: "Images per second", mfu: "MFU",
  data_wait: "Share of time spent waiting for data", memory_gib: "Peak memory of a GPU, GiB", host_memory_gib: "Memory of a worker, GiB" };
const GROUPS = { loss_by_time: "Loss by timestep", blend: "Captions shown, by slot" };
const HIDDEN = ["samples", "epoch", "flops_per_s", "skipped"];
const LOG = ["loss", "grad_norm", "lr", "loss_by_time"];

const charts = h("div", { class: "charts" });
function drawCurves() {
  const shown = chosen().filter((run) => curves.has(run.id));
  const names = [...new Set(shown.flatMap((run) => Object.keys(curves.get(run.id).series)))];
  const plain = names.filter((name) => !HIDDEN.includes(name) && !(name.split("/")[0] in GROUPS));
  const first = Object.keys(TITLES);
  const rank = (name) => (first.includes(name) ? first.indexOf(name) : name.startsWith("evaluation/") ? 0.5 : 99);
  plain.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  const options = (name) => ({ logy: state.logy === "1" && LOG.includes(name), logx: state.logx === "1", smooth: Number(state.smooth) });
  const drawn = plain.map((name) => {
    const lines = shown.filter((run) => name in curves.get(run.id).series)
      .map((run) => ({ name: run.name, colour: colour(run), ...curves.get(run.id).series[name] }));
    const smooth = name.startsWith("evaluation/") || name === "lr" ? 0 : Number(state.smooth);
    return chart(TITLES[name] ?? name.replace("evaluation/", "Evaluation: "), lines, { ...options(name), smooth });
  });
  for (const [group, title] of Object.entries(GROUPS)) {
    for (const run of shown) {
      const { series } = curves.get(run.id);
      const within = names.filter((name) => name.startsWith(`${group}/`) && name in series);
      const lines = within.map((name, place) => ({ name: name.slice(group.length + 1), share: within.length > 1 ? place / (within.length - 1) : 0, ...series[name] }));
      if (lines.length) drawn.push(chart(`${title}: ${run.name}`, lines, options(group)));
    }
  }
  charts.replaceChildren(...drawn);
}

function showCurves() {
  const check = (id, title) => {
    const box = h("input", { type: "checkbox", id, checked: state[id] === "1" });
    box.addEventListener("change", () => { change({ [id]: box.checked ? "1" : "" }); drawCurves(); });
    return h("label", { class: "check", for: id }, box, title);
  };
  const smooth = h("input", { type: "range", id: "smooth", min: 0, max: 0.99, step: 0.01, value: state.smooth });
  smooth.addEventListener("input", () => { change({ smooth: smooth.value }); drawCurves(); });
  parts.curves.replaceChildren(h("h2", {}, "Curves"), h("div", { class: "slider" }, check("logy", "logarithmic loss"), check("logx", "logarithmic steps"),
    h("label", { for: "smooth" }, "Smoothing"), smooth), charts);
}

async function refresh() {
  const answer = await ask("/api/runs");
  const before = JSON.stringify(runs);
  runs = answer.runs;
  document.title = `${answer.folder} – Capstan`;
  document.getElementById("name").textContent = answer.folder;
  const live = runs.filter((run) => run.state === "training").length;
  document.getElementById("counts").textContent = `${number(runs.length)} ${runs.length === 1 ? "run" : "runs"}${live ? ` · ${number(live)} training` : ""}`;
  if (JSON.stringify(runs) === before) return;
  showTable();
  showSamples();
  await refreshCurves();
}

showCurves();
await refresh();
document.body.dataset.ready = "yes";
const follow = async () => {
  if (!document.hidden) await refresh().catch(() => {}); // `ask` has shown the problem; the next look may succeed
  setTimeout(follow, EVERY_MS);
};
setTimeout(follow, EVERY_MS);
