// Work that is being done to the dataset: stages with units, rates and failures; asked again every few seconds.

import { ask, h, number } from "./dom.js";

const box = document.getElementById("running");
const OFTEN = 3000;
const SELDOM = 15000;

let shown = () => {};

// `reload` shows the rows of the dataset once the server has opened them as they are now.
export function watchRunning(reload) {
  shown = reload;
  return watch();
}

async function watch() {
  let wait = SELDOM;
  if (!document.hidden) {
    const now = await ask("/api/running").catch(() => null);
    if (now) {
      show(now);
      wait = now.writers.length || !now.finished ? OFTEN : SELDOM;
    }
  }
  setTimeout(watch, wait);
}

function show(now) {
  const work = now.writers.filter((one) => one.command !== "view");
  box.hidden = !work.length && now.finished && !now.changed && !now.jobs.length;
  if (box.hidden) return;
  const stages = work.length || !now.finished ? now.stages : [];
  box.replaceChildren(
    h("h2", {}, work.length ? "Running" : now.finished ? "New rows" : "Not finished"),
    h("p", {}, work.length
      ? work.map((one) => `capstan ${one.command}, process ${one.pid} on ${one.host}, seen ${Math.round(one.ago_s)} s ago`).join(" · ")
      : now.finished ? "The dataset has changed since this page was opened." : "Nothing works on it now. The same capstan build resumes it."),
    ...now.jobs.map((job) => h("p", {}, `job ${job.id} on ${job.target}: ${job.command}`)),
    h("ul", { class: "stages" }, stages.map(stage)),
    now.finished ? "" : h("p", {}, `Staged: ${number(now.staged.rows)} of ${number(now.staged.planned)} rows, ${number(now.staged.images)} with an image`),
    now.changed ? h("div", { class: "buttons" }, h("button", { onclick: reopen }, "Show the rows as they are now")) : "",
  );
}

function stage(one) {
  const share = one.total ? one.done / one.total : null;
  const rates = [
    one.samples ? `${number(one.samples)} rows` : "",
    one.samples_per_s === null ? "" : `${number(Number(one.samples_per_s.toPrecision(3)))} rows/s`,
    one.units_per_minute === null ? "" : `${number(Number(one.units_per_minute.toPrecision(3)))} units/min`,
    one.left_s ? `${clock(one.left_s)} left` : "",
  ].filter(Boolean).join(" · ");
  const failed = Object.entries(one.failed).map(([reason, rows]) => `${reason} ${number(rows)}`).join(", ");
  const bad = Object.entries(one.quarantined).map(([unit, reason]) => h("p", { class: "outcome failed" }, `unit ${unit} is quarantined: ${reason}`));
  return h("li", {}, h("div", { class: "stage" }, h("b", {}, one.title),
    share === null ? h("span") : h("progress", { value: share, max: 1, "aria-label": `${one.title}: share of units done` }),
    h("span", { class: "count" }, `${number(one.done)}${one.total ? ` of ${number(one.total)}` : ""} units`)),
    rates ? h("p", { class: "note" }, rates) : "", failed ? h("p", { class: "outcome failed" }, `failed: ${failed}`) : "", bad);
}

async function reopen() {
  await ask("/api/reopen", {});
  await shown();
  box.querySelector(".buttons")?.remove();
}

function clock(seconds) {
  const minutes = Math.round(seconds / 60);
  return minutes < 1 ? `${Math.ceil(seconds)} s` : minutes < 90 ? `${minutes} min` : `${(minutes / 60).toFixed(1)} h`;
}
