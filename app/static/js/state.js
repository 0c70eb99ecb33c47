// @ts-check
/** The page's one state: a store that tells listeners which keys changed, and the permalink in the URL's hash. */

/** @typedef {import("./types.js").State} State */
/** @typedef {import("./types.js").View} View */

/** @type {Readonly<View>} */
export const DEFAULT_VIEW = Object.freeze({
  show: "overlay",
  opacity: 0.6,
  cmap: "bwr",
  clip: 99.5,
  gain: 1,
  sign: "all",
  fade: false,
  gray: true,
  smooth: false,
});

/** The method that has composites and keeps a ledger; all others are there for comparison. */
export const LRP = "LRP";

/** @returns {State} */
export function initialState() {
  return {
    models: [],
    composites: [],
    methods: [],
    samples: [],
    modelId: null,
    method: LRP,
    composite: null,
    parameters: {},
    image: null,
    picture: null,
    predictions: null,
    explanation: null,
    account: null,
    accountNote: null,
    busy: null,
    uploading: null,
    description: null,
    problem: null,
    view: { ...DEFAULT_VIEW },
    pins: [],
    shared: true,
  };
}

export class Store {
  /** @param {State} state */
  constructor(state) {
    this.state = state;
    /** @type {{keys: (keyof State)[], listener: (state: State) => void}[]} */
    this.listeners = [];
  }

  /** @param {Partial<State>} patch */
  set(patch) {
    const before = this.state;
    this.state = { ...before, ...patch };
    const changed = new Set(
      /** @type {(keyof State)[]} */ (Object.keys(patch)).filter((key) => before[key] !== this.state[key]),
    );
    for (const { keys, listener } of this.listeners) {
      if (keys.some((key) => changed.has(key))) listener(this.state);
    }
  }

  /**
   * Calls `listener` now and whenever one of `keys` changes.
   * @param {(keyof State)[]} keys
   * @param {(state: State) => void} listener
   */
  watch(keys, listener) {
    this.listeners.push({ keys, listener });
    listener(this.state);
  }

  /** @param {Partial<View>} patch */
  setView(patch) {
    this.set({ view: { ...this.state.view, ...patch } });
  }
}

/** Long enough to be unique among a server's networks, short enough to read. */
const ID_PREFIX = 16;

/** What the composite or the method is told stands in the link under this prefix. */
const PARAMETER = "p.";

/**
 * @typedef {object} Link
 * @property {string} [model] prefix of an id
 * @property {import("./types.js").Target} [target]
 * @property {string} [method]
 * @property {string} [composite]
 * @property {string} [sample]
 * @property {Record<string, number | string>} parameters
 */

/** @param {string} hash @returns {Link} */
export function readLink(hash) {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  const target = fields.get("target");
  return {
    model: fields.get("model") ?? undefined,
    target: readTarget(target),
    method: fields.get("method") ?? undefined,
    composite: fields.get("composite") ?? undefined,
    sample: fields.get("sample") ?? undefined,
    parameters: Object.fromEntries(
      [...fields]
        .filter(([name, value]) => name.startsWith(PARAMETER) && value !== "")
        .map(([name, value]) => [name.slice(PARAMETER.length), Number.isFinite(Number(value)) ? Number(value) : value]),
    ),
  };
}

/** A class by its index, or an output by the JSON that names it. @param {string | null} text */
function readTarget(text) {
  if (text !== null && /^\d+$/.test(text)) return Number(text);
  try {
    return typeof JSON.parse(text ?? "").output === "string" ? (text ?? undefined) : undefined;
  } catch {
    return undefined;
  }
}

/** @param {State} state @returns {string} */
export function writeLink(state) {
  const fields = new URLSearchParams();
  if (state.modelId) fields.set("model", state.modelId.slice(0, ID_PREFIX));
  if (state.explanation && state.explanation.target !== null) fields.set("target", String(state.explanation.target));
  if (state.method !== LRP) fields.set("method", state.method);
  else if (state.composite) fields.set("composite", state.composite);
  for (const [name, value] of Object.entries(state.parameters)) fields.set(PARAMETER + name, String(value));
  if (state.image?.sample) fields.set("sample", state.image.sample);
  return `#${fields}`;
}
