// @ts-check
/** The most probable classes as bars, and a search over all of them; choosing one explains it. */

import { byId, make } from "./dom.js";
import { className, number, percent, plural } from "./format.js";

/** @typedef {import("./types.js").State} State */

const SHOWN_MATCHES = 12;

/**
 * Classes whose index or label fits: an equal index first, then labels that begin so, then labels that contain it.
 * @param {string} query @param {string[] | null} labels @param {number} count
 * @returns {number[]}
 */
export function matches(query, labels, count) {
  const text = query.trim().toLowerCase();
  if (!text) return [];
  const ranked = [];
  for (let index = 0; index < count; index += 1) {
    const label = (labels?.[index] ?? `class ${index}`).toLowerCase();
    let rank = 3;
    if (String(index) === text || label === text) rank = 0;
    else if (label.startsWith(text)) rank = 1;
    else if (label.includes(text) || String(index).startsWith(text)) rank = 2;
    if (rank < 3) ranked.push({ index, rank });
  }
  return ranked.sort((a, b) => a.rank - b.rank || a.index - b.index).map(({ index }) => index);
}

/** @param {import("./state.js").Store} store @param {import("./session.js").Session} session */
export function mountClasses(store, session) {
  const list = byId("classes");
  store.watch(["predictions", "explanation", "busy", "modelId"], (state) => {
    const refocus = list.contains(document.activeElement)
      ? /** @type {HTMLElement} */ (document.activeElement).dataset.index
      : undefined;
    byId("classes-hint").hidden = state.predictions !== null;
    list.replaceChildren(...rows(state, session));
    if (refocus) /** @type {HTMLElement | null} */ (list.querySelector(`[data-index="${CSS.escape(refocus)}"]`))?.focus();
  });
  mountSearch(store, session);
}

/** @param {State} state @param {import("./session.js").Session} session */
function rows({ predictions, explanation, busy, models, modelId }, session) {
  if (!predictions) return [];
  const target = busy ? busy.target : (explanation?.target ?? null);
  const model = models.find(({ id }) => id === modelId);
  const entries = predictions.map((entry) => row(entry, entry.index === target, session));
  const explained = explanation?.target ?? null;
  if (explanation && typeof explained === "number" && !predictions.some(({ index }) => index === explained)) {
    // The explained class came from the search: it has a score, but no place among the bars.
    entries.push(row({ ...explanation, index: explained, probability: null }, !busy, session));
  }
  return [...entries, ...outputs(model, target, session)];
}

/**
 * What else the network answers; choosing an output explains what it is explained by when nothing is said of it.
 * @param {import("./types.js").Model | undefined} model @param {import("./types.js").Target | null} target
 * @param {import("./session.js").Session} session
 */
function outputs(model, target, session) {
  if (!model || (model.classes !== null && model.outputs.length < 2)) return [];
  return model.outputs.map(({ name, kind, shape }) => {
    const named = JSON.stringify({ output: name });
    const byDefault = target === null && model.classes === null && name === model.default_output;
    const pressed = target === named || byDefault;
    return make(
      "li",
      {},
      make(
        "button",
        { type: "button", "aria-pressed": pressed, "data-index": named, title: `Output ${name}`, onclick: () => session.chooseTarget(named) },
        make("span", { class: "label" }, name, " ", make("small", {}, `${kind}, ${shape.slice(1).join("\u2009\u00d7\u2009")}`)),
      ),
    );
  });
}

/** How many classes can be chosen by index: those with scores, or the channels of a map. @param {import("./types.js").Model} model */
export function choices({ classes, outputs, default_output }) {
  if (classes !== null) return classes;
  const explained = outputs.find(({ name }) => name === default_output);
  return explained?.kind === "map" ? (explained.shape[1] ?? 0) : 0;
}

/**
 * @param {{index: number, label: string | null, probability: number | null, score: number}} entry
 * @param {boolean} pressed @param {import("./session.js").Session} session
 */
function row(entry, pressed, session) {
  const { index, probability, score } = entry;
  const fill = make("span", { class: "fill" });
  fill.style.width = `${(probability ?? 0) * 100}%`;
  return make(
    "li",
    {},
    make(
      "button",
      {
        type: "button",
        "aria-pressed": pressed,
        "data-index": index,
        title: `Class ${index}, score ${number(score)}`,
        onclick: () => session.chooseTarget(index),
      },
      make("span", { class: "label" }, className(entry), " ", make("small", {}, probability === null ? `score ${number(score)}` : "")),
      make("span", { class: "share" }, probability === null ? "" : percent(probability)),
      probability === null ? null : make("span", { class: "track", "aria-hidden": "true" }, fill),
    ),
  );
}

/** @param {import("./state.js").Store} store @param {import("./session.js").Session} session */
function mountSearch(store, session) {
  const input = /** @type {HTMLInputElement} */ (byId("class-search"));
  const list = byId("class-results");
  /** @type {number[]} */
  let found = [];
  let active = 0;

  const close = () => {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };
  const choose = (/** @type {number} */ index) => {
    input.value = "";
    close();
    session.chooseTarget(index);
  };
  const show = () => {
    const model = store.state.models.find(({ id }) => id === store.state.modelId);
    if (!model || !input.value.trim()) return close();
    const all = matches(input.value, model.labels, choices(model));
    found = all.slice(0, SHOWN_MATCHES);
    active = Math.min(active, Math.max(0, found.length - 1));
    list.replaceChildren(
      ...found.map((index, place) =>
        make(
          "li",
          {
            role: "option",
            id: `class-option-${index}`,
            "aria-selected": place === active,
            // mousedown, because a click would come after the field's blur has closed the list
            onmousedown: (/** @type {Event} */ event) => {
              event.preventDefault();
              choose(index);
            },
          },
          make("span", {}, className({ index, label: model.labels?.[index] ?? null })),
          make("small", {}, String(index)),
        ),
      ),
    );
    if (all.length === 0) list.append(make("li", { class: "none" }, `None of the ${plural(choices(model), "class", "classes")} fits`));
    if (all.length > found.length) list.append(make("li", { class: "none" }, `and ${plural(all.length - found.length, "more", "more")}`));
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    if (found.length) input.setAttribute("aria-activedescendant", `class-option-${found[active]}`);
    else input.removeAttribute("aria-activedescendant");
  };

  input.addEventListener("input", () => {
    active = 0;
    show();
  });
  input.addEventListener("focus", show);
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      active = (active + (event.key === "ArrowDown" ? 1 : found.length - 1)) % Math.max(1, found.length);
      show();
      list.querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter" && !list.hidden && found.length) {
      event.preventDefault();
      choose(found[active]);
    } else if (event.key === "Escape") {
      close();
    }
  });
  store.watch(["image"], ({ image }) => {
    input.disabled = image === null;
  });
}
