// Review: verdicts by keyboard or button, each published at once; undo; and the takedown list, which stays apart.

import { ask, h, number } from "./dom.js";
import { focusRow, rowOf, shownKeys } from "./rows.js";
import { change, state } from "./state.js";

const NAMES = { reject: "rejected by review", keep: "kept by review" };
const undone = []; // the verdicts before each change, newest last
const known = new Map(); // key → {verdict, note}, as last answered
let queue = Promise.resolve();
let counts = null;
let locked = false;

export function setReadOnly(value) { locked = value; }
export const readOnly = () => locked;
export const reviewing = () => state.review !== "" && !locked;

export function note(rows) {
  for (const row of rows) known.set(row.key, { verdict: row.verdict ?? "", note: row.note ?? "" });
}

export const verdictOf = (key) => known.get(key)?.verdict ?? "";
const noteOf = (key) => known.get(key)?.note ?? "";

// Publish verdicts [{key, verdict, note}], one change after the other; `remember` for undo.
function give(verdicts, remember = true) {
  queue = queue.then(async () => {
    const answer = await ask(`/api/review/${state.review}`, { verdicts });
    if (remember) undone.push(answer.before);
    note(verdicts);
    counts = answer;
    verdicts.forEach(({ key }) => mark(key));
    showCounts();
  }).catch(() => {}); // `ask` has shown the problem; the page shows what is published
  return queue;
}

export function judge(key, verdict) {
  return give([{ key, verdict: verdictOf(key) === verdict ? "" : verdict, note: noteOf(key) }]);
}

export async function undo() {
  await queue;
  const before = undone.pop();
  if (!before) return;
  await give(before, false);
  focusRow(before[0].key);
}

export const badge = (key) => {
  const verdict = state.review ? verdictOf(key) : "";
  return h("span", { class: `badge ${verdict}`, hidden: !verdict }, NAMES[verdict] ?? "");
};

function mark(key) {
  const row = rowOf(key);
  row?.querySelector(".badge")?.replaceWith(badge(key));
  for (const button of document.querySelectorAll(`[data-judge="${key}"]`)) {
    button.setAttribute("aria-pressed", String(verdictOf(key) === button.value));
  }
}

// Buttons and a note for one row, in its detail.
export function panel(key) {
  if (!reviewing()) return null;
  const button = (verdict, title) => h("button", { class: "plain", value: verdict, "data-judge": key,
    "aria-pressed": String(verdictOf(key) === verdict), onclick: () => judge(key, verdict) }, title);
  const text = h("input", { value: noteOf(key), placeholder: "Note", "aria-label": "Note of the verdict", maxlength: 1000 });
  text.addEventListener("change", () => give([{ key, verdict: verdictOf(key) || "reject", note: text.value }]));
  return h("div", { class: "buttons judge" }, button("reject", "Reject (x)"), button("keep", "Keep (y)"), text);
}

const line = h("p", { class: "note", "aria-live": "polite" });
function showCounts() {
  line.textContent = counts ? `${number(counts.reject)} rejected, ${number(counts.keep)} kept` : "";
}

export function reviewSection() {
  if (locked) return null;
  const section = h("details", { id: "review", open: matchMedia("(min-width: 761px)").matches || state.review !== "" },
    h("summary", {}, h("h2", {}, "Review")));
  const body = h("div");
  section.append(body);
  if (state.review) active(body);
  else choose(body);
  return section;
}

function choose(body) {
  const name = h("input", { id: "review-name", value: "review", pattern: "[A-Za-z0-9_\\-]{1,64}", required: true, list: "reviews" });
  const list = h("datalist", { id: "reviews" });
  const form = h("form", {}, h("label", { for: "review-name" }, "Name of the review"), name, list,
    h("div", { class: "buttons" }, h("button", {}, "Start")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    undone.length = 0;
    change({ review: name.value });
  });
  body.append(form);
  ask("/api/reviews").then(({ reviews }) => list.append(...reviews.map((one) => h("option", { value: one.name },
    `${number(one.reject)} rejected, ${number(one.keep)} kept`)))).catch(() => {});
}

function active(body) {
  const filter = h("select", { id: "verdict" }, [["", "all rows"], ["none", "not reviewed"], ["reject", "rejected"], ["keep", "kept"]]
    .map(([value, title]) => h("option", { value, selected: state.verdict === value }, title)));
  filter.addEventListener("change", () => change({ verdict: filter.value }));
  const step = `- review: ${state.review}`;
  const yaml = h("pre", { class: "yaml", tabindex: "0", "aria-label": "Step for a recipe" }, `select:\n  ${step}`);
  body.append(h("p", {}, "Review ", h("b", {}, state.review)), line,
    h("label", { for: "verdict" }, "Show"), filter,
    h("div", { class: "buttons" }, h("button", { class: "plain", onclick: undo }, "Undo (u)"),
      h("button", { class: "plain", onclick: () => change({ review: "", verdict: "" }) }, "End")),
    h("dl", { class: "keys" }, [["j k", "next and previous row"], ["x", "reject"], ["y", "keep"], ["u", "undo"], ["Enter", "open"]]
      .flatMap(([key, does]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, does)])),
    h("p", { class: "note" }, "A verdict is saved at once and changes nothing yet. This step of a recipe rejects what the review rejects:"), yaml);
  ask("/api/reviews").then(({ reviews }) => {
    counts = reviews.find((one) => one.name === state.review) ?? { reject: 0, keep: 0 };
    showCounts();
  }).catch(() => {});
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea") || state.view) return;
  const open = document.getElementById("detail").open;
  if (!open && (event.key === "j" || event.key === "k")) {
    event.preventDefault();
    move(event.key === "j" ? 1 : -1);
  }
  if (!reviewing()) return;
  if (event.key === "u") undo();
  const verdict = { x: "reject", y: "keep" }[event.key];
  const key = open ? state.key : document.activeElement?.closest("#rows [data-key]")?.dataset.key;
  if (!verdict || !key) return;
  event.preventDefault();
  const again = verdictOf(key) === verdict;
  judge(key, verdict);
  if (!open && !again) move(1);
});

function move(step) {
  const keys = shownKeys();
  const here = keys.indexOf(document.activeElement?.closest("#rows [data-key]")?.dataset.key);
  const next = here < 0 ? 0 : Math.min(Math.max(here + step, 0), keys.length - 1);
  if (keys.length) focusRow(keys[next]);
}
