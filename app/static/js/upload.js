// @ts-check
/** How files get in: file pickers, drop anywhere, paste. Tells images from networks by name and type. */

import { byId } from "./dom.js";

const NETWORK_NAME = /\.(onnx|pt|pth|pt2|ts|torchscript)$/i;

/**
 * Of files that were chosen together: the one that is a network, and its data files. None of them by itself can be taken
 * for the network where several have its names, or none has.
 * @param {File[]} files @returns {import("./types.js").NetworkFiles | null}
 */
export function networkAmong(files) {
  const [network, ...others] = files.length === 1 ? files : files.filter(({ name }) => NETWORK_NAME.test(name));
  if (!network || others.length) return null;
  return { network, data: files.filter((file) => file !== network) };
}

/**
 * @param {{image: (file: File) => void, network: (files: File[]) => void}} take
 */
export function acceptFiles(take) {
  for (const [id, receive] of /** @type {const} */ ([["image-file", ([file]) => take.image(file)], ["network-file", take.network]])) {
    const input = /** @type {HTMLInputElement} */ (byId(id));
    input.addEventListener("change", () => {
      const files = [...(input.files ?? [])];
      input.value = ""; // so that the same file can be chosen again
      if (files.length) receive(files);
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
    const files = [...(event.dataTransfer?.files ?? [])];
    settle();
    if (!files.length) return;
    event.preventDefault();
    const onNetworks = event.target instanceof Element && event.target.closest("#network-drop") !== null;
    if (onNetworks || files.some(({ name }) => NETWORK_NAME.test(name))) take.network(files);
    else take.image(files[0]);
  });

  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    take.image(file);
  });
}
