// Takedown: a list of keys in a file, and the command that removes them. The viewer itself removes nothing.

import { ask, h, number } from "./dom.js";

let list = { keys: [], file: "", command: "" };
const places = new Set(); // what to redraw when the list changes

export async function loadTakedown() {
  list = await ask("/api/takedown");
}

async function send(body) {
  list = await ask("/api/takedown", body);
  for (const draw of places) draw();
}

export function takedownPanel(key) {
  const place = h("div", { class: "takedown" });
  const draw = () => {
    const listed = list.keys.includes(key);
    place.replaceChildren(h("button", { class: "plain", onclick: () => send({ [listed ? "remove" : "add"]: [key] }) },
      listed ? "Take off the takedown list" : "Add to the takedown list"), ...(listed ? [command()] : []));
  };
  replace(place, draw);
  return place;
}

export function takedownSection() {
  const body = h("div");
  const section = h("details", { id: "takedown" }, h("summary", {}, h("h2", {}, "Takedown")), body);
  replace(body, () => {
    section.hidden = !list.keys.length;
    section.querySelector("h2").textContent = `Takedown (${number(list.keys.length)})`;
    body.replaceChildren(command(), h("div", { class: "buttons" },
      h("button", { class: "plain", onclick: () => send({ remove: list.keys }) }, "Empty the list")));
  });
  return section;
}

function command() {
  const copy = h("button", { class: "plain" }, "Copy");
  copy.addEventListener("click", () => navigator.clipboard?.writeText(list.command).then(() => { copy.textContent = "Copied"; }));
  return h("div", {}, h("p", { class: "note" }, "Nothing is removed yet. This command removes the listed rows for good:"),
    h("pre", { class: "yaml command", tabindex: "0", "aria-label": "Takedown command" }, list.command), copy);
}

// Keep drawing a part for as long as it is in the page.
function replace(part, draw) {
  const redraw = () => (part.isConnected ? draw() : places.delete(redraw));
  draw();
  places.add(redraw);
}
