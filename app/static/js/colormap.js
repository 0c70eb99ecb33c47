// @ts-check
/** Colour maps as a few colours with positions in [0, 1]; zero relevance is at 1/2. */

/** @typedef {[at: number, red: number, green: number, blue: number]} Stop */

/** Odd, so that zero has an entry of its own; fine enough that no 8-bit level is skipped. */
export const LUT_SIZE = 2041;

/** @param {string} hex colours in equal steps @returns {Stop[]} */
function even(hex) {
  const colours = hex.split(" ");
  return colours.map((colour, i) => [
    i / (colours.length - 1),
    parseInt(colour.slice(0, 2), 16),
    parseInt(colour.slice(2, 4), 16),
    parseInt(colour.slice(4, 6), 16),
  ]);
}

/**
 * From most negative to most positive, the same colours as the library's. `label` is what the list shows.
 * @type {Record<string, {label: string, stops: Stop[]}>}
 */
export const COLORMAPS = {
  bwr: { label: "bwr: blue, white, red", stops: even("0000ff ffffff ff0000") },
  seismic: { label: "seismic: deep blue to deep red", stops: even("00004d 0000ff ffffff ff0000 800000") },
  puor: { label: "PuOr: safe for colour-blind readers", stops: even("7f3b08 f1a340 f7f7f7 998ec3 2d004b") },
  coldnhot: { label: "coldnhot: dark where zero", stops: even("00ffff 0000ff 000000 ff0000 ffff00") },
  hot: { label: "hot: only what speaks for", stops: even("000000 000000 000000 ff0000 ffff00 ffffff ffffff") },
  wred: { label: "wred: only what speaks for", stops: even("ffffff ffffff ff0000") },
  gray: { label: "gray: dark against, light for", stops: even("000000 7f7f7f ffffff") },
  france: { label: "france", stops: even("0000ff ffffff ff0000") },
};

/**
 * @param {string} name
 * @returns {Uint8ClampedArray} LUT_SIZE × RGB
 */
export function lut(name) {
  const { stops } = COLORMAPS[name] ?? COLORMAPS.bwr;
  const table = new Uint8ClampedArray(LUT_SIZE * 3);
  let next = 1;
  for (let i = 0; i < LUT_SIZE; i += 1) {
    const at = i / (LUT_SIZE - 1);
    while (next < stops.length - 1 && at > stops[next][0]) next += 1;
    const [from, to] = [stops[next - 1], stops[next]];
    const part = (at - from[0]) / (to[0] - from[0]);
    for (let c = 1; c <= 3; c += 1) table[i * 3 + c - 1] = from[c] + (to[c] - from[c]) * part;
  }
  return table;
}
