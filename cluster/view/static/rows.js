// The rows as a grid of images or a table, page by page.

import { ask, h, number } from "./dom.js";
import { badge, note } from "./review.js";
import { change, state } from "./state.js";
import { visible } from "./words.js";

const main = document.getElementById("rows");
let asked = 0;
let shown = [];

export async function showRows() {
  const own = ++asked;
  const query = new URLSearchParams({ where: state.where, outcome: state.outcome, reason: state.reason,
    order: state.order, descending: state.descending, look: state.look, review: state.review, verdict: state.verdict });
  const page = await ask(`/api/rows?${query}`);
  if (own !== asked) return; // a later question was asked meanwhile
  shown = page.rows;
  const list = state.look === "table" ? h("tbody") : h("ul", { class: "grid" });
  const title = h("p", { class: "total" }, page.low === null
    ? `${number(page.total)} ${page.total === 1 ? "row" : "rows"}`
    : `about ${number(page.total)} rows, ${number(page.low)} to ${number(page.high)} by a sample`);
  main.replaceChildren(title, state.look === "table" ? table(list) : list);
  fill(list, page.rows);
  more(list, query, page.next, own);
}

// Show rows that are not a page of the ledger, in their order, below a title.
export function showFound(title, rows) {
  asked += 1;
  shown = rows;
  const list = state.look === "table" ? h("tbody") : h("ul", { class: "grid" });
  main.replaceChildren(title, state.look === "table" ? table(list) : list);
  fill(list, rows);
}

export const shownKeys = () => shown.map((row) => row.key);
export const rowOf = (key) => main.querySelector(`[data-key="${key}"]`);

export function focusRow(key) {
  const row = rowOf(key);
  row?.querySelector("button").focus({ preventScroll: true });
  row?.scrollIntoView({ block: "nearest" });
}

export const neighbour = (key, step) => shown[shown.findIndex((row) => row.key === key) + step]?.key;

function fill(list, rows) {
  note(rows);
  list.append(...rows.map(state.look === "table" ? line : card));
}

function more(list, query, next, own) {
  if (!next) return;
  const button = h("button", { class: "more", onclick: load }, "More rows");
  main.append(button);
  const watch = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && load(), { rootMargin: "600px" });
  watch.observe(button);
  async function load() {
    watch.disconnect();
    button.remove();
    const page = await ask(`/api/rows?${query}&after=${encodeURIComponent(JSON.stringify(next))}`);
    if (own !== asked) return;
    shown = shown.concat(page.rows);
    fill(list, page.rows);
    more(list, query, page.next, own);
  }
}

export function picture(row, side = 256) {
  if (!row.image) return h("span", { class: "empty" }, row.why);
  const image = h("img", { src: `/image/${row.key}/${side}`, alt: row.caption.trim().slice(0, 200) || "no caption", loading: "lazy" });
  image.addEventListener("error", () => image.replaceWith(h("span", { class: "empty" }, row.why)));
  return image;
}

export function card(row) {
  const why = row.outcome === "kept" ? null : h("span", { class: `outcome ${row.outcome}` }, [row.outcome, row.reason].filter(Boolean).join(": "));
  return h("li", { "data-key": row.key }, h("button", { class: "card", onclick: () => change({ key: row.key }) },
    picture(row), badge(row.key), why, h("span", { class: "caption" }, visible(row.caption || "no caption"))));
}

function table(body) {
  const names = ["image", "caption", "outcome", "reason", "detail", "source size", "URL", "key"];
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col" }, name)))), body));
}

function line(row) {
  const cells = [visible(row.caption), row.outcome, row.reason, visible(row.detail),
    row.original_width ? `${row.original_width} × ${row.original_height}` : "", visible(row.url), row.key];
  return h("tr", { "data-key": row.key, onclick: () => change({ key: row.key }) },
    h("td", {}, h("button", { class: "thumb", "aria-label": row.image ? "Show this row" : `Show this row: ${row.why}` }, picture(row)), badge(row.key)), cells.map((cell, place) => h("td", { class: place === 1 || place === 2 ? "word" : "" }, cell)));
}
