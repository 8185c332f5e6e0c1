// One row: its image, what is known of it, and its captions in every layer.

import { captionsSection } from "./captions.js";
import { ask, h, short } from "./dom.js";
import { note, panel, readOnly, reviewing } from "./review.js";
import { neighbour, picture } from "./rows.js";
import { likeButton } from "./similar.js";
import { change, state } from "./state.js";
import { takedownPanel } from "./takedown.js";
import { visible } from "./words.js";

const dialog = document.getElementById("detail");
dialog.addEventListener("close", () => change({ key: "" }));
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
document.addEventListener("keydown", (event) => {
  if (!dialog.open || event.target.matches("input, select, textarea")) return;
  const step = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
  const next = step && neighbour(state.key, step);
  if (next) change({ key: next });
});

export async function showDetail() {
  if (!state.key) {
    if (dialog.open) dialog.close();
    return;
  }
  const { row, scores, card, captions, before, after } = await ask(`/api/row/${state.key}${reviewing() ? `?review=${state.review}` : ""}`);
  note([card]);
  const twin = row.outcome === "duplicate" && /^[0-9a-f]{32}$/.test(row.detail)
    ? (await ask(`/api/row/${row.detail}`)).card : null;
  const close = h("button", { class: "close", "aria-label": "Close", onclick: () => dialog.close() }, "×");
  const steps = [["Previous key", before], ["Next key", after]].map(([title, key]) =>
    h("button", { class: "plain", disabled: !key, onclick: () => change({ key }) }, title));
  const copy = h("button", { class: "plain" }, "Copy key");
  copy.addEventListener("click", () => navigator.clipboard?.writeText(row.key).then(() => { copy.textContent = "Copied"; }));
  const parts = [close,
    h("div", { class: "big" }, picture(card, 0), twin ? h("figure", {}, picture(twin, 0),
      h("figcaption", {}, h("button", { class: "plain", onclick: () => change({ key: twin.key }) }, "The image that was kept"))) : null),
    ...player(row.key, scores),
    h("h2", {}, visible(row.caption || "no caption")),
    h("p", { class: `outcome ${row.outcome}` }, visible([row.outcome, row.reason, row.detail].filter(Boolean).join(": "))),
    panel(row.key),
    h("div", { class: "buttons" }, copy, likeButton(card), steps),
    captions.length ? captionsSection(row, captions, readOnly()) : null,
    Object.keys(scores).length ? facts("Scores", scores) : null,
    facts("Row", row),
    readOnly() ? null : takedownPanel(row.key)];
  dialog.replaceChildren(...parts.filter(Boolean));
  if (!dialog.open) dialog.showModal();
}

// A clip's video, and its sound, which is a file of its own and follows the video.
function player(key, facts) {
  const video = facts.codec === "h264" ? h("video", { src: `/part/${key}/mp4`, controls: true, loop: true,
    preload: "metadata", poster: `/image/${key}/0`, "aria-label": "The clip" }) : null;
  const sound = facts.channels > 0 ? h("audio", { src: `/part/${key}/flac`, controls: true, loop: true,
    preload: "metadata", "aria-label": "The clip's sound" }) : null;
  if (video && sound) {
    const follow = () => { if (Math.abs(sound.currentTime - video.currentTime) > 0.1) sound.currentTime = video.currentTime; };
    video.addEventListener("play", () => { follow(); sound.play(); });
    video.addEventListener("pause", () => sound.pause());
    for (const event of ["seeked", "timeupdate"]) video.addEventListener(event, follow);
  }
  return [video, sound].filter(Boolean).map((element) => h("p", { class: "play" }, element));
}

function facts(title, values) {
  const lines = Object.entries(values).filter(([, value]) => value !== "" && value !== null);
  return h("section", {}, h("h3", {}, title), h("dl", {}, lines.flatMap(([name, value]) => [
    h("dt", {}, name), h("dd", {}, typeof value === "number" ? short(value) : visible(String(value)))])));
}
