// Start: what the dataset is, then the parts of the page, which follow the state in the address.

import { showDetail } from "./detail.js";
import { ask, number } from "./dom.js";
import { setReadOnly } from "./review.js";
import { showRows } from "./rows.js";
import { watchRunning } from "./running.js";
import { showSide } from "./side.js";
import { showSimilar } from "./similar.js";
import { onchange, state } from "./state.js";
import { loadTakedown } from "./takedown.js";
import { showView } from "./views.js";

let dataset;
const load = async () => {
  dataset = await ask("/api/dataset");
  document.title = `${dataset.dataset} – Capstan`;
  document.getElementById("name").textContent = dataset.dataset;
  const kept = dataset.outcomes.filter((one) => one.outcome === "kept").reduce((sum, one) => sum + one.rows, 0);
  document.getElementById("counts").textContent = [
    `${number(dataset.rows)} rows`,
    dataset.finished ? `${number(kept)} kept` : "not finished: what is staged so far",
    dataset.layers.length ? `${dataset.layers.length} caption ${dataset.layers.length === 1 ? "layer" : "layers"}` : "no caption layers",
  ].join(" · ");
};
await load();
setReadOnly(dataset.read_only);
await loadTakedown();

const showMain = () => (state.like || state.text ? showSimilar() : showRows());
const failed = () => {}; // `ask` has shown the problem already
onchange((names) => {
  if (names.some((name) => ["outcome", "reason", "where", "order", "descending", "look", "review", "verdict", "like", "text"].includes(name))) {
    showSide(dataset);
    showMain().catch(failed);
  }
  if (names.includes("view")) showView(dataset.read_only);
  if (names.includes("key")) showDetail().catch(failed);
});
showSide(dataset);
showView(dataset.read_only);
await showMain().catch(failed);
if (state.key) await showDetail().catch(failed);
document.body.dataset.ready = "yes";
watchRunning(async () => {
  await load();
  showSide(dataset);
  await showMain();
  if (dataset.preparing) setTimeout(watch, 1500);
});

// Until the index of a large dataset is built, answers are samples; then they are asked again.
const watch = async () => {
  const now = await ask("/api/dataset").catch(() => dataset);
  if (now.preparing) return setTimeout(watch, 1500);
  dataset = now;
  showSide(dataset);
  return showMain().catch(failed);
};
if (dataset.preparing) setTimeout(watch, 1500);
