// The budget rule of kvpress_moe/budget/allocation.py and eviction.py. Of pairs with equal scores the first stay.

// kvpress.utils.compute_n_kept
function nKept(S, ratio) {
  return Math.max(1, Math.trunc(S * (1 - ratio)));
}

// Pairs of each unit (a head of a layer), best first. With every kind of budget, a unit keeps the first pairs of its order.
class Ranking {
  constructor(scores, U, S) {
    const ROOM = 2 ** 21, bits = new Uint32Array(scores.buffer); // 32 bits of score and 21 of position fit a double
    this.U = U;
    this.S = S;
    this.keys = new Uint32Array(U * S); // in the order of the scores, unit by unit, best first
    this.order = new Uint32Array(U * S); // position of the r-th best
    this.rank = new Uint32Array(U * S); // r of each position
    const unit = new Float64Array(S);
    for (let u = 0, start = 0; u < U; u++, start += S) {
      for (let s = 0; s < S; s++) {
        const raw = scores[start + s] === 0 ? 0 : bits[start + s]; // -0 is 0
        const key = raw >= 0x80000000 ? ~raw >>> 0 : (raw | 0x80000000) >>> 0;
        unit[s] = key * ROOM + (ROOM - 1 - s);
      }
      unit.sort();
      for (let r = 0; r < S; r++) {
        const both = unit[S - 1 - r], key = Math.floor(both / ROOM), s = ROOM - 1 - (both - key * ROOM);
        this.keys[start + r] = key;
        this.order[start + r] = s;
        this.rank[start + s] = r;
      }
    }
  }

  // How many of unit u's pairs have at least this key.
  atLeast(u, key) {
    let low = u * this.S, high = low + this.S;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.keys[middle] >= key) low = middle + 1;
      else high = middle;
    }
    return low - u * this.S;
  }

  // Pairs that each unit keeps; scope is "uniform", "layer" or "global", H the heads of a layer.
  counts(ratio, scope, minShare, minPairs, H) {
    const n = nKept(this.S, ratio), counts = new Uint32Array(this.U).fill(n);
    if (scope === "uniform") return counts;
    const size = scope === "layer" ? H : this.U;
    const floor = Math.max(1, Math.trunc(n * minShare), Math.min(minPairs, Math.trunc(2 * n * minShare), n));
    for (let first = 0; first < this.U; first += size) this.share(counts, first, first + size, n, floor);
    return counts;
  }

  // Units share n pairs per unit. Each unit always keeps its best pairs, up to the floor.
  share(counts, first, last, n, floor) {
    const needed = (last - first) * n;
    const total = (key) => {
      let sum = 0;
      for (let u = first; u < last; u++) sum += Math.max(floor, this.atLeast(u, key));
      return sum;
    };
    let edge = 0, beyond = 2 ** 32; // total(edge) >= needed, total(beyond) < needed or nothing is beyond
    while (beyond - edge > 1) {
      const middle = Math.floor((edge + beyond) / 2);
      if (total(middle) >= needed) edge = middle;
      else beyond = middle;
    }
    let left = needed;
    for (let u = first; u < last; u++) left -= counts[u] = Math.max(floor, this.atLeast(u, edge + 1));
    for (let u = first; u < last && left > 0; u++) {
      const more = Math.min(left, Math.max(floor, this.atLeast(u, edge)) - counts[u]);
      counts[u] += more;
      left -= more;
    }
  }
}
