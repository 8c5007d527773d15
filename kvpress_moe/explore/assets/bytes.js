// The byte budget of kvpress_moe/budget/shared_bytes.py and byte_allocation.py, and the numbers of a page with precisions.

// Prices are steps from 0 to 65535. A pair's strategy is the number of its switch prices that are at least the price.
class ByteRule {
  constructor({ strategies, scores, U, S, H, budget }) {
    Object.assign(this, strategies, { U, S, H, minShare: budget.min_share });
    this.M = strategies.menu.length;
    this.ranking = new Ranking(scores, U, S);
    this.rows = this.nbytes.map((_, m) => this.prices.subarray(m * U * S, (m + 1) * U * S));
  }

  // The strategy of each pair (U, S): 0 is evicted. ratio: the share of the bytes that is removed.
  choose(ratio, scope) {
    const { U, S, H } = this, chosen = new Uint8Array(U * S);
    const bytes = Math.max(0, Math.trunc(S * this.pair_bytes * (1 - ratio)) - this.table_bytes);
    const wanted = scope === "uniform" ? 1 : nKept(S, ratio) * this.minShare;
    this.floor = Math.max(1, Math.min(Math.trunc(wanted), Math.floor(bytes / this.nbytes[0])));
    this.whole = this.n_whole * this.pair_bytes <= this.whole_share * bytes ? this.n_whole : 0;
    const size = { uniform: 1, layer: H, global: U }[scope];
    for (let first = 0; first < U; first += size) this.share(chosen, first, first + size, bytes * size);
    return chosen;
  }

  // Units share a number of bytes.
  share(chosen, first, last, bytes) {
    const { S, M, nbytes, floor, whole, rows } = this, { rank } = this.ranking;
    const steps = nbytes.map((size, m) => size - (m ? nbytes[m - 1] : 0));
    const added = new Float64Array(65536); // bytes that come with each step of the price
    const from = first * S, to = last * S;
    for (let m = 0; m < M; m++) {
      const row = rows[m], step = steps[m];
      for (let i = from; i < to; i++) added[row[i]] += step;
    }
    const forced = []; // pairs that get a strategy at any price: [pair, least strategy]
    for (let u = first; u < last; u++) {
      for (let i = u * S, s = 0; s < S; i++, s++) {
        const least = s < whole ? M : rank[i] < floor ? 1 : 0;
        if (!least) continue;
        forced.push([i, least]);
        for (let m = 0; m < least; m++) {
          added[rows[m][i]] -= steps[m];
          added[65535] += steps[m];
        }
      }
    }
    let price = 65536, left = bytes;
    while (price > 1 && (price === 65536 || added[price - 1] <= left)) left -= added[--price];
    for (const row of rows) for (let i = from; i < to; i++) chosen[i] += row[i] >= price; // prices fall from row to row
    for (const [i, least] of forced) if (chosen[i] < least) chosen[i] = least;
    if (price === 1) return;
    for (let i = from; i < to; i++) { // at a slightly lower price; while bytes are left
      const now = chosen[i];
      let m = now;
      while (m < M && rows[m][i] >= price - 1) m++;
      if (m > now && (left -= nbytes[m - 1] - (now ? nbytes[now - 1] : 0)) >= 0) chosen[i] = m;
    }
  }
}

class ByteView extends View {
  evict(ratio, scope) {
    const { U, S } = this.record;
    this.rule ??= new ByteRule(this.record);
    Object.assign(this, { ratio, scope, chosen: this.rule.choose(ratio, scope) });
    this.counts = new Uint32Array(U);
    this.bytes = new Float64Array(U).fill(this.rule.table_bytes);
    for (let u = 0, i = 0; u < U; u++) {
      for (let s = 0; s < S; s++, i++) {
        const strategy = this.chosen[i];
        if (!strategy) continue;
        this.counts[u]++;
        this.bytes[u] += this.rule.nbytes[strategy - 1];
      }
    }
    if (this.colouring === "strategy") this.judges = this.byStrategy();
  }

  choose(choice) {
    super.choose(choice);
    if (this.colouring === "strategy") this.judges = this.chosen ? this.byStrategy() : new Uint8Array(this.record.S);
  }

  keepers() {
    const { S } = this.record, keepers = new Uint16Array(S);
    for (const u of this.units) for (let s = 0; s < S; s++) if (this.chosen[u * S + s]) keepers[s]++;
    return keepers;
  }

  keeps(u, position) {
    return this.chosen[u * this.record.S + position] > 0;
  }

  // How many of the chosen units have each strategy at a position; the first one is evicted.
  strategiesAt(position) {
    const { S } = this.record, counts = Array(this.rule.M + 1).fill(0);
    for (const u of this.units) counts[this.chosen[u * S + position]]++;
    return counts;
  }

  // (S): the precision that most of the units that keep the token have, the dearer one if several are equal.
  byStrategy() {
    const { S } = this.record, { M } = this.rule, counts = new Uint16Array(S * M);
    for (const u of this.units) {
      for (let s = 0; s < S; s++) {
        const strategy = this.chosen[u * S + s];
        if (strategy) counts[s * M + strategy - 1]++;
      }
    }
    return largest(S, M, (s, m) => counts[s * M + m] + m / M);
  }

  // Share of the chosen units' pairs with each strategy; the first one is evicted.
  strategyShares() {
    const { S } = this.record, counts = Array(this.rule.M + 1).fill(0);
    for (const u of this.units) for (let i = u * S, end = i + S; i < end; i++) counts[this.chosen[i]]++;
    return counts.map((count) => count / (this.units.length * S));
  }

  hitRates(layers) {
    const { H, S, E, mass, weights } = this.record, hit = new Float64Array(E + 1), total = new Float64Array(E + 1);
    for (const l of layers) {
      for (let i = l * H * S, end = i + H * S; i < end; i++) {
        const kept = this.chosen[i] > 0;
        total[0] += mass[i];
        if (kept) hit[0] += mass[i];
        if (this.everybody) continue;
        for (let e = 0, from = (l * S + (i % S)) * E; e < E; e++) {
          if (!(weights[from + e] > 0)) continue;
          total[e + 1] += mass[i];
          if (kept) hit[e + 1] += mass[i];
        }
      }
    }
    const rates = Array.from(hit, (sum, c) => sum / total[c]), all = rates.shift();
    return { all, experts: this.everybody ? Array(E).fill(all) : rates };
  }

  sumMasses() {} // pairs are not kept in the order of their scores
}
