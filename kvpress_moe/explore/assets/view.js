// The numbers to show for a choice of layer, head, ratio and colouring. Nothing is drawn here.

class View {
  constructor(record) {
    this.record = record;
    this.ranking = new Ranking(record.scores, record.U, record.S);
    this.everybody = record.weights.every((weight) => weight > 0); // each expert judges every token
    this.channels = this.everybody ? 1 : 1 + record.E; // all tokens; each expert's, where they differ
    this.sumMasses();
    this.choose({ layer: null, head: null, colouring: "weight" });
    this.evict(record.budget.ratio, record.budget.scope);
  }

  // layer and head are indices in the record; null means all.
  choose({ layer = this.layer, head = this.head, colouring = this.colouring }) {
    const { L, H } = this.record;
    Object.assign(this, { layer, head, colouring });
    const layers = layer === null ? [...Array(L).keys()] : [layer];
    const heads = head === null ? [...Array(H).keys()] : [head];
    this.layers = layers;
    this.units = layers.flatMap((l) => heads.map((h) => l * H + h));
    this.judges = { weight: () => this.byWeight(false), lift: () => this.byWeight(true), move: () => this.byMove(), strategy: () => null }[colouring]();
  }

  evict(ratio, scope) {
    const { H, budget } = this.record;
    Object.assign(this, { ratio, scope });
    this.counts = this.ranking.counts(ratio, scope, budget.min_share, budget.min_pairs, H);
  }

  // How many of the chosen units keep each position.
  keepers() {
    const { S } = this.record, { order } = this.ranking, keepers = new Uint16Array(S);
    for (const u of this.units) {
      for (let r = u * S, end = r + this.counts[u]; r < end; r++) keepers[order[r]]++;
    }
    return keepers;
  }

  keeps(u, position) {
    return this.ranking.rank[u * this.record.S + position] < this.counts[u];
  }

  keepersAt(position) {
    return this.units.reduce((sum, u) => sum + this.keeps(u, position), 0);
  }

  // Mean weight of each expert at a position, over the chosen layers.
  weightsAt(position) {
    const { S, E, weights } = this.record;
    const sums = Array(E).fill(0);
    for (const l of this.layers) for (let e = 0; e < E; e++) sums[e] += weights[(l * S + position) * E + e];
    return sums.map((sum) => sum / 65535 / this.layers.length);
  }

  // Mean over the chosen units of what each expert added to the score, and of the score itself.
  movesAt(position) {
    const { S, E, moves, moveScale } = this.record;
    const sums = Array(E).fill(0);
    for (const u of this.units) {
      for (let e = 0; e < E; e++) sums[e] += (moves[(u * E + e) * S + position] / 127) * moveScale[u];
    }
    return sums.map((sum) => sum / this.units.length);
  }

  scoreAt(position) {
    const { S, scores } = this.record;
    return this.units.reduce((sum, u) => sum + scores[u * S + position], 0) / this.units.length;
  }

  // Place among the unit's pairs, 1 is best; the mean where several are chosen.
  placeAt(position) {
    const { S } = this.record;
    return 1 + this.units.reduce((sum, u) => sum + this.ranking.rank[u * S + position], 0) / this.units.length;
  }

  // The expert with the largest weight; with lift, the one whose weight is most above its average in the layer.
  byWeight(lift) {
    const { S, E, weights } = this.record, sums = new Float64Array(S * E);
    for (const l of this.layers) for (let i = 0, from = l * S * E; i < S * E; i++) sums[i] += weights[from + i];
    if (lift) {
      for (let e = 0; e < E; e++) {
        let mean = 0;
        for (let i = e; i < S * E; i += E) mean += sums[i] / S;
        for (let i = e; i < S * E; i += E) sums[i] -= mean;
      }
    }
    return largest(S, E, (s, e) => sums[s * E + e]);
  }

  // The expert that moved the score furthest from the head's mean, up or down.
  byMove() {
    const { S, E, moves, moveScale } = this.record, sums = new Float64Array(E * S);
    for (const u of this.units) {
      for (let i = 0, from = u * E * S; i < E * S; i++) sums[i] += moves[from + i] * moveScale[u];
    }
    return largest(S, E, (s, e) => Math.abs(sums[e * S + s]));
  }

  // (L, E): mean weights.
  usage() {
    const { L, S, E, weights } = this.record;
    return Array.from({ length: L }, (_, l) => {
      const sums = Array(E).fill(0);
      for (let i = l * S * E, end = i + S * E; i < end; ) for (let e = 0; e < E; e++) sums[e] += weights[i++];
      return sums.map((sum) => sum / 65535 / S);
    });
  }

  // Attention mass of all tokens, and of those routed to each expert, summed over a unit's pairs best first.
  sumMasses() {
    const { U, H, S, E, mass, weights } = this.record, { order } = this.ranking, C = this.channels;
    this.sums = new Float64Array(U * C * (S + 1));
    for (let u = 0; u < U; u++) {
      const l = Math.floor(u / H);
      for (let c = 0; c < C; c++) {
        const at = (u * C + c) * (S + 1);
        for (let r = 0, sum = 0; r < S; r++) {
          const s = order[u * S + r];
          if (c === 0 || weights[(l * S + s) * E + c - 1] > 0) sum += mass[u * S + s];
          this.sums[at + r + 1] = sum;
        }
      }
    }
  }

  // Share of the attention in these layers that falls on kept pairs, of all tokens and of each expert's; NaN if none.
  hitRates(layers) {
    const { H, S, E } = this.record, C = this.channels;
    const [all, ...own] = Array.from({ length: C }, (_, c) => {
      let hit = 0, mass = 0;
      for (const l of layers) {
        for (let u = l * H; u < (l + 1) * H; u++) {
          const at = (u * C + c) * (S + 1);
          hit += this.sums[at + this.counts[u]];
          mass += this.sums[at + S];
        }
      }
      return hit / mass;
    });
    return { all, experts: this.everybody ? Array(E).fill(all) : own };
  }
}

function largest(S, E, value) {
  const found = new Uint8Array(S);
  for (let s = 0; s < S; s++) {
    let best = -Infinity;
    for (let e = 0; e < E; e++) {
      const v = value(s, e);
      if (v > best) { best = v; found[s] = e; }
    }
  }
  return found;
}
