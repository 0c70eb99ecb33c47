// @ts-check
/** The server's HTTP API: one function per call, errors as `Problem` (RFC 9457). */

import { LRP } from "./state.js";

/** @typedef {import("./types.js").Model} Model */
/** @typedef {import("./types.js").Prediction} Prediction */

/** The server's root, wherever the page is mounted: this file is at static/js/. */
const ROOT = new URL("../../", import.meta.url);

/** An error that a person can read: what is wrong, and what to do. */
export class Problem extends Error {
  /** @param {{title: string, detail?: string, status?: number, instance?: string, errors?: string[]}} fields */
  constructor({ title, detail = "", status = 0, instance = "", errors = [] }) {
    super(detail || title);
    this.name = "Problem";
    this.title = title;
    this.detail = detail;
    this.status = status;
    this.instance = instance;
    this.errors = errors;
  }

  /** @param {number} status @param {string} text the answer's body */
  static parse(status, text) {
    try {
      const body = JSON.parse(text);
      if (typeof body.title === "string" || typeof body.detail === "string") {
        return new Problem({
          title: body.title ?? `The server answered ${status}`,
          detail: body.detail,
          status,
          instance: body.instance,
          errors: Array.isArray(body.errors) ? body.errors.map(errorLine) : [],
        });
      }
    } catch {
      // not JSON: a proxy in between, or a crash; the status is all there is
    }
    return new Problem({
      title: `The server answered ${status || "with an unreadable message"}`,
      detail: "It gave no reason. Try again; if it happens again, look at the server's log.",
      status,
    });
  }

  /** Whatever was thrown, in words. @param {unknown} error */
  static from(error) {
    if (error instanceof Problem) return error;
    if (error instanceof TypeError && /fetch|network/i.test(error.message)) return unreachable();
    return new Problem({
      title: "The page could not read the answer",
      detail: error instanceof Error ? error.message : String(error),
    });
  }
}

/** One entry of a problem's `errors`. @param {unknown} entry */
function errorLine(entry) {
  if (typeof entry === "string") return entry;
  const { loc, field, pointer, msg, message, detail } = /** @type {Record<string, unknown>} */ (entry ?? {});
  const where = Array.isArray(loc) ? loc.join(" › ") : (field ?? pointer ?? "");
  const what = msg ?? message ?? detail ?? JSON.stringify(entry);
  return where ? `${where}: ${what}` : String(what);
}

function unreachable() {
  return new Problem({
    title: "The server can't be reached",
    detail: "The connection was refused or broke off. Check that the server is running, then try again.",
  });
}

/** @param {string} path @param {Record<string, unknown>} [query] empty values are left out */
export function address(path, query = {}) {
  const url = new URL(path.replace(/^\//, ""), ROOT);
  for (const [name, value] of Object.entries(query)) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(name, String(value));
  }
  return url;
}

/** @param {string | URL} url @param {RequestInit} [options] */
async function call(url, options = {}) {
  const answer = await fetch(url, options);
  if (!answer.ok) throw Problem.parse(answer.status, await answer.text());
  return answer;
}

/** @param {string} path @param {AbortSignal} [signal] */
async function getJson(path, signal) {
  return (await call(address(path), { signal, headers: { Accept: "application/json" } })).json();
}

/** @param {string} id */
const model = (id) => `v1/models/${encodeURIComponent(id)}`;

/** @param {Blob} image @param {string} accept @param {AbortSignal} signal @returns {RequestInit} */
const imageBody = (image, accept, signal) => ({
  method: "POST",
  body: image,
  signal,
  // The server goes by the content; a type is named because raw bodies need one.
  headers: { Accept: accept, "Content-Type": image.type.startsWith("image/") ? image.type : "application/octet-stream" },
});

/** @param {File} network @param {File[]} data */
function form(network, data) {
  const fields = new FormData();
  fields.append("file", network);
  for (const file of data) fields.append("data", file);
  return fields;
}

/**
 * @typedef {object} Asked
 * @property {import("./types.js").Target | null} target null asks for the best class, or what else there is
 * @property {string} method
 * @property {string | null} composite LRP's
 * @property {Record<string, number | string>} parameters of the composite, or of the method
 */

/** @param {Asked} what */
const question = ({ target, method, composite, parameters }) =>
  method === LRP ? { ...parameters, target, composite } : { ...parameters, target, method };

export const api = {
  /** @returns {Promise<Model[]>} */
  models: async () => (await getJson("v1/models")).models,

  /** @param {string} id @param {AbortSignal} [signal] @returns {Promise<Model>} */
  describe: (id, signal) => getJson(model(id), signal),

  /** @param {string} id @param {{name?: string, labels?: string[]}} what @returns {Promise<Model>} */
  change: async (id, what) =>
    (
      await call(address(model(id)), {
        method: "PATCH",
        headers: { "Content-Type": "application/json", Accept: "application/json" },
        body: JSON.stringify(what),
      })
    ).json(),

  /** @param {string} id */
  remove: (id) => call(address(model(id)), { method: "DELETE" }),

  /** @returns {Promise<{composites: import("./types.js").Composite[], default: string}>} */
  composites: () => getJson("v1/composites"),

  /** @returns {Promise<import("./types.js").Method[]>} */
  methods: async () => (await getJson("v1/methods")).methods,

  /** @returns {Promise<import("./types.js").Sample[]>} */
  samples: async () => (await getJson("v1/samples")).samples,

  /** @param {import("./types.js").Sample} sample @param {AbortSignal} [signal] */
  sampleImage: async ({ url }, signal) => (await call(address(url), { signal })).blob(),

  /** What the network sees of the image. @param {string} id @param {Blob} image @param {AbortSignal} signal */
  preview: async (id, image, signal) =>
    (await call(address(`${model(id)}/preview`), imageBody(image, "image/png", signal))).blob(),

  /**
   * @param {string} id @param {Blob} image @param {number} top @param {AbortSignal} signal
   * @returns {Promise<Prediction[]>}
   */
  predict: async (id, image, top, signal) =>
    (await (await call(address(`${model(id)}/predict`, { top }), imageBody(image, "application/json", signal))).json())
      .predictions,

  /**
   * @param {string} id @param {Blob} image
   * @param {Asked} what @param {AbortSignal} signal
   */
  async relevance(id, image, what, signal) {
    const answer = await call(address(`${model(id)}/explain`, question(what)), imageBody(image, "application/x-npy", signal));
    const header = (/** @type {string} */ name) => answer.headers.get(`X-Clearfold-${name}`) ?? "";
    const ofClass = header("Target") !== "";
    return {
      npy: await answer.arrayBuffer(),
      target: ofClass ? Number(header("Target")) : what.target,
      label: decodeURIComponent(header(ofClass ? "Label" : "Explained")),
      score: Number(header("Score")),
      sum: Number(header("Sum")),
      picked: header("Picked"),
    };
  },

  /**
   * @param {string} id @param {Blob} image
   * @param {Asked} what @param {AbortSignal} signal
   */
  account: async (id, image, what, signal) =>
    (await call(address(`${model(id)}/explain`, question(what)), imageBody(image, "application/json", signal))).json(),

  /** @param {string} id @param {"onnx" | "pt2"} format */
  fusedAddress: (id, format) => address(`${model(id)}/fused`, { format }).href,

  /**
   * XMLHttpRequest, because fetch can't tell how much of a body has been sent.
   * @param {import("./types.js").NetworkFiles} files
   * @param {Record<string, string>} options name, size, mean, std, order, scale; empty ones are left out
   * @param {(fraction: number) => void} onProgress
   * @param {AbortSignal} signal
   * @returns {Promise<Model>}
   */
  upload: ({ network, data }, options, onProgress, signal) =>
    new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      request.open("POST", address("v1/models", { filename: network.name, ...options }));
      if (!data.length) request.setRequestHeader("Content-Type", "application/octet-stream");
      request.setRequestHeader("Accept", "application/json");
      request.upload.onprogress = (event) => onProgress(event.total ? event.loaded / event.total : 1);
      request.upload.onload = () => onProgress(1);
      request.onerror = () => reject(unreachable());
      request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
      request.onload = () => {
        if (request.status >= 400) reject(Problem.parse(request.status, request.responseText));
        else resolve(JSON.parse(request.responseText));
      };
      signal.addEventListener("abort", () => request.abort());
      request.send(data.length ? form(network, data) : network);
    }),
};
