// Blind votes: one image and two captions of it, without their layers; the side follows from the key.

import { ask, h, number } from "./dom.js";
import { change, state } from "./state.js";
import { visible } from "./words.js";

let current = null; // what the keyboard acts on: {choose, undo}

export function votesView(readOnly) {
  const place = h("div");
  const area = h("div", { class: "ballot" });
  const results = h("details", { id: "results" }, h("summary", {}, h("h2", {}, "Results")));
  const choices = h("form", { class: "choices" });
  place.append(h("h2", {}, "Which caption fits the image better?"), choices, area, results);
  current = null;

  const showResults = async () => {
    const { results: found } = await ask("/api/votes");
    results.replaceChildren(results.firstChild, found.length ? table(found) : h("p", { class: "note" }, "No votes yet."));
  };
  results.addEventListener("toggle", () => results.open && showResults().catch(() => {}));

  ask("/api/votes").then(({ sides }) => {
    if (sides.length < 2) {
      area.replaceChildren(h("p", {}, "There is no caption layer. capstan recaption and captions import make one."));
      return;
    }
    const [a, b] = state.sides.split(" ");
    const select = (id, title, chosen) => {
      const list = h("select", { id }, sides.map((one) => h("option", { value: one, selected: one === chosen }, one)));
      choices.append(h("div", {}, h("label", { for: id }, title), list));
      return list;
    };
    const one = select("side-a", "Compare", sides.includes(a) ? a : sides[0]);
    const other = select("side-b", "with", sides.includes(b) ? b : sides[sides.length - 1]);
    choices.append(h("button", {}, "Start"));
    choices.addEventListener("submit", (event) => {
      event.preventDefault();
      change({ sides: `${one.value} ${other.value}` });
      vote(area, one.value, other.value, readOnly, () => results.open && showResults().catch(() => {}));
    });
    if (sides.includes(a) && sides.includes(b)) choices.requestSubmit();
  }).catch(() => {});
  return place;
}

function vote(area, a, b, readOnly, voted) {
  const given = []; // ballots with a vote, newest last
  const pair = { a, b };
  const count = h("p", { class: "note", role: "status" });
  const next = async (again) => {
    const query = new URLSearchParams({ ...pair, again: again ? "1" : "" });
    const { ballot, votes } = await ask(`/api/ballot?${query}`);
    show(ballot, votes);
  };
  const send = async (key, choice) => {
    const { votes } = await ask("/api/vote", { ...pair, key, choice });
    voted();
    return votes;
  };

  function show(ballot, votes) {
    count.textContent = `${number(votes)} ${votes === 1 ? "vote" : "votes"} on this pair`;
    const undo = h("button", { class: "plain", disabled: !given.length, onclick: () => act.undo() }, "Undo (u)");
    if (!ballot) {
      area.replaceChildren(h("p", {}, "No image is left on which these captions differ."), count,
        h("div", { class: "buttons" }, undo, h("button", { class: "plain", onclick: () => next(true).catch(() => {}) }, "Show skipped images again")));
      current = { ...act, choose: () => {} };
      return;
    }
    const option = (side, key) => h("button", { value: side, disabled: readOnly, onclick: () => act.choose(side) },
      h("kbd", {}, key), " ", visible(ballot[side]));
    const image = h("img", { src: `/image/${ballot.key}/0`, alt: "The image to judge" });
    image.addEventListener("error", () => image.replaceWith(h("p", {}, "The image cannot be shown.")));
    area.replaceChildren(h("div", { class: "picture" }, image),
      h("div", { class: "options" }, option("left", "←"), option("right", "→")),
      h("div", { class: "buttons" },
        h("button", { value: "tie", disabled: readOnly, onclick: () => act.choose("tie") }, "Equally good (↓)"),
        h("button", { class: "plain", onclick: () => next().catch(() => {}) }, "Skip (s)"), undo), count,
      ...(readOnly ? [h("p", { class: "note" }, "This viewer was started with --read-only.")] : []));
    area.dataset.key = ballot.key;
    let sent = false; // a second key press must not vote on the next image
    act.choose = (choice) => {
      if (sent || readOnly) return;
      sent = true;
      send(ballot.key, choice).then(() => { given.push(ballot); return next(); }).catch(() => { sent = false; });
    };
    act.skip = () => next().catch(() => {});
    current = act;
  }
  const act = {
    choose: () => {},
    skip: () => {},
    undo: () => {
      const last = given.pop();
      if (last) send(last.key, "").then((votes) => show(last, votes)).catch(() => given.push(last));
    },
  };
  next(true).catch(() => {});
}

function table(results) {
  const names = ["captions A", "captions B", "A won", "B won", "ties", "A is better", "95% interval"];
  const percent = (share) => `${Math.round(100 * share)}%`;
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, results.map((one) => h("tr", {}, [one.a, one.b, number(one.a_wins), number(one.b_wins), number(one.ties),
      percent(one.rate), `${percent(one.low)} – ${percent(one.high)}`].map((cell) => h("td", {}, cell)))))),
    h("p", { class: "note" }, "Ties count half. An interval that holds 50% decides nothing."));
}

document.addEventListener("keydown", (event) => {
  if (state.view !== "votes" || !current || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select, textarea") || document.getElementById("detail").open) return;
  const choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" }[event.key];
  if (choice) {
    event.preventDefault();
    current.choose(choice);
  }
  if (event.key === "s") current.skip();
  if (event.key === "u") current.undo();
});
