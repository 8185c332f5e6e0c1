// Lines over steps as SVG: linear or logarithmic axes, an exponential moving average, values under the pointer.

import { h, number, short } from "./dom.js";

export const COLOURS = ["run0", "run1", "run2", "run3", "run4", "run5", "run6", "run7"];
const WIDTH = 360;
const HEIGHT = 210;
const [LEFT, RIGHT, TOP, BOTTOM] = [46, 8, 8, 22];

export function chart(title, lines, { logy = false, logx = false, smooth = 0 } = {}) {
  const points = (line, ys) => line.x.map((x, place) => [x, ys[place]])
    .filter(([x, y]) => Number.isFinite(y) && (!logy || y > 0) && (!logx || x > 0));
  const drawn = lines.map((line) => ({ ...line, colour: line.colour ?? shade(line.share), raw: points(line, line.y), even: points(line, average(line.y, smooth)) }));
  const all = drawn.flatMap((line) => (smooth > 0 ? [...line.raw, ...line.even] : line.raw));
  if (!all.length) return h("div", { class: "chart" }, h("h3", {}, title), h("p", { class: "note" }, "No values to draw."));
  const x = scale(all.map(([at]) => at), logx, LEFT, WIDTH - RIGHT);
  const y = scale(all.map(([, at]) => at), logy, HEIGHT - BOTTOM, TOP);
  const path = (line, kind) => {
    const found = line[kind];
    if (!found.length) return null;
    const element = found.length === 1
      ? h("path", { d: `M${x(found[0][0]) - 2} ${y(found[0][1])}h4` })
      : h("path", { d: found.map(([a, b], place) => `${place ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("") });
    element.style.stroke = line.colour;
    if (kind === "raw" && smooth > 0) element.setAttribute("class", "raw");
    element.append(h("title", {}, `${line.name}: ${short(found.at(-1)[1])} at step ${number(found.at(-1)[0])}`));
    return element;
  };
  const parts = [
    ...y.ticks.flatMap((at) => [h("line", { class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: y(at), y2: y(at) }),
      h("text", { x: LEFT - 5, y: y(at) + 4, "text-anchor": "end" }, short(at))]),
    ...x.ticks.map((at) => h("text", { x: Math.min(x(at), WIDTH - 16), y: HEIGHT - 6, "text-anchor": "middle" }, compact(at))),
    ...drawn.map((line) => path(line, "raw")), ...(smooth > 0 ? drawn.map((line) => path(line, "even")) : []),
  ];
  const last = drawn.filter((line) => line.raw.length).map((line) => `${line.name} ${short(line.raw.at(-1)[1])}`);
  return h("div", { class: "chart" }, h("h3", {}, title),
    h("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}, last values: ${last.join(", ")}` }, parts),
    h("ul", { class: "legend" }, drawn.filter((line) => line.raw.length).map((line) => {
      const mark = h("span", { class: "swatch" });
      mark.style.background = line.colour;
      return h("li", {}, mark, `${line.name}: ${short(line.raw.at(-1)[1])}`);
    })));
}

const shade = (share) => `color-mix(in oklab, var(--run0) ${Math.round(100 * (1 - share))}%, var(--run1))`;
const compact = (value) => (value >= 10000 ? `${short(value / 1000)}k` : number(value));

// The moving average of TensorBoard, corrected for its start.
export function average(values, weight) {
  let total = 0;
  let count = 0;
  return values.map((value) => {
    if (!Number.isFinite(value)) return value;
    total = weight * total + (1 - weight) * value;
    count += 1;
    return total / (1 - weight ** count);
  });
}

function scale(values, logarithmic, from, to) {
  let [low, high] = values.reduce(([a, b], one) => [Math.min(a, one), Math.max(b, one)], [Infinity, -Infinity]);
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) [low, high] = logarithmic ? [low / 1.5, high * 1.5] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const turn = logarithmic ? Math.log : (one) => one;
  const place = (one) => from + ((turn(one) - turn(low)) / (turn(high) - turn(low))) * (to - from);
  place.ticks = logarithmic ? logTicks(low, high) : ticks(low, high);
  return place;
}

function ticks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high * (1 + 1e-12) + 1e-12 && found.length < 12; at += 1) found.push(Number((at * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  for (const digits of [[1, 2, 3, 5], [1, 3], [1]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      found.push(...digits.map((one) => Number((one * 10 ** power).toPrecision(6))).filter((one) => one >= low && one <= high));
    }
    if (found.length <= 7) return found.length > 1 ? found : ticks(low, high).filter((one) => one > 0);
  }
  return [low, high];
}
