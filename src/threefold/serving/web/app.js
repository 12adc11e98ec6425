// Shows the answers for images that are chosen, dropped or pasted, the latest first. Who answers is the back end's business:
// backend.js is server.js where `threefold serve` sends this page, and browser.js in the folder of `threefold export --web`.

import * as backend from "./backend.js";

const byId = (id) => document.getElementById(id);
const waiting = [];
let running = 0, done = 0, failed = 0, card = null;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function percent(p) {
  if (p > 0.9995) return ">\u00a099.9\u00a0%";
  return p < 0.0005 ? "<\u00a00.1\u00a0%" : `${(100 * p).toFixed(1)}\u00a0%`;
}

function add(files) {
  const jobs = Array.from(files, (file) => ({ file, article: frame(file) }));
  byId("answers").prepend(...jobs.map((job) => job.article));
  waiting.push(...jobs);
  next();
}

function next() {
  tell();
  while (running < backend.AT_ONCE && waiting.length) {
    const job = waiting.shift();
    if (!job.article.isConnected) continue; // removed while it waited
    running += 1;
    answer(job).finally(() => { running -= 1; next(); });
  }
}

async function answer({ file, article }) {
  const body = article.querySelector(".body");
  try {
    const note = body.querySelector("p");
    const found = await backend.answer(file, (text) => { note.textContent = text; });
    body.replaceChildren(...describe(found));
    done += 1;
  } catch (error) {
    body.replaceChildren(make("h2", {}, "No answer"), make("p", { class: "note bad" }, error.message));
    failed += 1;
  }
}

function frame(file) {
  const name = file.name || "image";
  const image = make("img", { alt: `preview of ${name}` });
  const picture = make("div", { class: "picture" }, image);
  const address = URL.createObjectURL(file);
  image.onload = () => URL.revokeObjectURL(address);
  image.onerror = () => { URL.revokeObjectURL(address); picture.replaceChildren(make("span", {}, "no preview")); };
  image.src = address;
  const remove = make("button", { type: "button", "aria-label": `Remove ${name}` }, "✕");
  const top = make("div", { class: "top" }, make("p", { class: "file" }, name), remove);
  const article = make("article", {}, picture, make("div", {}, top, make("div", { class: "body" }, make("p", { class: "soft" }, "waiting …"))));
  remove.onclick = () => { article.remove(); tell(); byId("pick").focus(); };
  return article;
}

function describe(found) {
  const parts = [make("h2", {}, found.label)];
  if (found.unknown) parts.push(make("p", { class: "note" }, "Unlike the images that the model knows: perhaps none of its classes."));
  const shares = found.top.map(({ label, probability }) => {
    const fill = make("span", { class: "fill" });
    fill.style.width = percentWidth(probability);
    return make("li", {}, fill, make("span", {}, label), make("span", { class: "n" }, percent(probability)));
  });
  parts.push(make("ul", { class: "shares", "aria-label": "Ensemble: probabilities" }, ...shares));
  if (found.set) parts.push(describeSet(found.set));
  parts.push(describeMembers(found));
  return parts;
}

const percentWidth = (p) => `${Math.max(0, Math.min(100, 100 * p))}%`;

function describeSet(names) {
  const sets = setsOf(card ?? {});
  const told = sets ? `${asked(sets)} set (measured ${percent(sets.coverage)}):` : "Set:";
  return make("p", { class: "set" }, make("span", { class: "soft" }, told), ...(names.length ? names.map((name) => make("b", {}, name)) : ["none of the classes"]));
}

const setsOf = ({ conformal }) => (conformal ?? []).find((entry) => entry?.state?.by_class === false);
const asked = ({ state }) => `${Number((100 * (1 - state.alpha)).toFixed(2))}\u00a0%`;

function describeMembers(found) {
  const rows = Object.entries(found.members).map(([name, opinion]) => {
    const same = opinion.label === found.label;
    const label = make("td", same ? {} : { class: "differs" }, same ? opinion.label : `≠ ${opinion.label}`);
    return make("tr", {}, make("th", { scope: "row" }, name), label, make("td", { class: "n" }, percent(opinion.probability)));
  });
  const agree = Object.values(found.members).filter((opinion) => opinion.label === found.label).length;
  const left = found.members_used ? (card?.members?.length ?? rows.length) - rows.length : 0;
  const unasked = left > 0 ? `, ${left} not asked: the answer was sure without` : "";
  return make("table", {}, make("caption", {}, `Members: ${agree} of ${rows.length} agree${unasked}`), make("tbody", {}, ...rows));
}

function tell() {
  const open = running + waiting.filter((job) => job.article.isConnected).length;
  byId("bar").hidden = !byId("answers").childElementCount;
  const parts = [`${done} answered`];
  if (failed) parts.push(`${failed} refused`);
  if (open) parts.push(`${open} to go`);
  byId("status").textContent = parts.join(", ");
}

async function showCard() {
  card = await backend.card();
  const { score, limits } = card;
  byId("name").textContent = card.name ?? "threefold";
  document.title = `${card.name ?? "model"} · threefold`;
  const size = `${card.classes.length} classes, ${card.members.length} ${card.members.length === 1 ? "member" : "members"}`;
  byId("headline").textContent = score ? `${size}; expect ${range(score)} of new images to be right` : size;
  byId("bounds").textContent = `${backend.FORMATS}; up to ${Math.floor(limits.file_bytes / 2 ** 20)} MB and ${Math.floor(limits.pixels / 1e6)} megapixels each`;
  byId("where").textContent = backend.note(card);
  const facts = Object.entries(factsOf(card)).filter(([, value]) => value !== undefined && value !== "");
  byId("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

const range = ({ accuracy, interval }) => `${percent(accuracy)}${interval ? ` (${percent(interval[0])} to ${percent(interval[1])})` : ""}`;

function factsOf({ score, unknown, parity, versions, ...card }) {
  const level = score?.level ? `${100 * score.level} % interval` : "interval";
  const sets = setsOf(card);
  return {
    "Accuracy": score && `${range(score)}, ${level}`,
    "Scored on": score && `${score.n} rows, ${score.rows}; fitted on ${score.fitted_on}`,
    "Protocol": score && `${score.protocol}${score.protocol === "paper" ? ": selected on the rows that it reports" : ""}`,
    "Method": card.method,
    "Members": card.members.map((name, i) => (card.backbones?.[i] && card.backbones.length === card.members.length ? `${name} (${card.backbones[i]})` : name)).join(", "),
    "Classes": card.classes.length > 60 ? `${card.classes.slice(0, 60).join(", ")} … and ${card.classes.length - 60} more` : card.classes.join(", "),
    "Training images": card.n_train === undefined ? undefined : String(card.n_train),
    "Temperature": typeof card.temperature === "number" ? card.temperature.toPrecision(3) : undefined,
    "Prediction sets": sets && `asked ${asked(sets)}; measured ${percent(sets.coverage)} on ${sets.n} rows (${sets.rows}), ${Number(sets.mean_size).toFixed(2)} classes on average`,
    "Unknown images": unknown && `${percent(unknown.rate)} of images of a class may be called unknown; measured ${percent(unknown.measured)}`,
    "File against pipeline": parity && `largest difference ${Number(parity.max_difference).toExponential(1)} on ${parity.images} images`,
    "Runs on": card.runtime,
    "Versions": versions && Object.entries(versions).map((pair) => pair.join(" ")).join(", "),
    "Recipe digest": typeof card.digest === "string" ? card.digest.slice(0, 12) : undefined,
  };
}

byId("pick").onchange = (event) => { add(event.target.files); event.target.value = ""; };
byId("clear").onclick = () => { byId("answers").replaceChildren(); waiting.length = done = failed = 0; tell(); byId("pick").focus(); };
document.addEventListener("paste", (event) => add(event.clipboardData.files));
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
document.addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("over"); add(event.dataTransfer.files); });

function fail(error) { byId("headline").textContent = `The model card cannot be shown: ${error.message}`; }
const showOrFail = () => showCard().catch(fail);
backend.start(showOrFail);
showOrFail();
