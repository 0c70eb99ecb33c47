// @ts-check
/** The error panel: title and detail of a problem, until it is dismissed or something new is tried. */

import { byId, make } from "./dom.js";

/** @param {import("./state.js").Store} store */
export function mountProblems(store) {
  const panel = byId("problem");
  store.watch(["problem"], ({ problem }) => {
    panel.hidden = problem === null;
    if (!problem) {
      panel.replaceChildren();
      return;
    }
    const { title, detail, errors, instance } = problem;
    panel.replaceChildren(
      make(
        "div",
        {},
        make("strong", {}, title),
        detail && detail !== title ? make("p", {}, detail) : null,
        errors.length ? make("ul", {}, ...errors.map((line) => make("li", {}, line))) : null,
        instance ? make("small", {}, `Request ${instance}`) : null,
      ),
      make("button", { type: "button", class: "quiet", onclick: () => store.set({ problem: null }) }, "Dismiss"),
    );
  });
}
