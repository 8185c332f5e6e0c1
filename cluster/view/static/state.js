// What the page shows, kept in its address: a link or a reload brings the same view back.

const EMPTY = { outcome: "", reason: "", where: "", order: "key", descending: "", look: "grid", subject: "", key: "", review: "", verdict: "", like: "", text: "",
  view: "", sides: "", pairs: "" };

export const state = read();
const listeners = [];

function read() {
  const found = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  return { ...EMPTY, ...Object.fromEntries(Object.entries(found).filter(([name]) => name in EMPTY)) };
}

export function change(values) {
  Object.assign(state, values);
  const said = Object.entries(state).filter(([name, value]) => value !== EMPTY[name]);
  history.replaceState(null, "", said.length ? `#${new URLSearchParams(said)}` : location.pathname);
  for (const listener of listeners) listener(Object.keys(values));
}

export const onchange = (listener) => listeners.push(listener);

window.addEventListener("hashchange", () => {
  Object.assign(state, EMPTY, read());
  for (const listener of listeners) listener(Object.keys(EMPTY));
});
