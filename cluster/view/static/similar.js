// Rows like an image or like a text, by the embeddings that the dataset keeps.

import { ask, h, number } from "./dom.js";
import { showFound } from "./rows.js";
import { change, state } from "./state.js";

let kept = false;

export function searchSection() {
  kept = true;
  const words = h("input", { id: "text", value: state.text, placeholder: "two dogs on a beach", autocomplete: "off" });
  const form = h("form", {}, h("label", { for: "text" }, "Images like these words"), words, h("div", { class: "buttons" },
    h("button", {}, "Search"),
    state.like || state.text ? h("button", { type: "button", class: "plain", onclick: () => change({ like: "", text: "" }) }, "Back to all rows") : null));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    change({ text: words.value.trim(), like: "" });
  });
  return h("section", {}, h("h2", {}, "Search"), form);
}

export function likeButton(card) {
  if (!kept || !card.image) return null;
  return h("button", { class: "plain", onclick: () => change({ key: "", like: card.key, text: "", view: "" }) }, "More like this");
}

export async function showSimilar() {
  const query = state.like ? { key: state.like } : { text: state.text };
  const own = JSON.stringify(query);
  for (;;) {
    const found = await ask(`/api/similar?${new URLSearchParams(query)}`);
    if (own !== JSON.stringify(state.like ? { key: state.like } : { text: state.text })) return; // another was asked meanwhile
    if (found.rows) return showFound(title(found), found.rows);
    showFound(h("p", { class: "total" }, `Reading the embeddings: ${Math.round(100 * found.preparing)}%. This is done once.`), []);
    await new Promise((done) => setTimeout(done, 1000));
  }
}

function title(found) {
  const what = state.like ? `image ${state.like.slice(0, 8)}` : `“${state.text}”`;
  const cosines = found.rows.map((row) => row.cosine);
  const range = cosines.length ? `, cosine ${cosines[0].toFixed(2)} to ${cosines.at(-1).toFixed(2)}` : "";
  const how = found.exact ? `all ${number(found.among)} rows compared` : `among ${number(found.among)} rows, by an approximate index`;
  return h("p", { class: "total" }, `Most like ${what}${range}; ${how}`);
}
