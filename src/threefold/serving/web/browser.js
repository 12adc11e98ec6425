// Back end of the page that runs the model in the browser, in a worker.

import { byProbability, isUnknown, setOf } from "./sets.js";

export const MAX_CONCURRENT = 1;
export const FORMATS = "JPEG, PNG, WebP, BMP, GIF";
const TOP = 5;
const jobs = new Map();
let modelCard = null, worker = null, lastId = 0;

export function note({ model }) {
  const megabytes = (model.bytes / 1e6).toFixed(0);
  return "The model runs on this computer; no image leaves it. "
    + `Choosing the first image downloads the model (${megabytes} MB).`;
}

export async function card() {
  const response = await fetch("card.json", { cache: "no-cache" });
  if (!response.ok) throw new Error(`card.json: ${response.status}`);
  modelCard = await response.json();
  return modelCard;
}

export function start() {}

function startWorker() {
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data }) => {
    const job = jobs.get(data.id);
    if (data.note) { job.report(data.note); return; }
    jobs.delete(data.id);
    if (data.error) job.reject(new Error(data.error)); else job.resolve(data);
  };
  worker.onerror = (event) => {
    const reason = event.message ?? "its worker cannot be loaded";
    const error = new Error(`the model does not run in this browser: ${reason}`);
    for (const job of jobs.values()) job.reject(error);
    jobs.clear();
    worker = null;
  };
}

function run(file, report, why, signal) {
  if (!worker) startWorker();
  return new Promise((resolve, reject) => {
    lastId += 1;
    const id = lastId;
    jobs.set(id, { resolve, reject, report });
    const { limits, model, task, preprocessing } = modelCard;
    worker.postMessage({ id, file, card: { limits, model, task, preprocessing }, why });
    const stop = () => { if (jobs.has(id)) worker.postMessage({ id, stop: true }); };
    signal?.addEventListener("abort", stop);
  });
}

// What hiding parts of an image costs a class, as the server explains it (serving/explain.py).
export async function explain(file, label, signal) {
  const found = await run(file, () => {}, modelCard.classes.indexOf(label), signal);
  return { file: file.name, label, ...found };
}

// The prediction that the server makes for one image (serving/responses.py), and its probabilities.
export async function predict(file, report) {
  if (!modelCard) throw new Error("there is no model card");
  const { classes, members, conformal, unknown, task } = modelCard;
  const { probs, memberProbs, milliseconds } = await run(file, report);
  if (task === "multilabel") {
    const answer = describeLabels(probs, memberProbs);
    return { file: file.name, ...answer, probs: Array.from(probs), milliseconds };
  }
  const k = classes.length;
  const describe = (row) => {
    const order = byProbability(row).slice(0, TOP);
    const top = order.map((c) => ({ label: classes[c], probability: row[c] }));
    return { ...top[0], top };
  };
  const prediction = { file: file.name, ...describe(probs), members: {} };
  members.forEach((name, m) => {
    prediction.members[name] = describe(memberProbs.subarray(m * k, (m + 1) * k));
  });
  const sets = conformal?.find((entry) => entry?.state?.by_class === false);
  if (sets) prediction.set = setOf(probs, sets.state).map((c) => classes[c]);
  if (unknown) prediction.unknown = isUnknown(probs, unknown.state);
  return { ...prediction, probs: Array.from(probs), milliseconds };
}

// The labels that reach their thresholds, the most probable ones, and what the members say of both.
function describeLabels(probs, memberProbs) {
  const { classes, members, thresholds } = modelCard;
  const order = byProbability(probs), k = classes.length;
  const given = order.filter((c) => probs[c] >= thresholds[c]), top = order.slice(0, TOP);
  const describe = (numbers) => numbers.map((c) =>
    ({ label: classes[c], probability: probs[c], threshold: thresholds[c] }));
  const named = [...new Set([...given, ...top])];
  const rows = members.map((name, m) =>
    [name, Object.fromEntries(named.map((c) => [classes[c], memberProbs[m * k + c]]))]);
  return { labels: describe(given), top: describe(top), members: Object.fromEntries(rows) };
}
