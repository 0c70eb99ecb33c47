// @ts-check
/** A wide sheet over the page, for tables that need room. */

import { byId, make } from "./dom.js";

/** @param {string} heading @param {...Node} content */
export function openSheet(heading, ...content) {
  byId("sheet-heading").textContent = heading;
  byId("sheet-body").replaceChildren(...content);
  /** @type {HTMLDialogElement} */ (byId("sheet")).showModal();
}

/**
 * A table that scrolls within the sheet.
 * @param {string[]} columns @param {HTMLElement[]} rows @param {string} [style]
 */
export function sheetTable(columns, rows, style = "") {
  return make(
    "div",
    { class: "table-box", tabindex: 0, role: "region", "aria-labelledby": "sheet-heading" },
    make(
      "table",
      { class: style },
      make("thead", {}, make("tr", {}, ...columns.map((text) => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...rows),
    ),
  );
}
