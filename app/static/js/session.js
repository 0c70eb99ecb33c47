// @ts-check
/** What happens when: image, network, class or method change, and one explanation follows. */

import { api, Problem } from "./api.js";
import { className, plural } from "./format.js";
import { pool } from "./heatmap.js";
import { parseNpy } from "./npy.js";
import { LRP, readLink } from "./state.js";
import { Latest } from "./tasks.js";

/** @typedef {import("./types.js").Account} Account */
/** @typedef {import("./types.js").ImageChoice} ImageChoice */
/** @typedef {import("./types.js").Model} Model */
/** @typedef {import("./types.js").Picture} Picture */

const TOP = 6;

/** Between two looks for the networks of a server that is only just starting. */
const PATIENCE_MS = 2000;

/** @param {Blob} png @returns {Promise<Picture>} */
async function pixels(png) {
  const bitmap = await createImageBitmap(png, { colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d");
  if (!context) throw new Error("This browser offers no 2D canvas.");
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { width, height, rgba: context.getImageData(0, 0, width, height).data };
}

/** The JSON answer's books in one flat shape. @param {any} answer @returns {Account} */
export function readAccount(answer) {
  const ledger = answer.ledger ?? {};
  const { score, input, kept } = answer.sums;
  const keptBy = /** @type {[string, unknown][]} */ (Object.entries(ledger.kept_by ?? {}));
  return {
    score, input, kept,
    missing: score - input - kept,
    keptBy: /** @type {[string, number][]} */ (keptBy.filter(([, value]) => typeof value === "number" && value !== 0)),
    rows: Array.isArray(ledger.entries) ? ledger.entries : [],
  };
}

export class Session {
  #explaining = new Latest();
  #describing = new Latest();
  #uploading = new Latest();

  /** What a permalink asks for; the first image takes it. @type {import("./types.js").Target | null} */
  #linkedTarget = null;

  /** @param {import("./state.js").Store} store */
  constructor(store) {
    this.store = store;
    store.watch(["modelId"], () => this.describe());
  }

  get state() {
    return this.store.state;
  }

  /** @param {unknown} error */
  fail(error) {
    this.store.set({ problem: Problem.from(error) });
  }

  /** First visit: what the server has, then what the link asks for. @param {string} hash */
  async start(hash) {
    try {
      const [models, { composites, default: composite }, methods, samples] = await Promise.all([
        api.models(),
        api.composites(),
        api.methods(),
        api.samples(),
      ]);
      this.store.set({ models, composites, methods, samples, composite });
      await this.#firstNetwork();
    } catch (error) {
      this.fail(error);
      return;
    }
    await this.follow(hash);
  }

  /** Waits for a network where there is none yet, the server's own or one that the user adds; chooses the default. */
  async #firstNetwork() {
    while (this.state.models.length === 0) {
      await new Promise((resolve) => setTimeout(resolve, PATIENCE_MS));
      const models = await api.models();
      if (models.length) this.store.set({ models });
    }
    const { models, modelId } = this.state;
    const chosen = models.find(({ id }) => id === modelId) ?? models.find((model) => model.default) ?? models[0];
    this.store.set({ modelId: chosen.id });
  }

  /** Goes where a permalink points. @param {string} hash */
  async follow(hash) {
    const link = readLink(hash);
    const { models, composites, methods, samples } = this.state;
    const model = link.model && models.find(({ id }) => id.startsWith(link.model ?? "-"));
    const composite = composites.find(({ name }) => name === link.composite);
    if (link.model && !model) {
      this.fail(
        new Problem({
          title: "The link's network is not on this server",
          detail: `No network's id begins with ${link.model}. Add the network, or choose another one.`,
        }),
      );
    }
    const target = link.model && !model ? null : (link.target ?? null);
    const sample = samples.find(({ name }) => name === link.sample);
    const method = methods.find(({ name }) => name === (link.method ?? LRP));
    const known = method && method.name !== LRP ? method.parameters.map(({ name }) => name) : Object.keys(composite?.parameters ?? {});
    if (composite || link.method) {
      this.store.set({
        method: method?.name ?? LRP,
        composite: composite?.name ?? this.state.composite,
        parameters: Object.fromEntries(Object.entries(link.parameters).filter(([name]) => known.includes(name))),
      });
    }
    this.#linkedTarget = target;
    if (sample) {
      await this.takeSample(sample, model ? model.id : undefined);
    } else if (model) {
      await this.chooseModel(model.id, target);
      this.#linkedTarget = this.state.image ? null : target;
    } else if (this.state.image) {
      this.#linkedTarget = null;
      await this.#explain({ target });
    }
  }

  /** @param {import("./types.js").Sample} sample @param {string} [modelId] */
  async takeSample(sample, modelId) {
    try {
      const blob = await api.sampleImage(sample);
      await this.takeImage({ blob, name: sample.name, sample: sample.name }, modelId);
    } catch (error) {
      this.fail(error);
    }
  }

  /** @param {ImageChoice} image @param {string} [modelId] */
  async takeImage(image, modelId) {
    const target = this.#linkedTarget;
    this.#linkedTarget = null;
    if (modelId && modelId !== this.state.modelId && !this.state.image) this.store.set({ modelId });
    await this.#explain({ image, modelId, target });
  }

  /** @param {string} modelId @param {import("./types.js").Target | null} [target] */
  async chooseModel(modelId, target = null) {
    if (this.state.image) {
      await this.#explain({ modelId, target });
    } else {
      this.store.set({ modelId });
    }
  }

  /** @param {string} method */
  async chooseMethod(method) {
    this.store.set({ method, parameters: {} });
    if (this.state.image) await this.#explain({ target: this.state.explanation?.target ?? null });
  }

  /** @param {string} composite */
  async chooseComposite(composite) {
    this.store.set({ composite, parameters: {} });
    if (this.state.image) await this.#explain({ target: this.state.explanation?.target ?? null });
  }

  /** @param {Record<string, number | string>} parameters those that differ from the defaults */
  async chooseParameters(parameters) {
    this.store.set({ parameters });
    if (this.state.image) await this.#explain({ target: this.state.explanation?.target ?? null });
  }

  /** @param {import("./types.js").Target} target */
  async chooseTarget(target) {
    if (!this.state.image) {
      this.#linkedTarget = target;
      return;
    }
    await this.#explain({ target });
  }

  async again() {
    if (this.state.image) await this.#explain({ target: this.state.explanation?.target ?? null });
  }

  cancel() {
    if (this.#explaining.cancel()) this.store.set({ busy: null });
  }

  /**
   * @param {{image?: ImageChoice, modelId?: string, target: import("./types.js").Target | null}} change
   */
  async #explain({ image = this.state.image ?? undefined, modelId = this.state.modelId ?? undefined, target }) {
    const model = this.state.models.find(({ id }) => id === modelId);
    if (!image || !model) {
      if (!model) this.fail(new Problem({ title: "No network is chosen", detail: "Choose a network, or add one." }));
      return;
    }
    const { method, composite, parameters } = this.state;
    const fresh = image !== this.state.image || model.id !== this.state.modelId || !this.state.predictions;
    const classes = model.classes !== null;
    const label = typeof target === "number" ? (model.labels?.[target] ?? null) : null;
    const best = classes ? "the top class" : "what the network answers";
    const subject = target === null ? best : `\u201c${className({ index: target, label })}\u201d`;
    const { store } = this;

    const outcome = this.#explaining.run(async (signal, commit) => {
      store.set({ busy: { text: `Explaining ${subject}\u2026`, target, modelId: model.id }, problem: null });
      if (fresh) {
        // The preview goes first and alone: it is quick, and a bad image then fails once and changes nothing.
        const picture = await pixels(await api.preview(model.id, image.blob, signal));
        commit(() =>
          store.set({
            image, picture, modelId: model.id,
            predictions: classes ? null : [], explanation: null, account: null, accountNote: null,
          }),
        );
      }
      const predicting = fresh && classes
        ? api.predict(model.id, image.blob, TOP, signal).then((predictions) => commit(() => store.set({ predictions })))
        : null;
      const what = { target, method, composite, parameters };
      const relevance = api.relevance(model.id, image.blob, what, signal);
      const [answer] = await Promise.all([relevance, predicting]);
      const map = pool(parseNpy(answer.npy));
      commit(() =>
        store.set({
          explanation: {
            ...answer, map,
            picture: fit(/** @type {Picture} */ (store.state.picture), map.width, map.height),
            imageName: image.name, modelId: model.id, modelName: model.name, method,
            how: methodWords(method === LRP ? (composite ?? "") : method, parameters, answer.picked),
          },
          account: null,
          accountNote: null,
          busy: null,
        }),
      );
      if (method !== LRP) return; // no books
      // The books follow the picture, so that the picture need not wait for them.
      try {
        const books = await api.account(model.id, image.blob, { ...what, target: answer.target }, signal);
        commit(() => store.set({ account: readAccount(books) }));
      } catch (error) {
        commit(() => store.set({ accountNote: `The account could not be had: ${Problem.from(error).message}` }));
      }
    });
    try {
      await outcome;
    } catch (error) {
      store.set({ busy: null });
      this.fail(error);
    }
  }

  /** Fetches the chosen network's fusion report. */
  async describe() {
    const id = this.state.modelId;
    if (!id || this.state.description?.id === id) return;
    try {
      await this.#describing.run(async (signal, commit) => {
        this.store.set({ description: null });
        const description = await api.describe(id, signal);
        commit(() => this.store.set({ description }));
      });
    } catch (error) {
      this.fail(error);
    }
  }

  /**
   * @param {import("./types.js").NetworkFiles} files @param {Record<string, string>} options
   * @param {(model: Model) => void} onAdded before the new network is explained
   * @returns {Promise<Model | null>}
   */
  async upload(files, options, onAdded) {
    const { store } = this;
    const { network, data } = files;
    const sending = `Sending ${network.name}${data.length ? ` with ${plural(data.length, "data file")}` : ""}`;
    /** @type {Model | null} */
    let model = null;
    try {
      await this.#uploading.run(async (signal, commit) => {
        store.set({ problem: null, uploading: { text: sending, fraction: 0 } });
        const onProgress = (/** @type {number} */ fraction) =>
          commit(() =>
            store.set({
              uploading:
                fraction < 1
                  ? { text: sending, fraction }
                  : { text: "Reading, fusing and checking the network\u2026", fraction: null },
            }),
          );
        const added = await api.upload(files, options, onProgress, signal);
        commit(() => {
          model = added;
          store.set({ uploading: null, models: [...store.state.models.filter(({ id }) => id !== added.id), added] });
        });
      });
    } catch (error) {
      store.set({ uploading: null });
      this.fail(error);
    }
    const added = /** @type {Model | null} */ (model);
    if (added) {
      onAdded(added);
      await this.chooseModel(added.id);
    }
    return added;
  }

  cancelUpload() {
    if (this.#uploading.cancel()) this.store.set({ uploading: null });
  }

  /** @param {Model} model @param {File} file one label per line, or a JSON list */
  async label(model, file) {
    try {
      const changed = await api.change(model.id, { labels: readLabels(await file.text()) });
      const { models, description } = this.state;
      this.store.set({
        problem: null,
        models: models.map((other) => (other.id === model.id ? { ...other, ...changed } : other)),
        description: description?.id === model.id ? { ...description, labels: changed.labels } : description,
      });
    } catch (error) {
      this.fail(error);
      return;
    }
    if (this.state.modelId === model.id && this.state.image) {
      this.store.set({ predictions: null }); // they carry the old names
      await this.again();
    }
  }

  /** @param {Model} model */
  async remove(model) {
    try {
      await api.remove(model.id);
    } catch (error) {
      this.fail(error);
      return;
    }
    const models = this.state.models.filter(({ id }) => id !== model.id);
    this.store.set({ models });
    if (this.state.modelId === model.id) {
      const next = models.find((other) => other.default) ?? models[0];
      if (next) await this.chooseModel(next.id);
      else this.store.set({ modelId: null, description: null });
    }
  }
}

/** @param {string} text @returns {string[]} */
function readLabels(text) {
  if (text.trim().startsWith("[")) return JSON.parse(text);
  return text.split(/\r?\n/).map((line) => line.trim()).filter(Boolean);
}

/**
 * @param {string} way the composite, or another method than LRP
 * @param {Record<string, number | string>} parameters @param {string} picked by the server, for auto
 */
function methodWords(way, parameters, picked) {
  const changed = Object.entries(parameters).map(([name, value]) => `${name} ${value}`);
  if (picked && picked !== way) changed.unshift(picked);
  return changed.length ? `${way} (${changed.join(", ")})` : way;
}

/**
 * The picture at the map's size: the same object where the two agree, which is the rule.
 * @param {Picture} picture @param {number} width @param {number} height
 * @returns {Picture}
 */
function fit(picture, width, height) {
  if (picture.width === width && picture.height === height) return picture;
  const rgba = new Uint8ClampedArray(width * height * 4);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const from = Math.floor((y * picture.height) / height) * picture.width + Math.floor((x * picture.width) / width);
      rgba.set(picture.rgba.subarray(from * 4, from * 4 + 4), (y * width + x) * 4);
    }
  }
  return { width, height, rgba };
}
