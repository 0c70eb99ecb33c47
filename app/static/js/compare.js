// @ts-check
/** Pinned explanations side by side, with one colour scale for all or each with its own. */

import { announce, byId, make } from "./dom.js";
import { className, number } from "./format.js";
import { draw, scaleOf } from "./stage.js";
import { LRP } from "./state.js";

/** @typedef {import("./types.js").Explanation} Explanation */

/** @param {import("./state.js").Store} store */
export function mountCompare(store) {
  const list = byId("pins");
  const shared = /** @type {HTMLInputElement} */ (byId("shared"));
  store.watch(["pins", "explanation", "view", "shared"], (state) => {
    const { pins, explanation, view } = state;
    byId("compare").hidden = pins.length === 0;
    shared.checked = state.shared;
    if (explanation) {
      const pinned = pins.includes(explanation);
      const button = /** @type {HTMLButtonElement} */ (byId("pin"));
      button.textContent = pinned ? "Pinned" : "Pin to compare";
      button.disabled = pinned;
    }
    if (pins.length === 0) {
      list.replaceChildren();
      return;
    }
    const now = explanation && !pins.includes(explanation) ? [explanation] : [];
    const shown = [...pins, ...now];
    // Cards are made again only when the set changes: a moving slider just repaints.
    const key = shown.map(identity).join(" ");
    if (list.dataset.key !== key) {
      list.dataset.key = key;
      list.replaceChildren(...shown.map((entry) => card(entry, !pins.includes(entry), store)));
    }
    list.querySelectorAll("canvas").forEach((canvas, i) => draw(canvas, shown[i], scaleOf(state, shown[i]), view));
  });
  shared.addEventListener("change", () => store.set({ shared: shared.checked }));
  byId("clear-pins").addEventListener("click", () => {
    store.set({ pins: [] });
    byId("pin").focus();
  });
  byId("pin").addEventListener("click", () => {
    const { explanation, pins } = store.state;
    if (!explanation || pins.includes(explanation)) return;
    store.set({ pins: [...pins, explanation] });
    announce(`Pinned. ${pins.length + 1} to compare.`);
  });
}

/** @type {WeakMap<Explanation, number>} */
const numbers = new WeakMap();
let count = 0;

/** @param {Explanation} explanation */
function identity(explanation) {
  let known = numbers.get(explanation);
  if (known === undefined) numbers.set(explanation, (known = count += 1));
  return known;
}

/** @param {Explanation} entry @param {boolean} now @param {import("./state.js").Store} store */
function card(entry, now, store) {
  const name = className({ index: entry.target, label: entry.label });
  const about = `${entry.imageName} \u00b7 ${entry.modelName} \u00b7 ${entry.how}`;
  const unpin = () => store.set({ pins: store.state.pins.filter((other) => other !== entry) });
  return make(
    "li",
    { class: now ? "now" : null },
    make("canvas", { role: "img", "aria-label": `Relevance for ${name}, ${about}` }),
    make("strong", {}, name),
    make("p", { class: "hint" }, about),
    make("p", { class: "hint" }, `score ${number(entry.score)}${entry.method === LRP ? `, pixels ${number(entry.sum)}` : ""}`),
    now
      ? make("span", { class: "chip" }, "shown above")
      : make("button", { type: "button", class: "quiet", "aria-label": `Unpin ${name}, ${about}`, onclick: unpin }, "Unpin"),
  );
}
