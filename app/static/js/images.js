// @ts-check
/** The image panel: the server's samples, and the name of what is loaded. */

import { address } from "./api.js";
import { byId, make } from "./dom.js";
import { fileSize } from "./format.js";

/** @param {import("./state.js").Store} store @param {import("./session.js").Session} session */
export function mountImages(store, session) {
  const list = byId("samples");
  store.watch(["samples"], ({ samples }) => {
    byId("samples-box").hidden = samples.length === 0;
    list.replaceChildren(
      ...samples.map((sample) =>
        make(
          "li",
          {},
          make(
            "button",
            { type: "button", title: sample.name, "data-sample": sample.name, "aria-pressed": false, onclick: () => session.takeSample(sample) },
            make("img", { src: address(sample.url), alt: `Sample ${sample.name}`, loading: "lazy" }),
          ),
        ),
      ),
    );
  });
  store.watch(["image", "samples"], ({ image }) => {
    const name = byId("image-name");
    name.hidden = image === null;
    name.textContent = image ? `${image.name} (${fileSize(image.blob.size)})` : "";
    for (const button of list.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.dataset.sample === image?.sample));
    }
  });
}
