// Runs the model in a worker, so that the page stays responsive.
// In: {id, file, card}, with the number of a class as `why` for an explanation, or {id, stop: true}.
// Out: any number of {id, note}, then {id, probs, memberProbs, milliseconds}, the explanation of
// heat.js, or {id, error}.

import { decode } from "./decode.js";
import { explain } from "./heat.js";
import * as ort from "./ort/ort.js";

ort.env.wasm.numThreads = 1; // more need headers (COOP, COEP) that few static hosts send
ort.env.wasm.wasmPaths = { wasm: new URL("./ort/ort.wasm", import.meta.url).href };

const TOLERANCE = 0.01;
let session, hasFailed = false;

async function loadSession({ file, bytes, sha256 }, report) {
  // With its hash in the URL, the browser's cache cannot return the model of an older folder.
  const url = new URL(`${file}?${sha256.slice(0, 16)}`, import.meta.url);
  const model = await download(url, bytes, report);
  report("starting the model …");
  return ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
}

async function download(url, size, report) {
  const response = await fetch(url, { cache: hasFailed ? "reload" : "default" });
  if (!response.ok) throw new Error(`the model file cannot be loaded: ${response.status}`);
  const model = new Uint8Array(size), reader = response.body.getReader();
  const megabytes = (size / 1e6).toFixed(0);
  let length = 0, reported = -1;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (length + value.length > size)
      throw new Error("the model file does not belong to this page");
    model.set(value, length);
    length += value.length;
    const percent = Math.floor((100 * length) / size);
    if (percent > reported) {
      reported = percent;
      report(`loading the model, ${megabytes} MB: ${percent} %`);
    }
  }
  if (length !== size) throw new Error("the model file is incomplete: try again");
  return model;
}

// As runtime/model_output.py: the answers of a damaged model are an error.
function checkProbabilities(probs, task) {
  const sum = probs.reduce((total, p) => total + p, 0);
  const areInside = probs.every((p) => p >= -TOLERANCE && p <= 1 + TOLERANCE); // false for NaN
  const isRight = task === "multilabel" || Math.abs(sum - 1) <= TOLERANCE;
  if (!areInside || !isRight)
    throw new Error("the model cannot answer: its answers are not probabilities");
}

async function getSession(card, report) {
  session ??= loadSession(card.model, report);
  try {
    return await session;
  } catch (error) {
    session = undefined; // the next image tries again
    hasFailed = true;
    throw error;
  }
}

async function predict({ id, file, card }) {
  const report = (note) => postMessage({ id, note });
  const { data, width, height } = await decode(file, card.limits);
  const loaded = await getSession(card, report);
  const start = performance.now();
  const images = new ort.Tensor("uint8", data, [1, height, width, 3]);
  const outputs = await loaded.run({ images }, ["probs", "member_probs"]);
  const milliseconds = performance.now() - start;
  checkProbabilities(outputs.probs.data, card.task);
  return { id, probs: outputs.probs.data, memberProbs: outputs.member_probs.data, milliseconds };
}

// An explanation is 65 answers. It takes its turn for each step, so that images are answered
// meanwhile.
async function explainFile({ id, file, card, why }) {
  const pixels = await inTurn(() => decode(file, card.limits));
  const answer = async (data, count, height, width) => {
    await new Promise((resolve) => setTimeout(resolve)); // new messages come first
    if (stopped.has(id)) throw new Error("nobody waits for it any more");
    return inTurn(async () => {
      const loaded = await getSession(card, () => {});
      const images = new ort.Tensor("uint8", data, [count, height, width, 3]);
      const { probs } = await loaded.run({ images }, ["probs"]);
      const k = probs.data.length / count;
      const rows = Array.from({ length: count }, (_, i) => probs.data.slice(i * k, (i + 1) * k));
      rows.forEach((row) => checkProbabilities(row, card.task));
      return rows;
    });
  };
  return { id, ...(await explain(answer, pixels, why, card)) };
}

const stopped = new Set(); // ids of explanations
let queue = Promise.resolve(); // one step at a time, in the order of arrival

function inTurn(work) {
  const result = queue.then(work);
  queue = result.catch(() => {});
  return result;
}

onmessage = async ({ data }) => {
  if (data.stop) { stopped.add(data.id); return; }
  const work = data.why === undefined ? inTurn(() => predict(data)) : explainFile(data);
  try {
    postMessage(await work);
  } catch (error) {
    postMessage({ id: data.id, error: String(error?.message ?? error) });
  }
  stopped.delete(data.id);
};
