// Everything around the text. Text from the payload is inserted only with textContent.

const BARS = 80;
const percent = (share, digits = 0) => (Number.isNaN(share) ? "–" : `${(100 * share).toFixed(digits)} %`);
const exact = (share) => `${Number((100 * share).toFixed(6))} %`;
const signed = (number) => number.toFixed(3).replace("-", "−");
const grouped = (number) => number.toLocaleString("en");
const shorter = (share) => (Number.isNaN(share) ? "–" : (100 * share).toFixed(0));

const find = (id) => document.getElementById(id);

// make("p", {className: "note"}, "text", child, …)
function make(name, properties, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

// A table of numbers from 0 to 1. The colour of a cell shows value / largest; set() updates a row.
class HeatMap {
  constructor(host, caption, columns, rows, onPick, largest = 1) {
    this.largest = largest;
    this.cells = rows.map(() => columns.map(() => make("td", {})));
    const head = make("tr", {}, make("th", { scope: "col" }, "layer"), ...columns.map((name, c) => {
      const cell = make("th", { scope: "col" }, name);
      if (host.dataset.experts) cell.className = `head e${c % 8}`;
      return cell;
    }));
    const body = rows.map((row, r) => {
      const line = make("tr", {}, make("th", { scope: "row" }, String(row)), ...this.cells[r]);
      line.addEventListener("click", (event) => onPick(r, event.target.cellIndex - 1));
      return line;
    });
    this.rows = body;
    const table = make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
    host.append(table);
  }

  set(row, values) {
    values.forEach((value, c) => {
      const cell = this.cells[row][c], text = shorter(value);
      if (cell.textContent === text) return;
      cell.textContent = text;
      cell.style.setProperty("--v", Number.isNaN(value) ? 0 : (value / this.largest).toFixed(2));
    });
  }

  mark(row) {
    this.rows.forEach((line, r) => line.classList.toggle("chosen", r === row));
  }
}

// Where in the text the kept pairs are: the share kept in each of up to 80 parts.
class Places {
  constructor(host, S, onPick) {
    this.S = S;
    this.n = Math.min(BARS, S);
    this.bars = Array.from({ length: this.n }, (_, b) => {
      const bar = make("i", {}, make("b", {}));
      bar.addEventListener("click", () => onPick(this.start(b)));
      return bar;
    });
    host.append(...this.bars);
    this.host = host;
  }

  start(bar) {
    return Math.ceil((bar * this.S) / this.n);
  }

  set(keepers, ofHowMany) {
    const shares = this.bars.map((bar, b) => {
      let sum = 0;
      for (let s = this.start(b); s < this.start(b + 1); s++) sum += keepers[s];
      const share = sum / (this.start(b + 1) - this.start(b)) / ofHowMany;
      bar.firstChild.style.height = `${(100 * share).toFixed(1)}%`;
      bar.title = `positions ${this.start(b)} to ${this.start(b + 1) - 1}: ${percent(share)} kept`;
      return share;
    });
    const fifths = [0, 1, 2, 3, 4].map((fifth) => {
      const part = shares.slice((fifth * this.n) / 5, ((fifth + 1) * this.n) / 5);
      return percent(part.reduce((a, b) => a + b, 0) / part.length);
    });
    this.host.setAttribute("aria-label", `Share kept in each fifth of the text: ${fifths.join(", ")}`);
  }
}

// Everything about one token, for the chosen layers and heads.
function details(host, view, position) {
  const { record } = view, { H } = record, byPrecision = view.colouring === "strategy";
  const weights = view.weightsAt(position), moves = view.movesAt(position), judge = view.judges[position];
  const kept = view.keepersAt(position), reach = Math.max(...moves.map(Math.abs), 1e-9);
  const rows = record.experts.map((name, e) => {
    const weight = make("b", {}), move = make("b", { className: moves[e] < 0 ? "down" : "up" });
    weight.style.width = `${100 * weights[e]}%`;
    move.style.width = `${(50 * Math.abs(moves[e])) / reach}%`;
    return make("tr", { className: !byPrecision && e === judge ? "judge" : "" },
      make("th", { scope: "row" }, make("span", { className: byPrecision ? "" : `swatch k8 e${e % 8}` }, name)),
      make("td", { className: "number" }, percent(weights[e], 1)), make("td", { className: "bar" }, weight),
      make("td", { className: "number" }, `${moves[e] < 0 ? "" : "+"}${signed(moves[e])}`),
      make("td", { className: "bar middle" }, move));
  });
  const perLayer = record.layers.map((_, l) =>
    Array.from({ length: H }, (_, h) => view.keeps(l * H + h, position)).filter(Boolean).length);
  const several = view.units.length > 1;
  const facts = [
    ["position", `${position} of ${record.S}`],
    ["kept by", several ? `${kept} of ${view.units.length} heads` : kept ? "this head" : "not this head"],
    [several ? "mean score" : "score", signed(view.scoreAt(position))],
    [several ? "mean place" : "place", `${view.placeAt(position).toFixed(several ? 1 : 0)} of ${record.S}`],
  ];
  if (view.layer !== null && view.head !== null) facts.splice(2, 0, ["in the layer", `${perLayer[view.layer]} of ${H} heads`]);
  if (record.strategies) facts.splice(2, 0, ["precision", precisions(view, position)]);
  const strip = make("div", { className: "strip" }, ...perLayer.map((n, l) => {
    const cell = make("i", { title: `layer ${record.layers[l]}: ${n} of ${H} heads keep it` });
    cell.style.setProperty("--v", n / H);
    if (l === view.layer) cell.className = "chosen";
    return cell;
  }));
  strip.setAttribute("role", "img");
  strip.setAttribute("aria-label", `Heads that keep it, layer by layer: ${perLayer.join(", ")}`);
  find("spoken").textContent = `${record.tokens[position]}, position ${position}, kept by ${facts[1][1]}; ${byPrecision ? precisions(view, position) : `${record.experts[judge]} ${percent(weights[judge])}`}`;
  host.replaceChildren(
    make("p", { className: "token" }, make("span", { className: `${byPrecision && !kept ? "k0" : "k8"} e${judge % 8}` }, JSON.stringify(record.tokens[position]).slice(1, -1))),
    make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
    make("table", { className: "experts" },
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "expert"),
        make("th", { scope: "col", colSpan: 2 }, "weight"), make("th", { scope: "col", colSpan: 2 }, "moved the score by"))),
      make("tbody", {}, ...rows)),
    make("p", { className: "label" }, "kept in the layers, first to last"), strip);
}

// "K4V4" for one head; "K4V4 in 12 heads, K2V2 in 3" for several.
function precisions(view, position) {
  const { menu } = view.record.strategies, counts = view.strategiesAt(position).map((n, m) => [n, m ? menu[m - 1] : "evicted"]);
  const found = counts.filter(([n]) => n).sort((a, b) => b[0] - a[0]);
  return view.units.length > 1 ? found.map(([n, name], i) => `${name} in ${n}${i ? "" : n > 1 ? " heads" : " head"}`).join(", ") : found[0][1];
}

function answers(host, record) {
  const { about, budget } = record;
  for (const { question, full, compressed } of record.answers) {
    const same = full.every(([, shared]) => shared) && compressed.every(([, shared]) => shared);
    const side = (title, mib, pieces) => make("div", { className: "answer" },
      make("h4", {}, title, make("small", {}, ` ${mib} MiB`)),
      make("p", { dir: "auto" }, ...pieces.map(([text, shared]) => (shared ? text : make("mark", {}, text)))));
    host.append(make("article", {}, make("h3", { dir: "auto" }, question), make("div", { className: "pair" },
      side("full cache", about.full_mib, full),
      side(`compressed, ${exact(budget.ratio)} of the ${record.strategies ? "bytes" : "pairs"} removed`, about.compressed_mib, compressed)),
      make("p", { className: "note" }, same ? "Both answers are the same." : "Underlined: tokens that differ from the other answer.")));
  }
  if (!record.answers.length) host.append(make("p", { className: "note" }, "No question was asked."));
}
