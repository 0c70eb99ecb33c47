// @ts-check
/** The ledger in words: the score, what reached the pixels, what was kept on the way, and whether the books close. */

import { byId, make } from "./dom.js";
import { className, number, percent, signed } from "./format.js";
import { openSheet, sheetTable } from "./sheet.js";
import { LRP } from "./state.js";

/** @typedef {import("./types.js").Account} Account */

/** The books close when what is missing is this small a part of all that was moved. */
const TOLERANCE = 1e-3;

/** Below this share of the score, the reader is told that the map holds little of it. */
const LITTLE = 0.1;

/** Plain words for kinds of layers; a kind without words shows its own name. @type {Record<string, string>} */
const KINDS = {
  conv1d: "convolutions",
  conv2d: "convolutions",
  conv3d: "convolutions",
  conv_transpose2d: "transposed convolutions",
  linear: "linear layers",
  batch_norm: "batch normalizations",
  layer_norm: "layer normalizations",
  add: "added constants",
};

/** @param {import("./state.js").Store} store */
export function mountAccount(store) {
  const box = byId("account");
  box.classList.add("account");
  const initial = [...box.childNodes];
  store.watch(["explanation", "account", "accountNote"], ({ explanation, account, accountNote }) => {
    box.dataset.complete = String(explanation !== null && (explanation.method !== LRP || account !== null || accountNote !== null));
    if (!explanation) {
      box.replaceChildren(...initial);
      return;
    }
    if (explanation.method !== LRP) {
      box.replaceChildren(...withoutLedger(explanation));
      return;
    }
    const name = className({ index: explanation.target, label: explanation.label });
    const { score, sum } = explanation;
    const words = make(
      "p",
      {},
      "The score of ", make("strong", {}, name), " is ", make("strong", {}, number(score)), ". ",
      "The pixels carry ", make("strong", {}, number(sum)), score ? ` of it (${percent(sum / score)}). ` : " of it. ",
      account ? keptWords(account, score) : "",
    );
    if (score && Math.abs(sum / score) < LITTLE) {
      words.append(make("strong", {}, " Only little of the score is in this map: compare its places, not its amounts."));
    }
    const rest = account ? [table(account), verdict(account)] : [make("p", { class: "hint" }, accountNote ?? "Adding up what the layers kept\u2026")];
    box.replaceChildren(words, ...rest);
  });
}

/** @param {import("./types.js").Explanation} explanation by another method than LRP */
function withoutLedger({ target, label, score, sum, method }) {
  return [
    make("p", {}, "The score of ", make("strong", {}, className({ index: target, label })), " is ", make("strong", {}, number(score)), "."),
    make(
      "p",
      {},
      make("strong", {}, `${method} keeps no ledger. `),
      `Its map adds up to ${number(sum)}, and nothing says where the score went, as LRP does.`,
    ),
  ];
}

/** @param {Account} account @param {number} score */
function keptWords({ kept }, score) {
  return `Biases and other parts inside the network kept ${number(kept)}${score ? ` (${percent(kept / score)})` : ""}.`;
}

/** @param {Account} account */
function table({ score, input, kept, keptBy, missing }) {
  const line = (/** @type {string} */ name, /** @type {number} */ value, style = "") =>
    make(
      "tr",
      { class: style },
      make("th", { scope: "row" }, name),
      make("td", { class: value < 0 ? "against" : "" }, signed(value)),
      make("td", {}, score ? percent(value / score) : ""),
    );
  return make(
    "table",
    {},
    make(
      "tbody",
      {},
      line("Reached the pixels", input),
      line("Kept inside the network", kept),
      ...keptBy.map(([kind, value]) => line(`in ${KINDS[kind] ?? kind}`, value, "part")),
      line("Unaccounted for", missing),
      line("Score", score, "total"),
    ),
  );
}

/** @param {Account} account */
function verdict({ score, input, keptBy, missing, rows }) {
  const moved = keptBy.reduce((sum, [, value]) => sum + Math.abs(value), Math.abs(score) + Math.abs(input));
  const closes = Math.abs(missing) <= TOLERANCE * moved;
  return make(
    "div",
    { class: "links" },
    make(
      "p",
      { class: `chip ${closes ? "good" : "bad"}` },
      closes ? "The books close" : "The books do not close: read this map with care",
    ),
    rows.length ? make("button", { type: "button", class: "quiet", onclick: () => showRows(rows) }, "Layer by layer\u2026") : null,
  );
}

/** @param {import("./types.js").LedgerRow[]} rows */
function showRows(rows) {
  openSheet(
    "Relevance, layer by layer",
    make("p", {}, "What each layer received, and what stayed there: in biases, stabilizers and operations that do not conserve."),
    sheetTable(
      ["Layer", "Received", "Kept"],
      rows.map(({ layer, node, op, received, kept }) =>
        make(
          "tr",
          {},
          make("th", { scope: "row", class: "mono" }, layer || node, make("br"), make("span", { class: "hint" }, op)),
          make("td", {}, signed(received)),
          make("td", { class: kept < 0 ? "against" : "" }, signed(kept)),
        ),
      ),
      "numbers",
    ),
  );
}
