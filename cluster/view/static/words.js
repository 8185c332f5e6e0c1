// Texts of strangers made visible, and the words in which two texts differ.

const MOST_WORDS = 400;
const INVISIBLE = /[\u0000-\u0008\u000B-\u001F\u007F-\u009F\u00AD\u061C\u180E\u200B\u200E\u200F\u2028-\u202E\u2060-\u206F\uFEFF\uFFF9-\uFFFB]|[\u{E0000}-\u{E007F}]/gu;
const PARTS = /([\p{L}\p{N}]+)/u;

// Control, bidi and invisible characters act on what surrounds them: show their names instead.
export function visible(text) {
  return text.replace(INVISIBLE, (one) => `⟨U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// A text as parts {kind: same | new | gone, words}: in order if most words are shared, else only the new words.
export function changes(base, text) {
  const [before, after] = [base, text].map((one) => visible(one).split(PARTS));
  const [old, now] = [before, after].map(words);
  const common = old.length > MOST_WORDS || now.length > MOST_WORDS ? [] : shared(old, now);
  if (2 * common.length >= Math.max(old.length, now.length, 1)) return ordered(before, after, common);
  const known = new Set(old);
  return joined(after.map((part, place) => ({ kind: place % 2 && !known.has(part.toLowerCase()) ? "new" : "same", words: part })));
}

const words = (parts) => parts.filter((_, place) => place % 2).map((one) => one.toLowerCase());

// The longest common subsequence of two lists of words, as pairs of places.
function shared(old, now) {
  const wide = now.length + 1;
  const length = new Uint16Array((old.length + 1) * wide);
  for (let a = old.length - 1; a >= 0; a -= 1) {
    for (let b = now.length - 1; b >= 0; b -= 1) {
      length[a * wide + b] = old[a] === now[b] ? length[(a + 1) * wide + b + 1] + 1
        : Math.max(length[(a + 1) * wide + b], length[a * wide + b + 1]);
    }
  }
  const found = [];
  for (let a = 0, b = 0; a < old.length && b < now.length;) {
    if (old[a] === now[b]) found.push([a++, b++]);
    else if (length[(a + 1) * wide + b] >= length[a * wide + b + 1]) a += 1;
    else b += 1;
  }
  return found;
}

// `parts` are words at odd places and what stands between them at even ones.
function ordered(before, after, common) {
  const found = [];
  let [a, b] = [0, 0];
  for (const [one, other] of [...common, [words(before).length, words(after).length]]) {
    found.push({ kind: "same", words: after[2 * b] });
    if (a < one) found.push({ kind: "gone", words: before.slice(2 * a + 1, 2 * one).join("") }, { kind: "same", words: " " });
    for (; b < other; b += 1) found.push({ kind: "new", words: after[2 * b + 1] }, { kind: "same", words: after[2 * b + 2] });
    found.push({ kind: "same", words: after[2 * b + 1] ?? "" });
    [a, b] = [one + 1, other + 1];
  }
  return joined(found);
}

const joined = (parts) => parts.filter((part) => part.words !== "");
