// @ts-check
/** The choice of method, of LRP's composite, and of what either can be told, with a line on what each is for. */

import { byId, make } from "./dom.js";
import { LRP } from "./state.js";

/** @typedef {import("./types.js").Option} Option */
/** @typedef {import("./types.js").State} State */

/** For readers who don't know the field's names; what has no words here shows the server's. @type {Record<string, string>} */
const ABOUT = {
  [LRP]: "Layer-wise relevance propagation: the score is handed back layer by layer, and every unit is accounted for.",
  EpsilonPlus: "z\u207a in convolutions, \u03b5 in dense layers: shows mainly what speaks for the class.",
  EpsilonPlusFlat: "As EpsilonPlus, and spread evenly within the first layer\u2019s reach: calm and easy to read.",
  EpsilonGammaBox: "\u03b3 in convolutions, the input\u2019s bounds at the pixels: sharper, with both signs.",
  EpsilonAlpha2Beta1: "\u03b12\u03b21 in convolutions: strong contrast between for and against.",
  EpsilonAlpha2Beta1Flat: "As EpsilonAlpha2Beta1, and spread evenly within the first layer\u2019s reach.",
};

/** What a text must be for an option of this type, and its value; undefined if it is none of that. @type {Record<Option["type"], {read: (text: string) => number | string | undefined, words: string}>} */
const TYPES = {
  integer: { read: (text) => (/^[+-]?\d+$/.test(text) ? Number(text) : undefined), words: "a whole number" },
  number: { read: (text) => (Number.isFinite(Number(text)) ? Number(text) : undefined), words: "a number, such as 1e-6" },
  size: { read: (text) => (/^\d+(x\d+)?$/.test(text) ? text : undefined), words: "a number of pixels, or height and width, such as 28x14" },
  choice: { read: (text) => text, words: "one of the list" },
  layer: { read: (text) => text, words: "the name of a layer" },
};

/**
 * The value that a text stands for, or what it must be.
 * @param {Option} option @param {string} text
 * @returns {{value?: number | string, wrong: string}}
 */
export function readOption({ type, minimum, maximum }, text) {
  const value = TYPES[type].read(text);
  const within = (/** @type {number | string} */ x) => typeof x === "string" || ((minimum == null || x >= minimum) && (maximum == null || x <= maximum));
  if (value !== undefined && within(value)) return { value, wrong: "" };
  const bounds = minimum == null || maximum == null ? "" : ` from ${minimum} to ${maximum}`;
  return { wrong: `This must be ${TYPES[type].words}${bounds}.` };
}

/**
 * What can be told to the chosen method, or to LRP's composite.
 * @param {State} state @returns {Option[]}
 */
function optionsOf({ methods, method, composites, composite }) {
  if (method !== LRP) return methods.find(({ name }) => name === method)?.parameters ?? [];
  const numbers = Object.entries(composites.find(({ name }) => name === composite)?.parameters ?? {});
  return numbers
    .filter(([, value]) => typeof value === "number")
    .map(([name, value]) => ({ name, type: "number", description: "", default: /** @type {number} */ (value) }));
}

/** @param {import("./state.js").Store} store @param {import("./session.js").Session} session */
export function mountMethod(store, session) {
  const methodSelect = /** @type {HTMLSelectElement} */ (byId("method"));
  const compositeSelect = /** @type {HTMLSelectElement} */ (byId("composite"));
  const form = /** @type {HTMLFormElement} */ (byId("parameters"));
  store.watch(["methods", "method", "composites", "composite", "parameters"], (state) => {
    const { methods, method, composites, composite } = state;
    fill(methodSelect, methods, method, byId("method-about"));
    fill(compositeSelect, composites, composite, byId("composite-about"));
    byId("composite-box").hidden = method !== LRP;
    const options = optionsOf(state);
    byId("parameters-box").hidden = options.length === 0;
    form.replaceChildren(...options.map((option) => field(option, state.parameters[option.name])));
  });
  methodSelect.addEventListener("change", () => session.chooseMethod(methodSelect.value));
  compositeSelect.addEventListener("change", () => session.chooseComposite(compositeSelect.value));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", () => {
    /** @type {Record<string, number | string>} */
    const changed = {};
    for (const option of optionsOf(store.state)) {
      const input = /** @type {HTMLInputElement | HTMLSelectElement} */ (form.elements.namedItem(option.name));
      const text = input.value.trim();
      const { value, wrong } = text === "" ? { value: undefined, wrong: "" } : readOption(option, text);
      input.setCustomValidity(wrong);
      if (!input.reportValidity()) return;
      if (value === undefined) input.value = String(option.default ?? "");
      else if (value !== option.default) changed[option.name] = value;
    }
    session.chooseParameters(changed);
  });
}

/**
 * @param {HTMLSelectElement} select @param {{name: string, description?: string}[]} entries
 * @param {string | null} chosen @param {HTMLElement} about
 */
function fill(select, entries, chosen, about) {
  if (select.options.length !== entries.length) {
    select.replaceChildren(...entries.map(({ name }) => make("option", { value: name }, name)));
  }
  if (chosen) select.value = chosen;
  about.textContent = ABOUT[chosen ?? ""] ?? entries.find(({ name }) => name === chosen)?.description ?? "";
}

/** @param {Option} option @param {number | string | undefined} value the one that was chosen */
function field({ name, type, description, default: standard, choices }, value) {
  const shown = String(value ?? standard ?? "");
  const control =
    type === "choice"
      ? make("select", { name, title: description || null }, ...(choices ?? []).map((choice) => make("option", { value: choice, selected: choice === shown }, choice)))
      : make("input", {
          name,
          type: "text",
          inputmode: type === "integer" || type === "number" ? "decimal" : "text",
          value: shown,
          placeholder: standard ?? "automatic",
          spellcheck: "false",
          title: description || null,
        });
  return make("label", {}, name, control);
}
