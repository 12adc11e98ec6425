// Shows one of two views, by the address: all runs, or `#/run/NAME`.

import { call, element, Unreachable } from "./ui_common.js";
import { makeList, makeNew } from "./ui_new.js";
import { RunView } from "./ui_run.js";

const PAUSE = 3000; // milliseconds between two looks at the list of runs
const view = document.getElementById("view");
let current = null, state = null;

function showReach(text) {
  const line = document.getElementById("offline");
  line.textContent = text ? `${text}; trying again. What is being trained goes on as long as `
    + "`threefold ui` runs." : "";
  line.hidden = !text;
}

class HomeView {
  constructor() {
    this.node = element("div", {});
    this.card = makeNew(state);
    this.receive = (transfer) => this.card.receive(transfer);
    this.key = "";
  }

  start() {
    document.title = "threefold";
    const header = element("header", {}, element("h1", {}, "threefold"),
      element("p", { class: "soft" }, "From a folder of images to a trained, measured and "
        + "exported ensemble. Everything stays on this machine."));
    this.list = element("div", {});
    this.node.replaceChildren(header, this.card, this.list);
    this.draw();
    this.timer = setTimeout(() => this.look(), PAUSE);
  }

  draw() {
    const key = JSON.stringify(state.runs);
    if (key !== this.key) this.list.replaceChildren(makeList(state));
    this.key = key;
  }

  async look() {
    try {
      state = await call("state");
      showReach("");
      if (this.closed) return;
      this.draw();
    } catch (problem) {
      showReach(problem.message);
    }
    if (!this.closed) this.timer = setTimeout(() => this.look(), PAUSE);
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
  }
}

async function show() {
  const match = /^#\/run\/(.+)$/.exec(location.hash);
  try {
    state = await call("state");
    showReach("");
  } catch (problem) {
    if (problem instanceof Unreachable) showReach(problem.message);
    else view.replaceChildren(element("p", { class: "note bad", role: "alert" }, problem.message));
    if (!state) { setTimeout(show, PAUSE); return; }
  }
  current?.close();
  current = match ? new RunView(decodeURIComponent(match[1]), state, showReach) : new HomeView();
  view.replaceChildren(current.node);
  await current.start();
}

// The key has done its work once the page is here; it is better not in the history.
if (location.search) history.replaceState(null, "", location.pathname + location.hash);
window.addEventListener("hashchange", show);
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  current?.receive(event.dataTransfer);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) current?.receive(event.clipboardData);
});
show();
