// The byte budget of kvpress_moe/budget/shared_bytes.py and byte_allocation.py, and the numbers of a page with precisions.

// Prices are steps from 0 to 65535. A pair's strategy is the number of its switch prices that are at least the price.
class ByteRule {
  constructor({ strategies, U, S, H, budget }, ranking) {
    Object.assign(this, strategies, { U, S, H, ranking, minShare: budget.min_share });
    this.M = strategies.menu.length;
    this.steps = this.nbytes.map((size, m) => size - (m ? this.nbytes[m - 1] : 0));
    this.histograms = new Map();
    this.rows = this.nbytes.map((_, m) => this.prices.subarray(m * U * S, (m + 1) * U * S));
  }

  // The strategy of each pair (U, S): 0 is evicted. ratio: the share of the bytes that is removed.
  choose(ratio, scope) {
    const { U, S, H } = this, chosen = new Uint8Array(U * S);
    if (ratio === 0 && this.n_whole) return chosen.fill(this.M); // the press then leaves the cache as it is
    const bytes = Math.max(0, Math.trunc(S * this.pair_bytes * (1 - ratio)) - this.table_bytes);
    const wanted = scope === "uniform" ? 1 : nKept(S, ratio) * this.minShare;
    this.floor = Math.max(1, Math.min(Math.trunc(wanted), Math.floor(bytes / this.nbytes[0])));
    this.whole = this.n_whole * this.pair_bytes <= this.whole_share * bytes ? this.n_whole : 0;
    const size = { uniform: 1, layer: H, global: U }[scope];
    for (let first = 0; first < U; first += size) this.share(chosen, first, first + size, bytes * size);
    return chosen;
  }

  // Bytes that come with each step of the price, if nothing is forced. It does not depend on the ratio.
  histogram(first, last) {
    const name = `${first} ${last}`;
    if (!this.histograms.has(name)) {
      const added = new Float64Array(65536), { S, rows, steps } = this;
      rows.forEach((row, m) => {
        for (let i = first * S, to = last * S; i < to; i++) added[row[i]] += steps[m];
      });
      this.histograms.set(name, added);
    }
    return this.histograms.get(name);
  }

  // Units share a number of bytes.
  share(chosen, first, last, bytes) {
    const { S, M, nbytes, floor, whole, rows } = this, { rank } = this.ranking;
    const steps = this.steps, from = first * S, to = last * S;
    const added = this.histogram(first, last).slice(); // bytes that come with each step of the price
    const forced = []; // pairs that get a strategy at any price: [pair, least strategy]
    for (let u = first; u < last; u++) {
      const ofWhole = rank.subarray(u * S, u * S + whole); // they are a part of the floor
      const below = (r) => r - ofWhole.reduce((ahead, other) => ahead + (other < r), 0) < floor - whole;
      for (let i = u * S, s = 0; s < S; i++, s++) {
        const least = s < whole ? M : rank[i] < floor && below(rank[i]) ? 1 : 0;
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
    this.rule ??= new ByteRule(this.record, this.ranking);
    Object.assign(this, { ratio, scope, chosen: this.rule.choose(ratio, scope) });
    this.counts = new Uint32Array(U);
    this.bytes = new Float64Array(U).fill(ratio === 0 ? 0 : this.rule.table_bytes);
    this.found = Array.from({ length: U }, () => new Uint32Array(this.rule.M + 1)); // pairs with each strategy
    this.hits = Array.from({ length: U }, () => new Float64Array(this.channels));
    const { H, E, mass, weights } = this.record, { chosen, everybody } = this;
    for (let u = 0, i = 0; u < U; u++) {
      const found = this.found[u], hits = this.hits[u], l = Math.floor(u / H);
      let hit = 0;
      for (let s = 0; s < S; s++, i++) {
        const strategy = chosen[i];
        found[strategy]++;
        if (!strategy) continue;
        hit += mass[i];
        if (everybody) continue;
        for (let e = 0, from = (l * S + s) * E; e < E; e++) if (weights[from + e] > 0) hits[e + 1] += mass[i];
      }
      hits[0] = hit;
      this.counts[u] = S - found[0];
      this.rule.nbytes.forEach((size, m) => { this.bytes[u] += found[m + 1] * size; });
    }
    if (this.colouring === "strategy") this.judges = this.byStrategy();
  }

  choose(choice) {
    super.choose(choice);
    this.judges ??= new Uint8Array(this.record.S); // evict, which always follows, finds them
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

  // (S): the most frequent precision among the units that keep the token, the dearer one if several are equal.
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
    const sum = (m) => this.units.reduce((total, u) => total + this.found[u][m], 0);
    return Array.from({ length: this.rule.M + 1 }, (_, m) => sum(m) / (this.units.length * this.record.S));
  }

  hitRates(layers) {
    const { H, E } = this.record;
    const [all, ...own] = Array.from({ length: this.channels }, (_, c) => {
      let hit = 0, total = 0;
      for (const l of layers) {
        for (let u = l * H; u < (l + 1) * H; u++) {
          hit += this.hits[u][c];
          total += this.masses[u][c];
        }
      }
      return hit / total;
    });
    return { all, experts: this.everybody ? Array(E).fill(all) : own };
  }

  // Attention mass of all pairs of a unit, and of those whose token is routed to each expert.
  sumMasses() {
    const { U, H, S, E, mass, weights } = this.record;
    this.masses = Array.from({ length: U }, (_, u) => {
      const sums = new Float64Array(this.channels), l = Math.floor(u / H);
      for (let s = 0, i = u * S; s < S; s++, i++) {
        sums[0] += mass[i];
        if (this.everybody) continue;
        for (let e = 0, from = (l * S + s) * E; e < E; e++) if (weights[from + e] > 0) sums[e + 1] += mass[i];
      }
      return sums;
    });
  }
}
