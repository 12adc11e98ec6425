// Shows what to look at in a data set, and sends each decision to the server, which writes it.

const PAGE_SIZE = 50;
const byId = (id) => document.getElementById(id);
let state = null, kind = "", shown = PAGE_SIZE;

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

async function call(path, options) {
  const response = await fetch(path, options);
  const body = await response.json();
  if (!response.ok) throw new Error(body.error ? body.error.message : `status ${response.status}`);
  return body;
}

function figure(id, caption) {
  const source = `picture?id=${encodeURIComponent(id)}`;
  const image = element("img", { src: source, alt: id, loading: "lazy" });
  return element("figure", {}, image, element("figcaption", {}, caption));
}

function describe(decision) {
  if (!decision) return "";
  if (decision.action === "relabel") return `relabelled: ${decision.label}`;
  return decision.action === "drop" ? "dropped" : "accepted";
}

function makeItem(item) {
  const decided = element("p", { class: "decided" });
  const choice = element("select", { "aria-label": `New label of ${item.id}` });
  for (const name of state.classes) choice.append(element("option", { value: name }, name));
  choice.value = item.suggested || item.label;
  const buttons = element("div", { class: "buttons" });
  const article = element("article", { class: "item" });
  const show = () => {
    decided.textContent = describe(item.decision);
    article.classList.toggle("is-drop", item.decision?.action === "drop");
    undo.hidden = !item.decision;
  };
  const button = (text, action) => {
    const node = element("button", { type: "button" }, text);
    node.addEventListener("click", async () => {
      const label = action === "relabel" ? choice.value : "";
      const body = JSON.stringify({ id: item.id, action, label });
      const headers = { "content-type": "application/json" };
      try {
        state.counts = await call("decide", { method: "POST", headers, body });
        item.decision = action === "undo" ? null : { action, label };
        show();
        showCounts();
      } catch (error) {
        decided.textContent = `not saved: ${error.message}`;
      }
    });
    return node;
  };
  const undo = button("Undo", "undo");
  buttons.append(
    button("Accept", "accept"), button("Relabel", "relabel"), choice, button("Drop", "drop"), undo);
  const reasons = item.reasons.map((reason) => element("p", {}, reason));
  const facts = element("div", { class: "facts" },
    element("h2", {}, item.label), ...reasons, buttons, decided);
  article.append(figure(item.id, `${item.id} (${item.part})`));
  if (item.copy_of) article.append(figure(item.copy_of, item.copy_of));
  article.append(facts);
  show();
  return article;
}

function showCounts() {
  const { accept, relabel, drop } = state.counts;
  const done = accept + relabel + drop;
  byId("status").textContent =
    `${done} of ${state.items.length} decided: ${accept} accepted, ${relabel} relabelled, ` +
    `${drop} dropped`;
}

function showItems() {
  const chosen = state.items.filter((item) => !kind || item.kinds.includes(kind));
  byId("items").replaceChildren(...chosen.slice(0, shown).map(makeItem));
  byId("more").hidden = chosen.length <= shown;
}

function showKinds() {
  const names = [...new Set(state.items.flatMap((item) => item.kinds))];
  const buttons = ["", ...names].map((name) => {
    const count = state.items.filter((item) => !name || item.kinds.includes(name)).length;
    const pressed = String(name === kind);
    const node = element(
      "button", { type: "button", "aria-pressed": pressed }, `${name || "all"} (${count})`);
    node.addEventListener("click", () => { kind = name; shown = PAGE_SIZE; showKinds(); showItems(); });
    return node;
  });
  byId("kinds").replaceChildren(...buttons);
}

async function start() {
  try {
    state = await call("items");
  } catch (error) {
    byId("headline").textContent = `The review cannot be loaded: ${error.message}`;
    return;
  }
  byId("headline").textContent =
    `Every decision is written at once to ${state.file}. Your images stay as they are.`;
  byId("notes").replaceChildren(...state.notes.map((note) => element("li", {}, note)));
  byId("more").addEventListener("click", () => { shown += PAGE_SIZE; showItems(); });
  showCounts();
  showKinds();
  showItems();
}

start();
