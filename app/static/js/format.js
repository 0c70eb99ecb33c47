// @ts-check
/** Numbers and names in words that people read. */

/** Typographic minus, four significant digits. @param {number} x */
export function number(x) {
  if (!Number.isFinite(x)) return "not a number";
  const size = Math.abs(x);
  let text;
  if (size === 0) text = "0";
  else if (size < 0.001 || size >= 100_000) text = size.toExponential(1);
  else text = size.toPrecision(size >= 1000 ? 5 : 4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  return (x < 0 ? "\u2212" : "") + text;
}

/** @param {number} x */
export function signed(x) {
  return x > 0 ? `+${number(x)}` : number(x);
}

/** A share of a whole. @param {number} fraction */
export function percent(fraction) {
  if (!Number.isFinite(fraction)) return "\u2013";
  const value = fraction * 100;
  const size = Math.abs(value);
  const sign = value < 0 ? "\u2212" : "";
  if (size !== 0 && size < 0.05) return "<\u20090.1\u2009%";
  return `${sign}${size.toFixed(1)}\u2009%`;
}

/**
 * What is explained: a class by its label or index, an output by what was said of it, or else by its name.
 * @param {{label: string | null, index: import("./types.js").Target | null}} entry
 */
export function className({ label, index }) {
  if (label) return label;
  return typeof index === "string" ? `Output ${JSON.parse(index).output}` : `Class ${index}`;
}

/** @param {number} bytes */
export function fileSize(bytes) {
  if (bytes < 1e3) return `${bytes} B`;
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(0)} kB`;
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

/** @param {number} count @param {string} one @param {string} [many] */
export function plural(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

/** A part of a file's name. @param {string} text */
export function slug(text) {
  return text.normalize("NFKD").replace(/[^\w.-]+/g, "-").replace(/^-+|-+$/g, "") || "unnamed";
}
