/** The shapes that the page's modules share: the API's answers and the page's own state. Types only. */

/**
 * @typedef {object} InputSpec
 * @property {[number, number]} size height, width
 * @property {number} [channels]
 * @property {number[]} [mean]
 * @property {number[]} [std]
 * @property {number} [scale]
 * @property {string} [order]
 * @property {string} [resize]
 *
 * @typedef {object} Model
 * @property {string} id
 * @property {string} name
 * @property {string} format
 * @property {string} status
 * @property {boolean} [default]
 * @property {InputSpec} input
 * @property {string[] | null} labels
 * @property {number | null} classes null where there are no class scores
 * @property {Output[]} outputs
 * @property {string} default_output the one that is explained where none is chosen
 * @property {number} [parameters]
 * @property {any} [fusion] counts in a list, counts or the whole report in a description
 * @property {{inputs: number, max_absolute: number, max_relative: number} | null} [certificate]
 * @property {string[]} [notes]
 *
 * @typedef {{name: string, kind: string, shape: (number | null)[]}} Output
 * @typedef {number | string} Target a class, or an output as the JSON that names it
 *
 * @typedef {object} FusionRow
 * @property {string} layer
 * @property {string} op
 * @property {"folded" | "partly" | "kept"} outcome
 * @property {string[]} into
 * @property {number | null} [certificate] by how much its fold alone changes the values behind it
 * @property {string} reason
 *
 * @typedef {{name: string, description?: string, parameters: Record<string, unknown>}} Composite
 *
 * @typedef {object} Option what a method can be told
 * @property {string} name
 * @property {"integer" | "number" | "size" | "choice" | "layer"} type
 * @property {string} description
 * @property {number | string | null} default null where it follows from the image or the network
 * @property {number | null} [minimum]
 * @property {number | null} [maximum]
 * @property {string[] | null} [choices]
 *
 * @typedef {{name: string, description: string, parameters: Option[]}} Method
 * @typedef {{name: string, url: string}} Sample
 * @typedef {{index: number, label: string | null, probability: number, score: number}} Prediction
 *
 * @typedef {{network: File, data: File[]}} NetworkFiles a network, and the data files that it keeps its weights in
 *
 * @typedef {object} ImageChoice the picture as the user gave it
 * @property {Blob} blob
 * @property {string} name
 * @property {string | null} sample name of the server's sample, null for the user's own picture
 *
 * @typedef {object} Picture what the network saw: 8-bit RGBA, row by row
 * @property {number} width
 * @property {number} height
 * @property {Uint8ClampedArray} rgba
 *
 * @typedef {object} RelevanceMap one signed number per pixel, in units of the class score
 * @property {number} width
 * @property {number} height
 * @property {Float32Array} values
 * @property {Float32Array} magnitudes |values| in rising order, for percentiles
 *
 * @typedef {{node: string, layer: string, op: string, received: number, kept: number}} LedgerRow
 *
 * @typedef {object} Account where the score went
 * @property {number} score
 * @property {number} input
 * @property {number} kept
 * @property {number} missing what is in neither of the two, with its sign
 * @property {[string, number][]} keptBy by kind of layer
 * @property {LedgerRow[]} rows layer by layer
 *
 * @typedef {object} Explanation
 * @property {RelevanceMap} map
 * @property {ArrayBuffer} npy the answer as it came, for the download
 * @property {Picture} picture
 * @property {string} imageName
 * @property {Target | null} target null for what the network is explained by when nothing is named, if that is no class
 * @property {string} label of the class, or what was explained in words
 * @property {number} score
 * @property {number} sum
 * @property {string} picked the composite that was used, whatever was asked for; empty for another method than LRP
 * @property {string} method
 * @property {string} modelId
 * @property {string} modelName
 * @property {string} how the composite, or the method if it is not LRP, with the parameters that were changed
 *
 * @typedef {object} View how the map is shown; nothing here needs the server
 * @property {"overlay" | "heatmap" | "image"} show
 * @property {number} opacity 0..1
 * @property {string} cmap
 * @property {number} clip percentile of |relevance| that gets the full colour
 * @property {number} gain
 * @property {"all" | "positive" | "negative"} sign
 * @property {boolean} fade let the image through where relevance is weak
 * @property {boolean} gray the image without its colours, so that it can't be taken for relevance
 * @property {boolean} smooth
 *
 * @typedef {object} State
 * @property {Model[]} models
 * @property {Composite[]} composites
 * @property {Method[]} methods
 * @property {Sample[]} samples
 * @property {string | null} modelId
 * @property {string} method
 * @property {string | null} composite LRP's
 * @property {Record<string, number | string>} parameters those that differ from the composite's or the method's defaults
 * @property {ImageChoice | null} image
 * @property {Picture | null} picture
 * @property {Prediction[] | null} predictions
 * @property {Explanation | null} explanation
 * @property {Account | null} account
 * @property {string | null} accountNote shown instead of an account that is missing
 * @property {{text: string, target: Target | null, modelId: string} | null} busy what is being asked for
 * @property {{text: string, fraction: number | null} | null} uploading
 * @property {Model | null} description the chosen network with its fusion report
 * @property {import("./api.js").Problem | null} problem
 * @property {View} view
 * @property {Explanation[]} pins
 * @property {boolean} shared one colour scale for all pinned maps
 */

export {};
