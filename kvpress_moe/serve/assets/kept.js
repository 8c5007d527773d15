// What was kept of a document: its bytes beside those of the full cache, a bar for each strategy, and the time. What the
// server does not know is left out.

import { bar, find, make } from "./elements.js";
import { isKnown, percent, rounded, seconds, size, sizes } from "./figures.js";

const bitsOf = (name) => /^k(\d+)v(\d+)$/i.exec(name)?.slice(1).map(Number) ?? [0, 0]; // an evicted pair has none

function facts({ tokens, bytes, full_bytes, read_seconds, expected_kl, max_kl, is_promised }) {
  const list = [["tokens", tokens.toLocaleString("en")], ["compressed cache", size(bytes)]];
  if (isKnown(full_bytes)) list.push(["full cache, 16 bits", size(full_bytes)]);
  if (isKnown(read_seconds)) list.push(["time to read it", seconds(read_seconds)]);
  if (isKnown(expected_kl)) list.push(["expected KL divergence", rounded(expected_kl)]);
  if (isKnown(max_kl)) list.push([is_promised ? "promised: at most" : "asked for (not promised)", rounded(max_kl)]);
  return make("dl", {}, ...list.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function comparison({ bytes, full_bytes }) {
  const share = bytes / full_bytes;
  return make("div", { className: "size" }, make("p", {}, make("b", {}, percent(share)), " of the full cache"), bar(share));
}

function strategies(kept) {
  const names = Object.keys(kept).filter((name) => isKnown(kept[name])).sort((a, b) => {
    const [[keysOfA, valuesOfA], [keysOfB, valuesOfB]] = [bitsOf(a), bitsOf(b)];
    return keysOfA + valuesOfA - keysOfB - valuesOfB || keysOfA - keysOfB;
  });
  if (!names.length) return [];
  let hue = 0;
  const rows = names.map((name) => {
    const isGone = name === "evict", [keys, values] = bitsOf(name);
    const row = make("tr", {}, make("th", { scope: "row" }, isGone ? "evicted" : name.toUpperCase()),
      make("td", { className: "wide" }, bar(kept[name], isGone ? "gone" : `s${hue++ % 8}`)), make("td", {}, percent(kept[name])));
    if (!isGone && keys) row.title = `${keys} bits for keys, ${values} for values`;
    return row;
  });
  const precise = names.find((name) => bitsOf(name)[0]);
  const [keys, values] = bitsOf(precise ?? "");
  const note = precise ? ` ${precise.toUpperCase()}: ${keys} bits for keys, ${values} for values.` : "";
  return [make("h3", {}, "Key–value pairs"), make("table", {}, make("tbody", {}, ...rows)), make("p", { className: "note" }, `Each pair is evicted or stored with its own precision.${note}`)];
}

export function showKept(document) {
  find("kept").hidden = document === null;
  if (document === null) return;
  const isCompared = isKnown(document.full_bytes) && document.full_bytes > 0;
  find("kept-short").textContent = sizes(document.bytes, document.full_bytes);
  find("kept-facts").replaceChildren(
    make("div", {}, ...(isCompared ? [comparison(document)] : []), facts(document)),
    make("div", {}, ...strategies(document.kept ?? {})),
  );
}
