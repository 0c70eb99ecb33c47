// @ts-check
/** The choice of composite and its parameters, with a line on what each is for. */

import { byId, make } from "./dom.js";

/** For readers who don't know the field's names; a composite without words shows the server's. @type {Record<string, string>} */
const ABOUT = {
  EpsilonPlus: "z\u207a in convolutions, \u03b5 in dense layers: shows mainly what speaks for the class.",
  EpsilonPlusFlat: "As EpsilonPlus, and spread evenly within the first layer\u2019s reach: calm and easy to read.",
  EpsilonGammaBox: "\u03b3 in convolutions, the input\u2019s bounds at the pixels: sharper, with both signs.",
  EpsilonAlpha2Beta1: "\u03b12\u03b21 in convolutions: strong contrast between for and against.",
  EpsilonAlpha2Beta1Flat: "As EpsilonAlpha2Beta1, and spread evenly within the first layer\u2019s reach.",
};

/** @param {import("./state.js").Store} store @param {import("./session.js").Session} session */
export function mountMethod(store, session) {
  const select = /** @type {HTMLSelectElement} */ (byId("composite"));
  const form = /** @type {HTMLFormElement} */ (byId("parameters"));
  store.watch(["composites", "composite"], ({ composites, composite, parameters }) => {
    if (select.options.length !== composites.length) {
      select.replaceChildren(...composites.map(({ name }) => make("option", { value: name }, name)));
    }
    if (composite) select.value = composite;
    const chosen = composites.find(({ name }) => name === composite);
    byId("composite-about").textContent = ABOUT[composite ?? ""] ?? chosen?.description ?? "";
    const numbers = Object.entries(chosen?.parameters ?? {}).filter(([, value]) => typeof value === "number");
    byId("parameters-box").hidden = numbers.length === 0;
    form.replaceChildren(
      ...numbers.map(([name, value]) =>
        make(
          "label",
          {},
          name,
          make("input", { name, type: "text", inputmode: "decimal", value: parameters[name] ?? value, placeholder: value, "data-default": value }),
        ),
      ),
    );
  });
  select.addEventListener("change", () => session.chooseComposite(select.value));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", () => {
    /** @type {Record<string, number>} */
    const changed = {};
    for (const input of form.querySelectorAll("input")) {
      const value = input.value.trim() === "" ? NaN : Number(input.value);
      input.setCustomValidity(Number.isFinite(value) || input.value.trim() === "" ? "" : "This must be a number, such as 1e-6.");
      if (!input.reportValidity()) return;
      if (Number.isNaN(value)) input.value = input.dataset.default ?? "";
      else if (value !== Number(input.dataset.default)) changed[input.name] = value;
    }
    session.chooseParameters(changed);
  });
}
