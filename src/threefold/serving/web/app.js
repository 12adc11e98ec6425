// Shows predictions for images that are chosen, dropped or pasted, the latest first.
// backend.js makes them: it is server.js where `threefold serve` sends this page, and browser.js
// in the folder of `threefold export --web`.

import * as backend from "./backend.js";
import { factsOf, metricOf, scoreOf, setsOf, target } from "./facts.js";
import { describeLabels, explainedLabels } from "./labels.js";
import { element, makeBar, percent } from "./parts.js";

const ROUNDING = 1e-5; // a mean loss of probability up to this is none, as in runtime/heat.py
const byId = (id) => document.getElementById(id);
const waiting = [];
const removals = new WeakMap(); // article -> AbortController
let running = 0, answered = 0, failed = 0, card = null;
let lastExplanation = Promise.resolve(), lastWhy = 0;

function add(files) {
  const jobs = Array.from(files, (file) => ({ file, article: makeArticle(file) }));
  byId("answers").prepend(...jobs.map((job) => job.article));
  waiting.push(...jobs);
  startJobs();
}

function startJobs() {
  showStatus();
  while (running < backend.MAX_CONCURRENT && waiting.length) {
    const job = waiting.shift();
    if (!job.article.isConnected) continue; // removed while it waited
    running += 1;
    run(job).finally(() => { running -= 1; startJobs(); });
  }
}

async function run({ file, article }) {
  const body = article.querySelector(".body");
  const note = body.querySelector("p");
  try {
    const prediction = await backend.predict(file, (text) => { note.textContent = text; });
    body.replaceChildren(...describe(prediction));
    addWhys(body, file, explainedLabels(prediction), removals.get(article).signal);
    answered += 1;
  } catch (error) {
    const reason = element("p", { class: "note bad" }, error.message);
    body.replaceChildren(element("h2", {}, "No answer"), reason);
    failed += 1;
  }
}

function makeArticle(file) {
  const name = file.name || "image";
  const remove = element("button", { type: "button", "aria-label": `Remove ${name}` }, "✕");
  const top = element("div", { class: "top" }, element("p", { class: "file" }, name), remove);
  const body = element("div", { class: "body" }, element("p", { class: "soft" }, "waiting …"));
  const article = element("article", {}, makePreview(file, name), element("div", {}, top, body));
  removals.set(article, new AbortController());
  remove.onclick = () => { discard(article); showStatus(); byId("pick").focus(); };
  return article;
}

function discard(article) {
  removals.get(article).abort();
  article.remove();
}

function makePreview(file, name) {
  const image = element("img", { alt: `preview of ${name}` });
  const picture = element("div", { class: "picture" }, image);
  const url = URL.createObjectURL(file);
  image.onload = () => URL.revokeObjectURL(url);
  image.onerror = () => {
    URL.revokeObjectURL(url);
    picture.replaceChildren(element("span", {}, "no preview"));
  };
  image.src = url;
  return picture;
}

function describe(prediction) {
  return prediction.labels ? describeLabels(prediction) : describeClass(prediction);
}

function describeClass(prediction) {
  const parts = [element("h2", {}, prediction.label)];
  if (prediction.unknown) {
    const text = "This image is unlike those the model was trained on: "
      + "it may belong to none of the classes.";
    parts.push(element("p", { class: "note" }, text));
  }
  const bars = prediction.top.map(({ label, probability }) => makeBar(label, probability));
  const label = "Probabilities of the ensemble";
  parts.push(element("ul", { class: "shares", "aria-label": label }, ...bars));
  if (prediction.set) parts.push(describeSet(prediction.set));
  parts.push(describeMembers(prediction));
  return parts;
}

function describeSet(labels) {
  const sets = setsOf(card ?? {});
  const title = sets
    ? `${target(sets)} prediction set (measured coverage ${percent(sets.coverage)}):`
    : "Prediction set:";
  const names = labels.map((label) => element("b", {}, label));
  if (!names.length) names.push("none of the classes");
  return element("p", { class: "set" }, element("span", { class: "soft" }, title), ...names);
}

function describeMembers(prediction) {
  const members = Object.entries(prediction.members);
  const agrees = ([, member]) => member.label === prediction.label;
  const rows = members.map(([name, member]) => {
    const label = agrees([name, member])
      ? element("td", {}, member.label)
      : element("td", { class: "differs" }, `≠ ${member.label}`);
    const number = element("td", { class: "n" }, percent(member.probability));
    return element("tr", {}, element("th", { scope: "row" }, name), label, number);
  });
  let text = `Members: ${members.filter(agrees).length} of ${members.length} agree`;
  const skipped = (card?.members?.length ?? members.length) - members.length;
  if (prediction.members_used && skipped > 0)
    text += `, ${skipped} did not run: the answer was certain without`;
  return element("table", {}, element("caption", {}, text), element("tbody", {}, ...rows));
}

// Puts buttons beside an answer that ask for its explanation, one for each label.
function addWhys(body, file, labels, signal) {
  const heading = body.querySelector("h2"), row = element("div", { class: "answer" });
  heading.before(row);
  row.append(heading);
  for (const label of [...labels].reverse()) {
    const text = labels.length > 1 ? `Why ${label}?` : "Why?";
    const { button, region } = makeWhy(file, label, text, signal);
    heading.after(button);
    row.after(region);
  }
}

// A button that asks for the explanation of a label, and the region that it shows or hides.
function makeWhy(file, label, text, signal) {
  lastWhy += 1;
  const name = file.name || "image";
  const region = element("div", { id: `why-${lastWhy}`, class: "why", "aria-live": "polite" });
  const button = element("button", { type: "button", "aria-expanded": "false",
    "aria-controls": region.id, "aria-label": `Why? ${label}, ${name}` }, text);
  const show = (open) => {
    button.setAttribute("aria-expanded", String(open));
    region.hidden = !open;
  };
  let isAsked = false;
  show(false);
  button.onclick = async () => {
    show(region.hidden || !isAsked);
    if (isAsked) return;
    isAsked = true;
    const doing = "Hiding parts of the image, one after the other …";
    region.replaceChildren(element("p", { class: "soft wait" }, doing));
    try {
      region.replaceChildren(...describeExplanation(await explainInTurn(file, label, signal), name));
    } catch (error) {
      region.replaceChildren(element("p", { class: "note bad" },
        `No explanation: ${error.message}. Press “${text}” to ask again.`));
      isAsked = false;
    }
  };
  return { button, region };
}

// One explanation at a time: each costs as much as 65 answers.
function explainInTurn(file, label, signal) {
  const explanation = lastExplanation.then(() => {
    signal.throwIfAborted();
    return backend.explain(file, label, signal);
  });
  lastExplanation = explanation.catch(() => {});
  return explanation;
}

function describeExplanation({ label, probability, lowest, cells, picture }, name) {
  const isCold = !cells.flat().some((loss) => loss > ROUNDING);
  const [before, after] = [percent(probability), percent(lowest)];
  const meaning = isCold
    ? `No part of the image matters alone: the answer “${label}” (${before}) stays, whichever part `
      + "is hidden."
    : `Where violet to yellow lies over the picture, hiding a part makes “${label}” less probable: `
      + `${before} becomes ${after} without the part that matters most. Yellow matters most.`;
  const limit = "This shows what the answer depends on, not that it is right.";
  const alt = isCold ? `${name}, without any part that matters alone`
    : `${name}, with the parts that matter most for “${label}” in yellow: ${placeOf(cells)}`;
  const image = element("img", { alt });
  const url = URL.createObjectURL(picture);
  image.onload = image.onerror = () => URL.revokeObjectURL(url);
  image.src = url;
  return [image, element("p", {}, meaning), element("p", { class: "soft" }, limit)];
}

// Where the largest of the cells is, in words.
function placeOf(cells) {
  const all = cells.flat(), at = all.indexOf(Math.max(...all)), side = cells.length;
  const third = (position) => Math.floor((3 * position + 1.5) / side);
  const down = ["top", "middle", "bottom"][third(Math.floor(at / side))];
  const across = ["left", "centre", "right"][third(at % side)];
  return `${down} ${across}`;
}

function showStatus() {
  const left = running + waiting.filter((job) => job.article.isConnected).length;
  byId("bar").hidden = !byId("answers").childElementCount;
  const parts = [`${answered} answered`];
  if (failed) parts.push(`${failed} failed`);
  if (left) parts.push(`${left} left`);
  byId("status").textContent = parts.join(", ");
}

async function showCard() {
  card = await backend.card();
  const { score, limits } = card;
  byId("name").textContent = card.name ?? "threefold";
  document.title = `${card.name ?? "model"} · threefold`;
  const count = card.members.length;
  const kind = card.task === "multilabel" ? "labels" : "classes";
  const size = `${card.classes.length} ${kind}, ${count} ${count === 1 ? "member" : "members"}`;
  byId("headline").textContent =
    score ? `${size}; expected ${metricOf(score)} on new images: ${scoreOf(score)}` : size;
  const megabytes = Math.floor(limits.file_bytes / 2 ** 20);
  const megapixels = Math.floor(limits.pixels / 1e6);
  byId("bounds").textContent =
    `${backend.FORMATS}; up to ${megabytes} MB and ${megapixels} megapixels each`;
  byId("where").textContent = backend.note(card);
  const rows = Object.entries(factsOf(card)).flatMap(([name, value]) =>
    value ? [element("dt", {}, name), element("dd", {}, value)] : []);
  byId("facts").replaceChildren(...rows);
}

function clear() {
  for (const article of [...byId("answers").children]) discard(article);
  waiting.length = answered = failed = 0;
  showStatus();
  byId("pick").focus();
}

byId("pick").onchange = (event) => { add(event.target.files); event.target.value = ""; };
byId("clear").onclick = clear;
document.addEventListener("paste", (event) => add(event.clipboardData.files));
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
  add(event.dataTransfer.files);
});

function showFailure(error) {
  byId("headline").textContent = `The model card cannot be shown: ${error.message}`;
}

const showCardOrFailure = () => showCard().catch(showFailure);
backend.start(showCardOrFailure);
showCardOrFailure();
