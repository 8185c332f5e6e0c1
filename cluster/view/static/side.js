// Facets by outcome and reason, the SQL filter, and what other conditions would keep.

import { ask, debounce, h, number } from "./dom.js";
import { histogram } from "./histogram.js";
import { reviewSection } from "./review.js";
import { searchSection } from "./similar.js";
import { change, state } from "./state.js";
import { takedownSection } from "./takedown.js";

const side = document.getElementById("side");

export function showSide(dataset) {
  const parts = [facets(dataset), dataset.embeddings ? searchSection() : null, reviewSection(), filter(dataset), whatIf(dataset), dataset.read_only ? null : takedownSection()];
  side.replaceChildren(...parts.filter(Boolean));
}

function facets(dataset) {
  const chosen = (one) => state.outcome === one.outcome && state.reason === one.reason;
  const outcomes = new Map();
  for (const one of dataset.outcomes) {
    outcomes.set(one.outcome, (outcomes.get(one.outcome) ?? 0) + one.rows);
  }
  const buttons = [facet("all rows", "", "", dataset.rows)];
  for (const [outcome, rows] of outcomes) {
    buttons.push(facet(outcome, outcome, "", rows));
    const reasons = dataset.outcomes.filter((one) => one.outcome === outcome && one.reason);
    buttons.push(...reasons.map((one) => facet(one.reason, outcome, one.reason, one.rows, "reason")));
  }
  return h("section", {}, h("h2", {}, dataset.preparing ? "Rows (by a sample)" : "Rows"), h("ul", { class: "facets" }, buttons));

  function facet(title, outcome, reason, rows, kind = "") {
    const pressed = chosen({ outcome, reason });
    const press = () => change({ outcome, reason, like: "", text: "" });
    return h("li", {}, h("button", { class: kind, "aria-pressed": String(pressed), onclick: press },
      h("span", {}, title), h("span", { class: "count" }, number(rows))));
  }
}

// Sections that start folded on a phone, where the rows are what one came for.
function fold(title, ...children) {
  return h("details", { open: matchMedia("(min-width: 761px)").matches }, h("summary", {}, h("h2", {}, title)), children);
}

function filter(dataset) {
  const where = h("input", { id: "where", value: state.where, placeholder: "width >= 512 AND caption LIKE '%cat%'", spellcheck: "false", autocomplete: "off" });
  const order = h("select", { id: "order" }, Object.keys(dataset.columns).map((name) => h("option", { value: name, selected: name === state.order }, name)));
  const down = h("input", { type: "checkbox", id: "down", checked: state.descending === "1" });
  const look = h("button", { type: "button", class: "plain" }, state.look === "grid" ? "Show a table" : "Show a grid");
  look.addEventListener("click", () => change({ look: state.look === "grid" ? "table" : "grid" }));
  const form = h("form", {}, h("label", { for: "where" }, "SQL condition"), where,
    h("label", { for: "order" }, "Order"), order,
    h("label", { class: "check", for: "down" }, down, "descending"),
    h("div", { class: "buttons" }, h("button", {}, "Apply"), look));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    change({ where: where.value.trim(), order: order.value, descending: down.checked ? "1" : "" });
  });
  return fold("Filter", form);
}

function whatIf(dataset) {
  const conditions = dataset.conditions.filter((one) => one.where).map((one) => ({ ...one }));
  const steps = h("div", { class: "steps", "aria-live": "polite" });
  const list = h("div", { class: "conditions" });
  const yaml = h("pre", { class: "yaml", tabindex: "0", hidden: true });
  const plots = h("div");
  let text = "";

  const count = debounce(async () => {
    const answer = await ask("/api/funnel", { conditions: conditions.filter((one) => one.where.trim()) });
    text = answer.yaml;
    yaml.textContent = text;
    const most = answer.steps[0].left || 1;
    steps.replaceChildren(...answer.steps.map((step) => bar(step, most)));
  });
  const draw = () => list.replaceChildren(...conditions.map((one, place) => editor(one, place)));
  const set = (title, where) => {
    const found = conditions.find((one) => one.name === title);
    if (found) found.where = where;
    else conditions.push({ name: title, where });
    draw();
    count();
  };

  function editor(one, place) {
    const input = h("input", { value: one.where, spellcheck: "false", "aria-label": `condition ${one.name}` });
    input.addEventListener("input", () => { one.where = input.value; count(); });
    const drop = h("button", { class: "plain", "aria-label": `remove condition ${one.name}` }, "×");
    drop.addEventListener("click", () => { conditions.splice(place, 1); draw(); count(); });
    return h("div", { class: "condition" }, h("span", {}, one.name), input, drop);
  }

  const copy = h("button", { class: "plain" }, "Copy as YAML");
  copy.addEventListener("click", async () => {
    yaml.hidden = false;
    await navigator.clipboard?.writeText(text).catch(() => {});
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy as YAML"; }, 1500);
  });

  const choice = h("select", { id: "subject" }, h("option", { value: "" }, "choose a measure"),
    dataset.subjects.map((one) => h("option", { value: one.title, selected: one.title === state.subject }, one.title)));
  const show = async () => {
    const subject = dataset.subjects.find((one) => one.title === choice.value);
    plots.replaceChildren(...(subject ? [await histogram(subject, set)] : []));
  };
  choice.addEventListener("change", () => { change({ subject: choice.value }); show(); });

  draw();
  count();
  show();
  const note = "Of rows with an image. A range in brackets comes from a sample and holds 95% of the time. Duplicates are not looked for: capstan select --dry-run counts them.";
  return fold("What if", list, steps, h("p", { class: "note" }, note),
    h("div", { class: "buttons" }, copy), yaml,
    h("label", { for: "subject" }, "Threshold on"), choice, plots);
}

function bar(step, most) {
  const fill = h("span", { class: "fill" });
  fill.style.width = `${(100 * step.left) / most}%`;
  const range = step.low === undefined ? "" : ` (${number(step.low)}–${number(step.high)})`;
  return h("div", { class: "step" }, h("span", { class: "title" }, step.step),
    h("span", { class: "bar" }, fill), h("span", { class: "count" }, number(step.left) + range));
}
