// @ts-check
/** Reads NumPy's .npy files (format 1 to 3), so that float32 relevance reaches the page without loss. */

const MAGIC = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59]; // \x93NUMPY

/** @type {Record<string, [number, (view: DataView, at: number, little: boolean) => number]>} */
const READERS = {
  f4: [4, (view, at, little) => view.getFloat32(at, little)],
  f8: [8, (view, at, little) => view.getFloat64(at, little)],
  u1: [1, (view, at) => view.getUint8(at)],
};

const HOST_IS_LITTLE = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1;

/**
 * @param {ArrayBuffer} buffer
 * @returns {{shape: number[], values: Float32Array}} values in row-major order
 */
export function parseNpy(buffer) {
  const bytes = new Uint8Array(buffer);
  if (bytes.length < 12 || MAGIC.some((byte, i) => bytes[i] !== byte)) {
    throw new Error("The answer is not a NumPy array.");
  }
  const view = new DataView(buffer);
  const wide = bytes[6] >= 2; // format 1 has a 16-bit header length, later ones 32 bits
  const start = wide ? 12 : 10;
  const end = start + (wide ? view.getUint32(8, true) : view.getUint16(8, true));
  if (end > bytes.length) throw new Error("The NumPy array is cut off within its header.");
  const header = new TextDecoder("latin1").decode(bytes.subarray(start, end));

  const descr = /'descr':\s*'([<>|=])([a-z]\d)'/.exec(header);
  const shapeText = /'shape':\s*\(([^)]*)\)/.exec(header);
  const reader = descr && READERS[descr[2]];
  if (!descr || !reader || !shapeText) throw new Error(`The NumPy array has an unknown layout: ${header.trim()}`);
  if (/'fortran_order':\s*True/.test(header)) throw new Error("The NumPy array is in column order; row order is needed.");

  const shape = shapeText[1].split(",").map((part) => part.trim()).filter(Boolean).map(Number);
  const count = shape.reduce((product, n) => product * n, 1);
  const [size, read] = reader;
  if (end + count * size > bytes.length) throw new Error("The NumPy array is cut off.");

  const little = descr[1] !== ">";
  if (descr[2] === "f4" && little && HOST_IS_LITTLE) {
    return { shape, values: new Float32Array(buffer.slice(end, end + count * size)) };
  }
  const values = new Float32Array(count);
  for (let i = 0; i < count; i += 1) values[i] = read(view, end + i * size, little);
  return { shape, values };
}
