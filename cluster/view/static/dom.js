// Build elements. Text goes in as text nodes only, so nothing that a stranger wrote is ever markup.

export function h(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "line", "text", "path", "title"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const number = (value) => value.toLocaleString("en");

export function short(value) {
  if (!Number.isFinite(value)) return "";
  if (Number.isInteger(value)) return number(value);
  return String(Number(value.toPrecision(4)));
}

export function say(text) {
  document.getElementById("message").textContent = text;
}

// Questions to the server. A mistake comes back as {field, problem, hint} and is shown, until a later question of the
// same kind is answered: other answers, and late ones to earlier questions, must not wipe it off.
let asked = 0;
let mistake = { kind: "", number: 0 };

export async function ask(path, body) {
  const question = { kind: path.split(/[?]/)[0].split("/", 3).join("/"), number: (asked += 1) };
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json", "X-Capstan": "1" }, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    mistake = question;
    say("The viewer has ended. Run capstan view again.");
    throw new Error("no answer");
  }
  if (!answer.ok) mistake = question;
  if (answer.status === 400) {
    const { field, problem, hint } = await answer.json();
    say(`${field}: ${problem}. Fix: ${hint}`);
    throw new Error(problem);
  }
  if (!answer.ok) {
    say(await answer.text());
    throw new Error(answer.statusText);
  }
  if (mistake.kind === question.kind && mistake.number < question.number) say("");
  return answer.json();
}

export function debounce(action, wait = 200) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), wait);
  };
}
