// Duplicates: a kept row next to the rows that repeat it, verdicts on pairs, and on all pairs up to a distance.

import { ask, debounce, h, number } from "./dom.js";
import { card } from "./rows.js";
import { change, state } from "./state.js";

const VERDICTS = [["none", "not judged"], ["", "all"], ["same", "judged: duplicates"], ["different", "judged: not duplicates"]];
const BITS = 64;

export function duplicatesView(readOnly) {
  const [reason, side, bits, verdict] = state.pairs ? state.pairs.split(" ") : ["", "<=", String(BITS), "none"];
  const chosen = { reason, side, bits: Number(bits), verdict };
  const place = h("div");
  const controls = h("div");
  const notice = h("p", { class: "note", role: "status" });
  const list = h("div", { id: "groups" });
  let asked = 0;

  const limits = () => ({ reason: chosen.reason, verdict: chosen.verdict,
    low: chosen.side === ">=" ? chosen.bits : 0, high: chosen.side === ">=" ? BITS : chosen.bits });
  const keep = () => change({ pairs: `${chosen.reason} ${chosen.side} ${chosen.bits} ${chosen.verdict}` });

  const load = async () => {
    const own = ++asked;
    const { counts, judged, undo } = await ask(`/api/duplicates/counts?verdict=${chosen.verdict}`);
    if (own !== asked) return;
    draw(counts, judged, undo);
    await more("", own, true);
  };
  const more = async (after, own, fresh) => {
    const page = await ask(`/api/duplicates?${new URLSearchParams({ ...limits(), after })}`);
    if (own !== asked) return;
    if (fresh) list.replaceChildren();
    list.querySelector(".more")?.remove();
    list.append(...page.groups.map((one) => group(one, readOnly ? null : judge)));
    if (fresh && !page.groups.length) list.append(h("p", {}, "No such pairs."));
    if (page.next) list.append(h("button", { class: "more", onclick: () => more(page.next, own).catch(() => {}) }, "More groups"));
  };
  const say = ({ pairs, judged, undo }, text) => {
    notice.replaceChildren(text ?? `${number(pairs)} ${pairs === 1 ? "pair" : "pairs"} marked. `, summary(judged));
    controls.querySelector("[data-undo]")?.toggleAttribute("disabled", !undo);
  };
  const judge = async (pairs, verdict) => {
    const answer = await ask("/api/duplicates", { pairs, verdict });
    const { counts, judged, undo: undone } = await ask(`/api/duplicates/counts?verdict=${chosen.verdict}`);
    draw(counts, judged, undone); // what a mark on all pairs would be about has changed
    say(answer);
  };
  const all = (verdict) => ask("/api/duplicates", { chosen: limits(), verdict })
    .then(async (answer) => { await load(); say(answer); }).catch(() => {});
  const undo = () => ask("/api/duplicates/undo", {})
    .then(async (answer) => { await load(); say(answer, `${number(answer.pairs)} undone. `); }).catch(() => {});

  function draw(counts, judged, canUndo) {
    const reasons = [...new Set(counts.map((one) => one.reason))];
    if (chosen.reason && !reasons.includes(chosen.reason)) reasons.push(chosen.reason);
    const of = (name) => counts.filter((one) => !name || one.reason === name).reduce((sum, one) => sum + one.pairs, 0);
    const byReason = pick("pair-reason", "Found as", [["", `all (${number(of(""))})`], ...reasons.map((one) => [one, `${one} (${number(of(one))})`])],
      chosen.reason, (value) => { chosen.reason = value; });
    const byVerdict = pick("pair-verdict", "Show", VERDICTS, chosen.verdict, (value) => { chosen.verdict = value; });
    const remembered = chosen.verdict === "different";
    controls.replaceChildren(h("div", { class: "choices" }, byReason, byVerdict),
      ...(remembered ? [] : [distances(counts)]), ...(readOnly ? [] : [buttons(counts, canUndo, remembered)]));
    notice.replaceChildren(summary(judged));
  }

  function pick(id, title, options, value, set) {
    const select = h("select", { id }, options.map(([name, text]) => h("option", { value: name, selected: name === value }, text)));
    select.addEventListener("change", () => { set(select.value); keep(); load().catch(() => {}); });
    return h("div", {}, h("label", { for: id }, title), select);
  }

  const matching = (counts) => {
    const { low, high, reason: name } = limits();
    return counts.filter((one) => (!name || one.reason === name) && one.distance >= low && one.distance <= high)
      .reduce((sum, one) => sum + one.pairs, 0);
  };

  function distances(counts) {
    const most = Math.max(1, ...counts.map((one) => one.distance));
    const select = h("select", { "aria-label": "Distance" }, [["<=", "at most"], [">=", "at least"]]
      .map(([value, text]) => h("option", { value, selected: value === chosen.side }, text)));
    const slider = h("input", { type: "range", min: 0, max: most, value: Math.min(chosen.bits, most), "aria-label": "Distance in bits" });
    const told = h("output");
    const plot = h("svg", { viewBox: "0 0 300 54", role: "img", "aria-label": "Pairs by distance" });
    const show = () => {
      told.textContent = `${Math.min(chosen.bits, most)} bits: ${number(matching(counts))} pairs`;
      bars(plot, counts, chosen.reason, most, limits());
    };
    const apply = debounce(() => { keep(); load().catch(() => {}); }, 300);
    slider.addEventListener("input", () => { chosen.bits = Number(slider.value); show(); apply(); });
    select.addEventListener("change", () => { chosen.side = select.value; chosen.bits = Number(slider.value); show(); apply(); });
    show();
    return h("div", { class: "distances" }, plot, h("span", {}, "Distance"), select, slider, told);
  }

  function buttons(counts, canUndo, remembered) {
    const pairs = matching(counts);
    const mark = (verdict, text) => h("button", { class: "plain", value: verdict, disabled: !pairs, onclick: () => all(verdict) }, text);
    return h("div", { class: "buttons", id: "bulk" }, ...(remembered ? [] : [h("span", {}, `Mark all ${number(pairs)} pairs:`),
      mark("different", "Not duplicates"), mark("same", "Duplicates"), ...(chosen.verdict === "none" ? [] : [mark("", "Take verdicts back")])]),
    h("button", { class: "plain", "data-undo": "", disabled: !canUndo, onclick: undo }, "Undo"));
  }

  place.append(h("h2", {}, "Duplicates"), h("p", { class: "note" }, "The distance is in bits of the perceptual hash. Pairs that are marked as not duplicates are remembered: the next capstan select or capstan build keeps both, unless another row matches. Nothing changes before."),
    controls, notice, list);
  load().catch(() => {});
  return place;
}

const summary = (judged) => `${number(judged.different)} marked as not duplicates, ${number(judged.same)} as duplicates.`;

function bars(plot, counts, reason, most, { low, high }) {
  const at = new Array(most + 1).fill(0);
  for (const one of counts) if (!reason || one.reason === reason) at[one.distance] += one.pairs;
  const top = Math.max(...at, 1);
  const step = 300 / at.length;
  plot.replaceChildren(...at.map((count, bits) => {
    const tall = count ? Math.max(2, (52 * count) / top) : 0;
    return h("rect", { class: bits >= low && bits <= high ? "in" : "", x: bits * step, y: 54 - tall, width: Math.max(step - 1, 1), height: tall },
      h("title", {}, `${bits} bits: ${number(count)} pairs`));
  }));
}

function group({ kept, members, more }, judge) {
  const place = h("article", { class: "group", "data-kept": kept.key });
  const lines = members.map((one) => member(one, kept, judge));
  const original = card(kept);
  original.append(h("p", { class: "distance" }, members.some((one) => one.reason) ? "kept" : kept.outcome));
  const together = judge && members.length > 1 ? h("button", { class: "plain", onclick: () => {
    const keys = [kept.key, ...members.map((one) => one.key)];
    const pairs = keys.flatMap((one, first) => keys.slice(first + 1).map((other) => [one, other]));
    judge(pairs, "different").then(() => lines.forEach((line) => line.mark("different"))).catch(() => {});
  } }, `None of these ${members.length + 1} are duplicates`) : null;
  place.append(h("ul", { class: "members" }, original, lines.map((line) => line.element)),
    ...(more ? [h("p", { class: "note" }, `and ${number(more)} more that repeat it`)] : []),
    ...(together ? [h("div", { class: "buttons" }, together)] : []));
  return place;
}

function member(one, kept, judge) {
  const element = card(one.card);
  let verdict = one.verdict === "none" ? "" : one.verdict;
  const buttons = [["different", "Not duplicates"], ["same", "Duplicates"]].map(([value, title]) =>
    h("button", { class: "plain", value, onclick: () => {
      const next = verdict === value ? "" : value;
      judge([[kept.key, one.key]], next).then(() => mark(next)).catch(() => {});
    } }, title));
  const mark = (value) => {
    verdict = value;
    element.dataset.verdict = value;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.value === value));
  };
  element.append(h("p", { class: "distance" }, `${one.distance} ${one.distance === 1 ? "bit" : "bits"}`,
    typeof one.cosine === "number" ? ` · cosine ${one.cosine.toFixed(3)}` : "", one.reason ? ` · ${one.reason}` : ""));
  if (judge) element.append(h("div", { class: "buttons" }, buttons));
  mark(verdict);
  return { element, mark };
}
