// The views of a dataset: its rows, its duplicates, and blind votes on captions. The address holds which one is shown.

import { h } from "./dom.js";
import { duplicatesView } from "./duplicates.js";
import { change, state } from "./state.js";
import { votesView } from "./votes.js";

const VIEWS = [["", "Rows"], ["duplicates", "Duplicates"], ["votes", "Compare captions"]];
const SHOWN = { duplicates: duplicatesView, votes: votesView };

export function showView(readOnly) {
  const chosen = SHOWN[state.view] ? state.view : "";
  document.getElementById("views").replaceChildren(...VIEWS.map(([name, title]) =>
    h("button", { class: "plain", "aria-current": name === chosen ? "page" : null, onclick: () => change({ view: name }) }, title)));
  const main = document.getElementById("view");
  document.getElementById("columns").hidden = chosen !== "";
  main.hidden = chosen === "";
  main.replaceChildren(...(chosen ? [SHOWN[chosen](readOnly)] : []));
}
