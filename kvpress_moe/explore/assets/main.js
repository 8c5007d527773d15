// Puts the parts together, and redraws what changes with a choice.

const record = unpack(JSON.parse(find("payload").textContent));
const view = record.strategies ? new ByteView(record) : new View(record);
const precise = Boolean(record.strategies);
const controls = { ratio: find("ratio"), scope: find("scope"), layer: find("layer"), head: find("head"), colouring: find("colouring") };
const SAYS = {
  weight: "Colour and underline: the expert with the largest weight",
  lift: "Colour and underline: the expert whose weight is most above its own average in the layer",
  move: "Colour and underline: the expert that moved the score furthest from the head's mean, up or down",
  strategy: "Colour and underline: the most frequent precision among the chosen heads that keep the token. K4V2: 4 bits for keys and 2 for values",
};

function options(select, texts) {
  texts.forEach((text, value) => select.append(make("option", { value: value - 1 }, text)));
}
options(controls.layer, ["all layers", ...record.layers.map((layer) => `layer ${layer}`)]);
options(controls.head, ["all heads", ...Array.from({ length: record.H }, (_, head) => `head ${head}`)]);
let ratio; // may lie between two steps of the slider
function asAnswered() {
  ratio = record.budget.ratio;
  setChoice("ratio", ratio);
  setChoice("scope", record.budget.scope);
}
asAnswered();

const { min_share: minShare, min_pairs: minPairs } = record.budget;
const least = `${percent(minShare)} of the mean${minPairs && !precise ? `; if that is under ${minPairs} pairs, up to twice as many` : ""}`;
const facts = { model: record.about.model, tokens: grouped(record.S), layers: record.about.layers, "heads of a layer": record.H,
  routers: record.about.routers, experts: record.about.experts, "a head keeps at least": least };
document.querySelectorAll(".precision").forEach((element) => { element.hidden = !precise; });
if (precise) controls.colouring.value = "strategy";
else controls.colouring.querySelector("[value=strategy]").remove();
find("of-what").textContent = precise ? "bytes removed" : "pairs removed";

find("about").append(...Object.entries(facts).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));

const entry = (name, e) => make("li", {}, make("span", { className: `swatch k8 e${e % 8}` }, name), make("small", {}));
const legend = record.experts.map(entry), menu = precise ? record.strategies.menu.map(entry) : [];
find("legend").append(...legend, ...menu);
answers(find("answers"), record);
if (record.promise) showPromise(record.promise, precise ? "bytes of a 16-bit cache" : "pairs");
find("bound").textContent = `Judged at ${exact(record.budget.ratio)} removed: at another ratio, ${record.bound_to_ratio.join(" and ")} would give the pairs other scores than shown.`;

const showDetails = (position) => {
  details(find("details"), view, position);
  document.body.classList.add("picked");
};
const text = new Text(find("text"), record.tokens, showDetails);
const go = (position) => { text.show(position); text.pick(position, showDetails); };
const places = new Places(find("places"), record.S, go);
const pickLayer = (row, column) => { setChoice("layer", row < 0 ? -1 : row); if (column >= 0) setChoice("head", column); redraw(true); };
const rows = record.layers;
const means = view.usage(), most = Math.max(...means.flat());
const usage = new HeatMap(find("usage"), "Mean weight of each expert, %", record.experts, ["all", ...rows], (row) => pickLayer(row - 1, -1), most);
const hits = new HeatMap(find("hits"), "Hit rate of each expert, %", record.experts, ["all", ...rows], (row) => pickLayer(row - 1, -1));
const shares = new HeatMap(find("shares"), precise ? "Bytes of each head, % of its full cache" : "Pairs that each head keeps, %", Array.from({ length: record.H }, (_, h) => `head ${h}`), rows, pickLayer);
usage.set(0, record.experts.map((_, e) => means.reduce((sum, row) => sum + row[e], 0) / record.L));
means.forEach((row, l) => usage.set(l + 1, row));
find("same-hits").hidden = !view.everybody;

function setChoice(name, value) {
  controls[name].value = value;
}

function chosen(name) {
  const value = Number(controls[name].value);
  return value < 0 ? null : value;
}

// choice: true if layer, head or colouring changed; false if only the budget changed.
function redraw(choice) {
  if (choice) view.choose({ layer: chosen("layer"), head: chosen("head"), colouring: controls.colouring.value });
  view.evict(ratio, controls.scope.value);
  const { S, L, H, U } = record, keepers = view.keepers(), n = view.units.length;
  text.paint(keepers, n, view.judges);
  places.set(keepers, n);
  const kept = view.units.reduce((sum, u) => sum + view.counts[u], 0), all = view.counts.reduce((sum, count) => sum + count, 0);
  find("removed").textContent = exact(view.ratio);
  controls.ratio.setAttribute("aria-valuetext", `${exact(view.ratio)} of the ${precise ? "bytes" : "pairs"} removed`);
  if (precise) {
    const bytes = view.bytes.reduce((sum, one) => sum + one, 0), full = U * S * record.strategies.pair_bytes;
    find("bytes").textContent = `${grouped(bytes)} of ${grouped(full)}, ${percent(bytes / full, 1)}`;
    const [, ...found] = view.strategyShares();
    menu.forEach((item, m) => { item.lastChild.textContent = ` ${percent(found[m])}`; });
  }
  find("kept").textContent = `${grouped(kept)} of ${grouped(n * S)} pairs`;
  find("kept-share").textContent = percent(kept / (n * S), 1);
  find("total").textContent = `${grouped(all)} of ${grouped(U * S)} pairs`;
  find("hit").textContent = percent(view.hitRates(view.layers).all, 1);
  for (let l = 0; l < L; l++) {
    const [of, whole] = precise ? [view.bytes, S * record.strategies.pair_bytes] : [view.counts, S];
    shares.set(l, Array.from(of.subarray(l * H, (l + 1) * H), (amount) => amount / whole));
    hits.set(l + 1, view.hitRates([l]).experts);
  }
  hits.set(0, view.hitRates([...Array(L).keys()]).experts);
  if (choice) {
    [usage, hits].forEach((map) => map.mark((view.layer ?? -1) + 1));
    shares.mark(view.layer ?? -1);
    find("says").textContent = SAYS[view.colouring];
    const byPrecision = view.colouring === "strategy";
    legend.forEach((item) => { item.hidden = byPrecision; });
    menu.forEach((item) => { item.hidden = !byPrecision; });
    if (!byPrecision) {
      const votes = Array(record.E).fill(0);
      for (const judge of view.judges) votes[judge]++;
      legend.forEach((item, e) => { item.lastChild.textContent = ` ${percent(votes[e] / S)}`; });
    }
  }
  const moved = view.ratio !== record.budget.ratio || view.scope !== record.budget.scope;
  find("moved").hidden = !moved;
  find("bound").hidden = view.ratio === record.budget.ratio || !record.bound_to_ratio.length;
  find("back").disabled = !moved;
  if (text.current !== null) details(find("details"), view, text.current);
}

let waiting = false;
controls.ratio.addEventListener("input", () => {
  ratio = Number(controls.ratio.value);
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; redraw(false); });
});
controls.scope.addEventListener("change", () => redraw(false));
for (const name of ["layer", "head", "colouring"]) controls[name].addEventListener("change", () => redraw(true));
find("close").addEventListener("click", () => document.body.classList.remove("picked"));
find("back").addEventListener("click", () => {
  asAnswered();
  redraw(false);
});
redraw(true);
performance.mark("explorer-drawn");
window.explorer = Object.freeze({ view, redraw });
