// The promise: expected KL divergence over the share that stays, with the bound and the point that was taken.

const SVG = "http://www.w3.org/2000/svg";

function draw(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const rounded = (number) => Number(number.toPrecision(2)).toString();

function showPromise(promise, what) {
  const { max_kl, confidence, share, expected_kl, is_unlike, is_enough, shares, expected_kls } = promise;
  const held = !is_enough ? "The largest number of bytes, or the menu, is too small for it."
    : is_unlike ? "Nothing is promised: the text is unlike those of the calibration. It keeps more than others."
      : `It holds for ${percent(confidence)} of the texts like those of the calibration.`;
  find("promised").textContent = `The mean KL divergence from the full cache's answers is to be at most ${max_kl}. `
    + `${percent(share, 1)} of the ${what} stay. The expected KL divergence is ${rounded(expected_kl)}. ${held}`;
  find("promise").hidden = false;
  const W = Math.max(280, Math.min(640, find("curve").clientWidth)), H = 220, LEFT = 52, RIGHT = 26, TOP = 14, BOTTOM = 40;
  const least = 1e-5, kls = expected_kls.map((kl) => Math.max(kl, least));
  const low = Math.log(Math.min(...kls, max_kl)), high = Math.log(Math.max(...kls, max_kl));
  const x = (s) => LEFT + (W - LEFT - RIGHT) * (Math.log(s) - Math.log(shares[0])) / (0 - Math.log(shares[0]));
  const y = (kl) => TOP + (H - TOP - BOTTOM) * (high - Math.log(Math.max(kl, least))) / (high - low || 1);
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `Expected KL divergence over the share of the ${what}` });
  for (const s of [0.01, 0.03, 0.1, 0.3, 1].filter((s) => s >= shares[0])) {
    svg.append(draw("line", { x1: x(s), x2: x(s), y1: TOP, y2: H - BOTTOM, class: "grid" }));
    svg.append(draw("text", { x: x(s), y: H - BOTTOM + 16, "text-anchor": "middle" }, percent(s)));
  }
  for (let kl = 10 ** Math.ceil(low / Math.LN10); Math.log(kl) <= high; kl *= 10) {
    svg.append(draw("line", { x1: LEFT, x2: W - RIGHT, y1: y(kl), y2: y(kl), class: "grid" }));
    svg.append(draw("text", { x: LEFT - 6, y: y(kl) + 4, "text-anchor": "end" }, rounded(kl)));
  }
  svg.append(draw("text", { x: (LEFT + W - RIGHT) / 2, y: H - 6, "text-anchor": "middle" }, `share of the ${what}`));
  svg.append(draw("line", { x1: LEFT, x2: W - RIGHT, y1: y(max_kl), y2: y(max_kl), class: "bound" }));
  svg.append(draw("text", { x: W - RIGHT, y: y(max_kl) - 5, "text-anchor": "end", class: "strong" }, `max_kl ${max_kl}`));
  svg.append(draw("polyline", { points: shares.map((s, i) => `${x(s)},${y(kls[i])}`).join(" "), class: "curve" }));
  svg.append(draw("circle", { cx: x(share), cy: y(expected_kl), r: 5, class: "taken" }));
  find("curve").append(svg, make("p", { className: "note" }, "Line: expected KL divergence, a median. Dashed: the bound. Dot: what was taken. The distance between dot and bound is what the calibration demands."));
}
