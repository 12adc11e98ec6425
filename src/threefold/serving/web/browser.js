// Answers in the browser itself: the model runs in a worker, and no image leaves this computer.

import { byProbability, isUnknown, setOf } from "./sets.js";

export const AT_ONCE = 1;
export const FORMATS = "JPEG, PNG, WebP, BMP, GIF";
export const note = ({ model }) => `The model runs on this computer; no image leaves it. Its ${(model.bytes / 1e6).toFixed(0)} MB are loaded when the first image is chosen.`;
const TOP = 5;
const jobs = new Map();
let known = null, worker = null, count = 0;

export async function card() {
  const response = await fetch("card.json", { cache: "no-cache" });
  if (!response.ok) throw new Error(`card.json: ${response.status}`);
  known = await response.json();
  return known;
}

export function start() {}

function run(file, tell) {
  if (!worker) {
    worker = new Worker("worker.js", { type: "module" });
    worker.onmessage = ({ data }) => {
      const job = jobs.get(data.id);
      if (data.note) { job.tell(data.note); return; }
      jobs.delete(data.id);
      if (data.error) job.refuse(new Error(data.error)); else job.answer(data);
    };
    worker.onerror = (event) => {
      for (const job of jobs.values()) job.refuse(new Error(`the model cannot be run in this browser: ${event.message ?? "its program cannot be loaded"}`));
      jobs.clear();
      worker = null;
    };
  }
  return new Promise((answer, refuse) => {
    count += 1;
    jobs.set(count, { answer, refuse, tell });
    worker.postMessage({ id: count, file, card: { limits: known.limits, model: known.model } });
  });
}

// The same answer as the server's for one image; see replies.py.
export async function answer(file, tell) {
  if (!known) throw new Error("there is no model card");
  const { probs, members, milliseconds } = await run(file, tell);
  const k = known.classes.length;
  const opinion = (row) => {
    const top = byProbability(row).slice(0, TOP).map((c) => ({ label: known.classes[c], probability: row[c] }));
    return { ...top[0], top };
  };
  const rows = known.members.map((name, m) => [name, opinion(members.subarray(m * k, (m + 1) * k))]);
  const found = { file: file.name, ...opinion(probs), members: Object.fromEntries(rows), probs: Array.from(probs), milliseconds };
  const sets = known.conformal?.find((entry) => entry?.state?.by_class === false);
  if (sets) found.set = setOf(probs, sets.state).map((c) => known.classes[c]);
  if (known.unknown) found.unknown = isUnknown(probs, known.unknown.state);
  return found;
}
