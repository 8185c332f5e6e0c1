// A histogram whose threshold can be dragged; the images nearest to it are shown on both sides.

import { ask, debounce, h, short } from "./dom.js";
import { card } from "./rows.js";

const WIDTH = 300;
const HEIGHT = 110;
const FOOT = 18;

export async function histogram(subject, set) {
  const found = await ask(`/api/histogram?subject=${encodeURIComponent(subject.title)}`);
  if (!found) return h("p", { class: "note" }, "All values are the same, or there are none.");
  const { edges, kept, others, whole } = found;
  const most = Math.max(...kept.map((count, place) => count + others[place]), 1);
  const step = WIDTH / kept.length;
  const bars = kept.flatMap((count, place) => {
    const high = (HEIGHT * count) / most;
    const rest = (HEIGHT * others[place]) / most;
    const title = `${short(edges[place])} – ${short(edges[place + 1])}: ${count} kept, ${others[place]} not`;
    return [
      h("rect", { class: "bar-kept", x: place * step, y: HEIGHT - high, width: Math.max(step - 1, 0.5), height: high }, h("title", {}, title)),
      h("rect", { class: "bar-other", x: place * step, y: HEIGHT - high - rest, width: Math.max(step - 1, 0.5), height: rest }, h("title", {}, title)),
    ];
  });
  const line = h("line", { class: "threshold", y1: 0, y2: HEIGHT });
  const ends = [h("text", { x: 0, y: HEIGHT + FOOT - 4 }, short(edges[0])),
    h("text", { x: WIDTH, y: HEIGHT + FOOT - 4, "text-anchor": "end" }, short(edges.at(-1)))];
  const plot = h("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT + FOOT}`, class: "histogram", role: "img",
    "aria-label": `Histogram of ${subject.title}` }, bars, line, ends);

  const existing = subject.thresholds[0];
  const slider = h("input", { type: "range", min: 0, max: 1000, "aria-label": `Threshold of ${subject.title}` });
  const value = h("output");
  const side = h("select", { "aria-label": "Keep" }, h("option", { value: ">=" }, "keep at least"), h("option", { value: "<=" }, "keep at most"));
  const near = h("div", { class: "near" });

  // The axis may be logarithmic: a place between two edges is interpolated between them.
  const at = (share) => {
    const place = Math.min(share * kept.length, kept.length - 1e-9);
    const low = Math.floor(place);
    return edges[low] + (edges[low + 1] - edges[low]) * (place - low);
  };
  const shareOf = (number) => {
    if (number <= edges[0]) return 0;
    const high = edges.findIndex((edge) => edge >= number);
    if (high < 0) return 1;
    return (high - 1 + (number - edges[high - 1]) / (edges[high] - edges[high - 1])) / kept.length;
  };
  const rounded = (number) => (whole ? Math.round(number) : Number(number.toPrecision(4)));
  const look = debounce(async (threshold) => {
    const { below, above } = await ask(`/api/nearest?subject=${encodeURIComponent(subject.title)}&threshold=${threshold}`);
    near.replaceChildren(h("h3", {}, "just below"), h("ul", { class: "grid small" }, below.map(card)),
      h("h3", {}, "at or just above"), h("ul", { class: "grid small" }, above.map(card)));
  }, 300);
  const show = (tell) => {
    const share = slider.value / 1000;
    const threshold = tell || !existing ? rounded(at(share)) : existing.value;
    line.setAttribute("x1", share * WIDTH);
    line.setAttribute("x2", share * WIDTH);
    value.textContent = short(threshold);
    if (tell) set(existing ? existing.condition : name(subject), `${subject.sql} ${side.value} ${threshold}`);
    look(threshold);
  };
  slider.addEventListener("input", () => show(true));
  side.addEventListener("change", () => show(true));
  let dragging = false;
  const drag = (event) => {
    const box = plot.getBoundingClientRect();
    slider.value = Math.round((1000 * (event.clientX - box.left)) / box.width);
    show(true);
  };
  plot.addEventListener("pointerdown", (event) => { dragging = true; plot.setPointerCapture(event.pointerId); drag(event); });
  plot.addEventListener("pointermove", (event) => dragging && drag(event));
  plot.addEventListener("pointerup", () => { dragging = false; });

  slider.value = existing ? Math.round(1000 * shareOf(existing.value)) : 500;
  if (existing && ["≤", "<"].includes(existing.operator)) side.value = "<=";
  show(false);
  return h("div", {}, plot, slider, h("div", { class: "buttons" }, side, value), near);
}

const name = (subject) => subject.title.toLowerCase().replace(/[^a-z0-9]+/g, "_").replace(/^_|_$/g, "").slice(0, 30);
