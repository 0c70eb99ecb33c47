// @ts-check
/** The big picture: the map over the image, its colour bar, its controls, and what a pixel says. */

import { COLORMAPS, lut } from "./colormap.js";
import { announce, byId, download, make } from "./dom.js";
import { className, percent, signed, slug } from "./format.js";
import { limitOf, paint } from "./heatmap.js";
import { DEFAULT_VIEW, LRP } from "./state.js";

/** @typedef {import("./types.js").Explanation} Explanation */
/** @typedef {import("./types.js").State} State */
/** @typedef {import("./types.js").View} View */

/** Saved pictures are enlarged by whole pixels up to about this side, for reports. */
const SAVED_SIDE = 672;

/** @type {{name: string, table: Uint8ClampedArray} | null} */
let cached = null;

/** @param {string} name */
export function table(name) {
  if (cached?.name !== name) cached = { name, table: lut(name) };
  return cached.table;
}

/**
 * The relevance that gets the full colour: of this map alone, or of all by its method that are compared; methods have
 * units of their own.
 * @param {State} state @param {Explanation} explanation
 */
export function scaleOf({ pins, explanation: now, shared, view }, explanation) {
  const shown = pins.length > 0 && shared ? [...pins, ...(now ? [now] : [])] : [];
  const compared = shown.length > 0 ? shown.filter(({ method }) => method === explanation.method) : [explanation];
  return Math.max(...compared.map(({ map }) => limitOf(map, view.clip)));
}

/**
 * @param {HTMLCanvasElement} canvas @param {Explanation} explanation @param {number} limit @param {View} view
 */
export function draw(canvas, { map, picture }, limit, view) {
  if (canvas.width !== map.width || canvas.height !== map.height) {
    canvas.width = map.width;
    canvas.height = map.height;
  }
  canvas.classList.toggle("smooth", view.smooth);
  const image = new ImageData(paint(map, picture, table(view.cmap), limit, view), map.width, map.height);
  canvas.getContext("2d")?.putImageData(image, 0, 0);
}

/** @param {import("./state.js").Store} store @param {import("./session.js").Session} session */
export function mountStage(store, session) {
  const canvas = /** @type {HTMLCanvasElement} */ (byId("canvas"));
  store.watch(["explanation", "picture", "view", "pins", "shared"], (state) => paintStage(canvas, state));
  store.watch(["explanation", "image", "busy", "models"], paintTitle);
  store.watch(["busy"], ({ busy }) => {
    byId("busy").hidden = busy === null;
    byId("frame").setAttribute("aria-busy", String(busy !== null));
    if (busy) {
      byId("busy-text").textContent = busy.text;
      announce(busy.text);
    }
  });
  store.watch(["explanation"], ({ explanation }) => {
    if (explanation) announce(`Heatmap for ${className({ index: explanation.target, label: explanation.label })} is ready.`);
  });
  byId("cancel").addEventListener("click", () => session.cancel());
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && store.state.busy) session.cancel();
  });
  mountControls(store);
  mountReadout(canvas, store);
  mountSaving(store);
}

/** @param {HTMLCanvasElement} canvas @param {State} state */
function paintStage(canvas, state) {
  const { explanation, picture, view } = state;
  byId("empty").hidden = picture !== null;
  canvas.hidden = picture === null;
  byId("legend").hidden = explanation === null;
  for (const id of ["pin", "save-heatmap", "save-overlay", "save-npy"]) {
    /** @type {HTMLButtonElement} */ (byId(id)).disabled = explanation === null;
  }
  if (!picture) return;
  if (!explanation) {
    byId("marker").hidden = true;
    canvas.width = picture.width;
    canvas.height = picture.height;
    canvas.getContext("2d")?.putImageData(new ImageData(new Uint8ClampedArray(picture.rgba), picture.width), 0, 0);
    canvas.setAttribute("aria-label", "The image as the network sees it; no heatmap yet");
    return;
  }
  const limit = scaleOf(state, explanation);
  draw(canvas, explanation, limit, view);
  canvas.setAttribute(
    "aria-label",
    `Relevance of each pixel for ${className({ index: explanation.target, label: explanation.label })}, ` +
      `network ${explanation.modelName}, method ${explanation.how}`,
  );
  paintLegend(limit / view.gain, view);
}

/** @param {number} end relevance at the bar's ends @param {View} view */
function paintLegend(end, view) {
  const bar = /** @type {HTMLCanvasElement} */ (byId("colourbar"));
  const context = bar.getContext("2d");
  const colours = table(view.cmap);
  const strip = new Uint8ClampedArray(bar.width * 4);
  const last = colours.length / 3 - 1;
  for (let x = 0; x < bar.width; x += 1) {
    const from = Math.round((x / (bar.width - 1)) * last) * 3;
    strip.set(colours.subarray(from, from + 3), x * 4);
    strip[x * 4 + 3] = 255;
  }
  context?.putImageData(new ImageData(strip, bar.width), 0, 0);
  byId("tick-low").textContent = signed(-end);
  byId("tick-high").textContent = signed(end);
  bar.setAttribute("aria-label", `Colour scale from ${signed(-end)} through 0 to ${signed(end)}`);
}

/** @param {State} state */
function paintTitle({ explanation, image, busy }) {
  const title = byId("stage-title");
  if (explanation) {
    title.replaceChildren(
      className({ index: explanation.target, label: explanation.label }),
      make("br"),
      make("small", {}, `${explanation.imageName} \u00b7 ${explanation.modelName} \u00b7 ${explanation.how}`),
    );
  } else if (image) {
    title.replaceChildren(busy ? image.name : `${image.name}: not explained`);
    if (!busy) title.append(" ", make("button", { type: "button", class: "quiet", id: "again" }, "Explain"));
  } else {
    title.textContent = "No image yet";
  }
}

/** @param {import("./state.js").Store} store */
function mountControls(store) {
  const form = /** @type {HTMLFormElement} */ (byId("view"));
  const cmap = /** @type {HTMLSelectElement} */ (byId("cmap"));
  cmap.replaceChildren(...Object.entries(COLORMAPS).map(([value, { label }]) => make("option", { value }, label)));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    const fields = new FormData(form);
    store.setView({
      show: /** @type {View["show"]} */ (fields.get("show")),
      sign: /** @type {View["sign"]} */ (fields.get("sign")),
      opacity: Number(fields.get("opacity")),
      clip: Number(fields.get("clip")),
      gain: 2 ** Number(fields.get("gain")), // the slider counts doublings
      cmap: String(fields.get("cmap")),
      fade: fields.has("fade"),
      gray: fields.has("gray"),
      smooth: fields.has("smooth"),
    });
  });
  byId("reset-view").addEventListener("click", () => store.set({ view: { ...DEFAULT_VIEW } }));
  store.watch(["view"], ({ view }) => {
    const set = (/** @type {string} */ name, /** @type {string} */ value) => {
      /** @type {HTMLInputElement | RadioNodeList} */ (form.elements.namedItem(name)).value = value;
    };
    for (const name of /** @type {const} */ (["show", "sign", "opacity", "clip", "cmap"])) set(name, String(view[name]));
    set("gain", String(Math.log2(view.gain)));
    for (const name of /** @type {const} */ (["fade", "gray", "smooth"])) {
      /** @type {HTMLInputElement} */ (form.elements.namedItem(name)).checked = view[name];
    }
    byId("opacity-value").textContent = `${Math.round(view.opacity * 100)}\u2009%`;
    byId("clip-value").textContent = `${view.clip.toFixed(1)}\u2009%`;
    byId("gain-value").textContent = `\u00d7${view.gain.toFixed(2)}`;
    const onlyOverlay = /** @type {HTMLInputElement} */ (form.elements.namedItem("opacity"));
    onlyOverlay.disabled = view.show !== "overlay";
  });
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** @param {HTMLCanvasElement} canvas @param {import("./state.js").Store} store */
function mountReadout(canvas, store) {
  const readout = byId("readout");
  const marker = byId("marker");
  const hint = readout.textContent ?? "";
  let cursor = { x: 0, y: 0, placed: false };

  const tell = (/** @type {number} */ x, /** @type {number} */ y) => {
    const { explanation } = store.state;
    if (!explanation) return "";
    const { map, picture, score, method } = explanation;
    const at = y * map.width + x;
    const value = map.values[at];
    const share = score && method === LRP ? `  (${percent(value / score)} of the score)` : "";
    const colour = [...picture.rgba.slice(at * 4, at * 4 + 3)].join(" ");
    readout.textContent = `row ${y}, column ${x}: ${signed(value)}${share}  RGB ${colour}`;
    return readout.textContent;
  };
  const clear = () => {
    readout.textContent = hint;
    marker.hidden = true;
  };

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * canvas.width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * canvas.height);
    if (x < 0 || y < 0 || x >= canvas.width || y >= canvas.height) return;
    cursor = { x, y, placed: true };
    marker.hidden = true;
    tell(x, y);
  });
  canvas.addEventListener("pointerleave", clear);
  canvas.addEventListener("blur", clear);
  canvas.addEventListener("keydown", (event) => {
    const step = /** @type {Record<string, number[]>} */ (ARROWS)[event.key];
    if (!step || !store.state.explanation) return;
    event.preventDefault();
    const reach = event.shiftKey ? 10 : 1;
    const from = cursor.placed ? cursor : { x: canvas.width >> 1, y: canvas.height >> 1 };
    const x = Math.max(0, Math.min(canvas.width - 1, from.x + step[0] * reach));
    const y = Math.max(0, Math.min(canvas.height - 1, from.y + step[1] * reach));
    cursor = { x, y, placed: true };
    const size = canvas.clientWidth / canvas.width;
    marker.style.left = `${canvas.offsetLeft + x * size}px`;
    marker.style.top = `${canvas.offsetTop + y * size}px`;
    marker.style.width = `${size}px`;
    marker.style.height = `${size}px`;
    marker.hidden = false;
    announce(tell(x, y));
  });
  store.watch(["explanation"], () => {
    cursor.placed = false;
    clear();
  });
}

/** @param {import("./state.js").Store} store */
function mountSaving(store) {
  const named = (/** @type {Explanation} */ e, /** @type {string} */ kind) =>
    ["clearfold", e.imageName.replace(/\.\w+$/, ""), e.modelName, e.label || `class${e.target}`, e.how, kind]
      .filter(Boolean).map(slug).join("_");

  const save = async (/** @type {"heatmap" | "overlay"} */ show) => {
    const { explanation, view } = store.state;
    if (!explanation) return;
    const native = /** @type {HTMLCanvasElement} */ (make("canvas"));
    draw(native, explanation, scaleOf(store.state, explanation), { ...view, show });
    const times = Math.max(1, Math.floor(SAVED_SIDE / Math.max(native.width, native.height)));
    const large = /** @type {HTMLCanvasElement} */ (make("canvas", { width: native.width * times, height: native.height * times }));
    const context = large.getContext("2d");
    if (!context) return;
    context.imageSmoothingEnabled = view.smooth;
    context.drawImage(native, 0, 0, large.width, large.height);
    large.toBlob((blob) => blob && download(blob, `${named(explanation, show)}.png`), "image/png");
  };
  byId("save-heatmap").addEventListener("click", () => save("heatmap"));
  byId("save-overlay").addEventListener("click", () => save("overlay"));
  byId("save-npy").addEventListener("click", () => {
    const { explanation } = store.state;
    if (explanation) download(new Blob([explanation.npy]), `${named(explanation, "relevance")}.npy`);
  });
}

