// @ts-check
/** Starts the page: one store, one session, and a panel for each part of the screen. */

import { mountAccount } from "./account.js";
import { mountClasses } from "./classes.js";
import { mountCompare } from "./compare.js";
import { announce, byId } from "./dom.js";
import { mountImages } from "./images.js";
import { mountMethod } from "./method.js";
import { addNetwork, mountNetworks } from "./networks.js";
import { mountProblems } from "./problems.js";
import { Session } from "./session.js";
import { mountStage } from "./stage.js";
import { initialState, Store, writeLink } from "./state.js";
import { acceptFiles } from "./upload.js";

const store = new Store(initialState());
const session = new Session(store);

mountProblems(store);
mountImages(store, session);
mountNetworks(store, session);
mountMethod(store, session);
mountStage(store, session);
mountClasses(store, session);
mountAccount(store);
mountCompare(store);

acceptFiles({
  image: (file) => session.takeImage({ blob: file, name: file.name || "pasted image", sample: null }),
  network: (files) => addNetwork(session, files),
});

byId("stage-title").addEventListener("click", (event) => {
  if (event.target instanceof Element && event.target.id === "again") session.again();
});

byId("copy-link").addEventListener("click", async () => {
  const button = byId("copy-link");
  try {
    await navigator.clipboard.writeText(location.href);
    button.textContent = "Link copied";
  } catch {
    // Clipboards need https or localhost and a permission; the address bar has the same link.
    button.textContent = "Copy it from the address bar";
  }
  announce(button.textContent);
  setTimeout(() => (button.textContent = "Copy link"), 2500);
});

// On a narrow screen the heatmap is below the choices: show it when there is something to see.
store.watch(["picture"], ({ picture }) => {
  const stage = byId("stage");
  if (picture && stage.getBoundingClientRect().top > innerHeight * 0.6) stage.scrollIntoView({ block: "start" });
});

await session.start(location.hash);
store.watch(["modelId", "explanation", "method", "composite", "parameters", "image"], (state) => {
  history.replaceState(null, "", writeLink(state));
});
addEventListener("hashchange", () => session.follow(location.hash));
document.documentElement.dataset.ready = "true";
