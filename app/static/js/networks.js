// @ts-check
/** The networks with their status, the chosen one's fusion report, and the upload of a new one. */

import { api, Problem } from "./api.js";
import { choices } from "./classes.js";
import { announce, byId, make } from "./dom.js";
import { number, plural } from "./format.js";
import { openSheet, sheetTable } from "./sheet.js";
import { networkAmong } from "./upload.js";

/** @typedef {import("./types.js").FusionRow} FusionRow */
/** @typedef {import("./types.js").Model} Model */

/** @param {import("./state.js").Store} store @param {import("./session.js").Session} session */
export function mountNetworks(store, session) {
  const list = byId("networks");
  store.watch(["models", "modelId", "busy"], ({ models, modelId, busy }) => {
    const refocus = list.contains(document.activeElement);
    const chosen = busy?.modelId ?? modelId; // falls back to the one in use when the asked-for one fails
    list.replaceChildren(...models.map((model) => card(model, model.id === chosen, session)));
    if (models.length === 0) list.append(make("p", { class: "hint" }, "No network yet. The server may still be preparing its own; you can also add one below."));
    if (refocus) /** @type {HTMLElement | null} */ (list.querySelector("input:checked"))?.focus();
  });
  store.watch(["description", "modelId"], ({ description, modelId }) => {
    const shown = description && description.id === modelId;
    byId("description").replaceChildren(...(shown ? report(description, session) : []));
  });
  store.watch(["uploading"], ({ uploading }) => {
    byId("upload-progress").hidden = uploading === null;
    byId("network-drop").hidden = uploading !== null;
    byId("upload-options").hidden = uploading !== null;
    if (!uploading) return;
    /** @type {HTMLDetailsElement} */ (byId("upload-box")).open = true;
    const bar = /** @type {HTMLProgressElement} */ (byId("upload-bar"));
    if (uploading.fraction === null) bar.removeAttribute("value");
    else bar.value = uploading.fraction;
    const text = byId("upload-text");
    if (text.textContent !== uploading.text) {
      text.textContent = uploading.text;
      announce(uploading.text);
    }
  });
  byId("upload-cancel").addEventListener("click", () => session.cancelUpload());
  byId("upload-options").addEventListener("submit", (event) => event.preventDefault());
}

/** The network whose report opens by itself. @type {string | null} */
let justAdded = null;

/** The upload form's answers; empty ones are left out by the API call. @returns {Record<string, string>} */
export function uploadOptions() {
  const fields = new FormData(/** @type {HTMLFormElement} */ (byId("upload-options")));
  return Object.fromEntries([...fields].map(([name, value]) => [name, String(value).trim()]));
}

/** @param {import("./session.js").Session} session @param {File[]} files a network and its data files */
export async function addNetwork(session, files) {
  const chosen = networkAmong(files);
  if (!chosen) {
    session.fail(
      new Problem({
        title: "It isn't clear which file is the network",
        detail: "Choose one network (.onnx, .pt, .pt2), and with it the data files that belong to it, if there are any.",
      }),
    );
    return;
  }
  const model = await session.upload(chosen, uploadOptions(), ({ id }) => (justAdded = id));
  if (!model) return;
  /** @type {HTMLDetailsElement} */ (byId("upload-box")).open = false;
  /** @type {HTMLFormElement} */ (byId("upload-options")).reset();
  announce(`${model.name} is ready. ${fusionWords(model)}`);
}

/** @param {Model} model @param {boolean} checked @param {import("./session.js").Session} session */
function card(model, checked, session) {
  const ready = model.status === "ready";
  const input = make("input", {
    type: "radio",
    name: "network",
    value: model.id,
    checked,
    disabled: !ready,
    onchange: () => session.chooseModel(model.id),
  });
  return make(
    "label",
    { class: "network" },
    input,
    make("span", { class: "name" }, model.name),
    make(
      "span",
      { class: "facts" },
      make("span", { class: ready ? "status good" : "status bad" }, model.status),
      ...[model.format, answerWords(model), sizeWords(model)].filter(Boolean).map((text) => make("span", {}, text)),
    ),
  );
}

/** @param {Model} model */
const answerWords = ({ classes, outputs }) =>
  classes === null ? plural(outputs.length, "output") : plural(classes, "class", "classes");

/** @param {Model} model */
const sizeWords = ({ input }) => (input?.size ? `${input.size[0]}\u2009\u00d7\u2009${input.size[1]}` : "");

/** Counts of a description or of a list's entry. @param {Model} model */
function counts({ fusion }) {
  const rows = rowsOf(fusion);
  const count = (/** @type {string} */ outcome) =>
    typeof fusion?.[outcome] === "number" ? fusion[outcome] : rows.filter((row) => row.outcome === outcome).length;
  return { folded: count("folded"), partly: count("partly"), kept: count("kept") };
}

/** @param {any} fusion @returns {FusionRow[]} */
const rowsOf = (fusion) => (Array.isArray(fusion) ? fusion : (fusion?.rows ?? fusion?.report?.rows ?? []));

/** @param {Model} model */
export function fusionWords(model) {
  const { folded, partly, kept } = counts(model);
  const all = folded + partly + kept;
  if (all === 0) return "It has no normalization layer: nothing to fold.";
  if (folded === all) return all === 1 ? "Its normalization is folded away." : `All ${all} normalizations are folded away.`;
  return `Of ${plural(all, "normalization")}, ${folded} folded away, ${partly} in part, ${kept} kept with a stated rule.`;
}

/** Layers that became a part of one that reads the same values. @param {Model} model */
function mergedWords({ fusion }) {
  /** @type {{layer: string, into: string}[]} */
  const merged = fusion?.merged ?? [];
  const shown = merged.slice(0, 4).map(({ layer, into }) => `${layer} into ${into}`);
  return shown.join(", ") + (merged.length > shown.length ? ` and ${merged.length - shown.length} more` : "");
}

const list = (/** @type {number[] | undefined} */ values) => (values ?? []).map((x) => number(x)).join(", ");

/** @param {Model} model @param {import("./session.js").Session} session @returns {Node[]} */
function report(model, session) {
  const { certificate, input } = model;
  const rows = rowsOf(model.fusion);
  /** @type {[string, string][]} */
  const facts = [
    ["Fusion", fusionWords(model)],
    [
      "Certificate",
      certificate
        ? `Outputs differ from the original\u2019s by at most ${number(certificate.max_relative)} (relative), ` +
          `measured on ${plural(certificate.inputs, "input")}.`
        : "",
    ],
    ["Merged", mergedWords(model)],
    ["Input", [sizeWords(model), input?.order, input?.resize && { squash: "squashed", crop: "cropped" }[input.resize]].filter(Boolean).join(", ")],
    ["Mean", list(input?.mean)],
    ["Std", list(input?.std)],
    ["Weights", model.parameters ? plural(model.parameters, "number") : ""],
    ["Id", model.id.slice(0, 16)],
    ...(model.notes ?? []).map((note) => /** @type {[string, string]} */ (["Note", note])),
  ];
  const children = [
    make("summary", {}, "Fusion report and input"),
    make("dl", { class: "facts-list" }, ...facts.filter(([, text]) => text).flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)])),
  ];
  const links = make(
    "div",
    { class: "links" },
    rows.length ? make("button", { type: "button", class: "quiet", onclick: () => showLayers(model, rows) }, "Layer by layer\u2026") : null,
    make("a", { href: api.fusedAddress(model.id, "onnx"), download: true }, "Fused ONNX"),
    make("a", { href: api.fusedAddress(model.id, "pt2"), download: true }, "Fused torch.export"),
  );
  if (model.id !== "builtin") {
    const remove = () => {
      if (confirm(`Remove ${model.name} from the server? Its file can be uploaded again.`)) session.remove(model);
    };
    if (choices(model)) links.append(labelling(model, session));
    links.append(make("button", { type: "button", class: "quiet", onclick: remove }, "Remove\u2026"));
  }
  return [make("details", { class: "more", open: model.id === justAdded }, ...children, links)];
}

/** Names for the classes, which few files carry. @param {Model} model @param {import("./session.js").Session} session */
function labelling(model, session) {
  const input = make("input", { class: "sr-only", type: "file", accept: ".txt,.json,text/plain,application/json", id: "labels-file" });
  input.addEventListener("change", () => {
    const file = /** @type {HTMLInputElement} */ (input).files?.[0];
    if (file) session.label(model, file);
  });
  const title = `A text file with the names of the ${choices(model)} classes, one per line`;
  return make("span", {}, make("label", { class: "button", for: "labels-file", title }, "Class names\u2026"), input);
}

/** @param {Model} model @param {FusionRow[]} rows */
function showLayers(model, rows) {
  openSheet(
    "Fusion, layer by layer",
    make("p", {}, make("strong", {}, model.name), ". ", fusionWords(model)),
    sheetTable(["Layer", "Outcome", "Into, or why not"], rows.map(reportRow)),
  );
}

/** @param {FusionRow} row */
function reportRow({ layer, op, outcome, into, certificate, reason }) {
  const proof = typeof certificate === "number" ? `differs by ${certificate.toExponential(1)} at most` : "";
  return make(
    "tr",
    {},
    make("th", { scope: "row", class: "mono" }, layer, make("br"), make("span", { class: "hint" }, op)),
    make("td", {}, make("span", { class: outcome === "folded" ? "chip good" : "chip" }, outcome), proof ? make("br") : "", make("span", { class: "hint" }, proof)),
    make("td", {}, into?.length ? make("span", { class: "mono" }, into.join(", ")) : "", into?.length && reason ? make("br") : "", reason),
  );
}
