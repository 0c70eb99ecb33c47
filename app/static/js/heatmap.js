// @ts-check
/** From relevance to pixels: pooling, the colour scale's limit, and painting. Pure functions, no DOM. */

import { LUT_SIZE } from "./colormap.js";

/** @typedef {import("./types.js").RelevanceMap} RelevanceMap */
/** @typedef {import("./types.js").Picture} Picture */
/** @typedef {import("./types.js").View} View */

/**
 * Sums relevance over channels: every unit of the score stays in the picture.
 * @param {{shape: number[], values: Float32Array}} array [H,W], [C,H,W] or [1,C,H,W]
 * @returns {RelevanceMap}
 */
export function pool({ shape, values }) {
  const [height, width] = shape.slice(-2);
  const leading = shape.slice(0, -2);
  if (shape.length < 2 || shape.length > 4 || (shape.length === 4 && shape[0] !== 1)) {
    throw new Error(`The relevance has the shape [${shape}]; one image's [C, H, W] is needed.`);
  }
  const channels = leading.reduce((product, n) => product * n, 1);
  const pixels = height * width;
  const sums = new Float64Array(pixels);
  for (let c = 0; c < channels; c += 1) {
    for (let i = 0; i < pixels; i += 1) sums[i] += values[c * pixels + i];
  }
  const pooled = Float32Array.from(sums);
  return { width, height, values: pooled, magnitudes: pooled.map(Math.abs).sort() };
}

/**
 * The magnitude that gets the full colour: a percentile of |relevance|, interpolated linearly as NumPy does.
 * @param {RelevanceMap} map
 * @param {number} percentile 0..100
 */
export function limitOf({ magnitudes }, percentile) {
  if (magnitudes.length === 0) return 0;
  const at = (Math.min(100, Math.max(0, percentile)) / 100) * (magnitudes.length - 1);
  const below = Math.floor(at);
  const above = Math.min(below + 1, magnitudes.length - 1);
  const limit = magnitudes[below] + (magnitudes[above] - magnitudes[below]) * (at - below);
  // A map that is zero at nearly every pixel has a percentile of zero: its peak then sets the scale.
  return limit > 0 ? limit : magnitudes[magnitudes.length - 1];
}

/** @type {Record<View["sign"], (value: number) => boolean>} */
const SHOWN = { all: () => true, positive: (value) => value > 0, negative: (value) => value < 0 };

/**
 * Paints the map, alone or over the picture.
 * @param {RelevanceMap} map
 * @param {Picture} picture of the map's size
 * @param {Uint8ClampedArray} lut from `colormap.lut`
 * @param {number} limit relevance that gets the full colour at gain 1
 * @param {View} view
 * @returns {Uint8ClampedArray<ArrayBuffer>} RGBA
 */
export function paint(map, picture, lut, limit, view) {
  const { values } = map;
  const out = new Uint8ClampedArray(values.length * 4);
  const shown = SHOWN[view.sign];
  const toColour = limit > 0 ? view.gain / limit : 0;
  const half = (LUT_SIZE - 1) / 2;
  const base = picture.rgba;
  const overlay = view.show === "overlay";
  const gray = overlay && view.gray;
  for (let i = 0; i < values.length; i += 1) {
    const signed = shown(values[i]) ? Math.max(-1, Math.min(1, values[i] * toColour)) : 0;
    const from = Math.round((signed + 1) * half) * 3;
    let alpha = 1;
    if (view.show === "image") alpha = 0;
    else if (overlay) alpha = view.opacity * (view.fade ? Math.sqrt(Math.abs(signed)) : 1);
    const [red, green, blue] = [base[i * 4], base[i * 4 + 1], base[i * 4 + 2]];
    const luma = gray ? 0.299 * red + 0.587 * green + 0.114 * blue : 0;
    out[i * 4] = lut[from] * alpha + (gray ? luma : red) * (1 - alpha);
    out[i * 4 + 1] = lut[from + 1] * alpha + (gray ? luma : green) * (1 - alpha);
    out[i * 4 + 2] = lut[from + 2] * alpha + (gray ? luma : blue) * (1 - alpha);
    out[i * 4 + 3] = 255;
  }
  return out;
}
