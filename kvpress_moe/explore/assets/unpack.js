"use strict";
// Base64 -> little-endian arrays, as kvpress_moe/explore/payload.py packs them.

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// bfloat16 is the upper half of a float32.
function fromBfloat16(halves) {
  const bits = new Uint32Array(halves.length);
  for (let i = 0; i < bits.length; i++) bits[i] = halves[i] << 16;
  return new Float32Array(bits.buffer);
}

// The record with its axes: L layers, H heads, U = L * H units, S tokens, E experts; arrays are flat, first axis slowest.
function unpack(data) {
  const L = data.layers.length, H = data.heads, S = data.tokens.length, E = data.experts.length;
  return {
    ...data, L, H, U: L * H, S, E,
    scores: new Float32Array(bytesOf(data.scores).buffer), // (U, S)
    weights: new Uint16Array(bytesOf(data.weights).buffer), // (L, S, E), in 1/65535
    moves: new Int8Array(bytesOf(data.moves).buffer), // (U, E, S), in 1/127 of the unit's scale
    moveScale: data.move_scale.flat(),
    strategies: data.strategies && { ...data.strategies, prices: new Uint16Array(bytesOf(data.strategies.prices).buffer) }, // prices: (M, U, S)
    mass: fromBfloat16(new Uint16Array(bytesOf(data.mass).buffer)), // (U, S)
  };
}
