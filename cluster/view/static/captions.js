// A row's captions in every layer, side by side: words that differ from a chosen one, flags, what the model wrote
// and threw away, and edits by hand, which become a layer over the edited one.

import { ask, h } from "./dom.js";
import { changes, visible } from "./words.js";

const ORIGINAL = "original";
let compared = ORIGINAL; // stays chosen from row to row

export function captionsSection(row, captions, readOnly) {
  const section = h("section", { id: "captions" });
  const notice = h("p", { class: "note", role: "status" });
  let undo = null;

  const save = async (card, text) => {
    const asked = { key: row.key, layer: card.base, slot: card.slot, text };
    const answer = await ask("/api/edit", asked);
    captions = answer.captions;
    undo = { ...asked, text: answer.before };
    draw();
    notice.replaceChildren(text === null ? "The edit is taken back. " : `Saved in the layer ${visible(card.base)}-edited. `,
      h("button", { class: "plain", onclick: () => revert().catch(() => {}) }, "Undo"));
  };
  const revert = async () => {
    captions = (await ask("/api/edit", undo)).captions;
    draw();
    notice.textContent = "Undone.";
  };

  function draw() {
    const cards = cardsOf(row, captions);
    const chosen = cards.find((card) => card.name === compared) ?? cards[0];
    const choice = h("select", { id: "compared" }, cards.map((card) =>
      h("option", { value: card.name, selected: card === chosen }, card.name === ORIGINAL ? ORIGINAL : `${card.slot}, ${card.layer}`)));
    choice.addEventListener("change", () => { compared = choice.value; draw(); document.getElementById("compared").focus(); });
    section.replaceChildren(h("h3", {}, "Captions"),
      ...(cards.length > 2 ? [h("div", { class: "buttons" }, h("label", { for: "compared" }, "Words that differ from"), choice)] : []),
      h("div", { class: "layers" }, cards.map((card) => figure(card, chosen, readOnly ? null : save))), notice);
  }
  draw();
  return section;
}

// The captions as cards; `base` is the layer that an edit of the card changes.
function cardsOf(row, captions) {
  const original = { name: ORIGINAL, slot: ORIGINAL, layer: "", text: row.caption, flags: [], discarded: [], base: "" };
  return [original, ...captions.map((one) => ({ ...one, name: `${one.layer} ${one.slot}`,
    base: one.edited ? one.over : one.over ? "" : one.layer,
    replaced: captions.some((other) => other.edited && other.over === one.layer && other.slot === one.slot) }))];
}

function figure(card, chosen, save) {
  const text = h("p", { class: "text" }, card === chosen ? visible(card.text || "no caption") : marked(chosen.text, card.text));
  const place = h("article", { class: "layer-card", "data-layer": card.layer, "data-slot": card.slot },
    h("h4", {}, card.slot, card.layer ? h("span", { class: "layer" }, card.over ? `${card.layer}, over ${card.over}` : card.layer) : null),
    text, card.flags.length ? h("span", { class: "flags" }, card.flags.join(", ")) : null, raw(card));
  if (save && card.base && !card.replaced) place.append(buttons(card, text, save));
  if (card.replaced) place.append(h("p", { class: "note" }, "Edited: see the layer over this one."));
  return place;
}

function marked(base, text) {
  return changes(base, text).map(({ kind, words }) => (kind === "same" ? words : h(kind === "new" ? "mark" : "del", {}, words)));
}

// What the model wrote before cleaning, and its other attempts.
function raw(card) {
  const same = card.raw === undefined || card.raw === card.text;
  if (same && !card.discarded.length) return null;
  const shown = [
    ...(same ? [] : [["Raw text", card.raw]]),
    ...card.discarded.map((text, place) => [`Discarded attempt ${place + 1}`, text]),
  ];
  const title = card.discarded.length ? `Raw text and ${card.discarded.length} discarded` : "Raw text";
  return h("details", { class: "raw" }, h("summary", {}, title),
    shown.map(([name, words]) => h("div", {}, h("h5", {}, name), h("pre", { tabindex: "0", "aria-label": name }, visible(words || "empty")))));
}

function buttons(card, text, save) {
  const area = h("textarea", { rows: 5, maxlength: 10000, "aria-label": `Caption ${card.slot} of ${card.layer}` });
  const line = h("div", { class: "buttons" });
  const shown = [h("button", { class: "plain edit", onclick: open }, "Edit"),
    ...(card.edited ? [h("button", { class: "plain", onclick: () => send(null) }, "Take back")] : [])];
  const editing = [h("button", { onclick: () => send(area.value) }, "Save"), h("button", { class: "plain", onclick: close }, "Cancel")];
  const send = (words) => save(card, words).catch(() => {}); // `ask` has shown the problem; the text stays to be corrected
  function open() {
    area.value = card.text;
    text.replaceWith(area);
    line.replaceChildren(...editing);
    area.focus();
  }
  function close() {
    area.replaceWith(text);
    line.replaceChildren(...shown);
    shown[0].focus();
  }
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(area.value);
    if (event.key === "Escape") {
      event.preventDefault(); // ends the edit, not the dialog
      close();
    }
  });
  line.append(...shown);
  return line;
}
