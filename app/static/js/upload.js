// @ts-check
/** How files get in: file pickers, drop anywhere, paste. Tells images from networks by name and type. */

import { byId } from "./dom.js";

const NETWORK_NAME = /\.(onnx|pt|pth|pt2|ts|torchscript)$/i;

/**
 * @param {{image: (file: File) => void, network: (file: File) => void}} take
 */
export function acceptFiles(take) {
  for (const [id, receive] of /** @type {const} */ ([["image-file", take.image], ["network-file", take.network]])) {
    const input = /** @type {HTMLInputElement} */ (byId(id));
    input.addEventListener("change", () => {
      const file = input.files?.[0];
      input.value = ""; // so that the same file can be chosen again
      if (file) receive(file);
    });
  }

  const veil = byId("drop-veil");
  let depth = 0; // dragenter and dragleave fire for every element on the way
  const carriesFile = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files") ?? false;
  const settle = () => {
    depth = 0;
    veil.hidden = true;
  };
  addEventListener("dragenter", (event) => {
    if (!carriesFile(event)) return;
    depth += 1;
    veil.hidden = false;
  });
  addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    if (depth === 0) settle();
  });
  addEventListener("dragover", (event) => {
    if (carriesFile(event)) event.preventDefault();
  });
  addEventListener("drop", (event) => {
    const file = event.dataTransfer?.files[0];
    settle();
    if (!file) return;
    event.preventDefault();
    const onNetworks = event.target instanceof Element && event.target.closest("#network-drop") !== null;
    (onNetworks || NETWORK_NAME.test(file.name) ? take.network : take.image)(file);
  });

  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    take.image(file);
  });
}
