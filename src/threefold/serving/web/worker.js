// Runs the model beside the page, so that the page stays usable: {id, file} in, {id, probs, members} or {id, error} out.

import { decode } from "./decode.js";
import * as ort from "./ort/ort.js";

ort.env.wasm.numThreads = 1; // more need headers (COOP, COEP) that few static hosts send
ort.env.wasm.wasmPaths = { wasm: new URL("./ort/ort.wasm", import.meta.url).href };

let loading, failed = false;

async function load(card, tell) {
  const { file, bytes, sha256 } = card.model;
  // The hash in the address keeps a browser from answering with the model that it has kept of an older folder.
  const whole = await download(new URL(`${file}?${sha256.slice(0, 16)}`, import.meta.url), bytes, tell);
  tell("starting the model …");
  return ort.InferenceSession.create(whole, { executionProviders: ["wasm"] });
}

async function download(url, size, tell) {
  const response = await fetch(url, { cache: failed ? "reload" : "default" });
  if (!response.ok) throw new Error(`the model file cannot be loaded: ${response.status}`);
  const whole = new Uint8Array(size), reader = response.body.getReader();
  let at = 0, told = -1;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > size) throw new Error("the model file is not the one that belongs to this page");
    whole.set(value, at);
    at += value.length;
    const percent = Math.floor((100 * at) / size);
    if (percent > told) tell(`loading the model, ${(size / 1e6).toFixed(0)} MB: ${(told = percent)} %`);
  }
  if (at !== size) throw new Error("the model file did not arrive whole: try again");
  return whole;
}

async function answer({ id, file, card }) {
  const tell = (note) => postMessage({ id, note });
  const { data, width, height } = await decode(file, card.limits);
  loading ??= load(card, tell);
  let session;
  try {
    session = await loading;
  } catch (error) {
    loading = undefined; // the next image tries again
    failed = true;
    throw error;
  }
  const began = performance.now();
  const images = new ort.Tensor("uint8", data, [1, height, width, 3]);
  const found = await session.run({ images }, ["probs", "member_probs"]);
  const [probs, members] = [found.probs.data, found.member_probs.data];
  return { id, probs, members, milliseconds: performance.now() - began };
}

let queue = Promise.resolve(); // one image at a time, in the order they came
onmessage = ({ data }) => {
  queue = queue.then(() => answer(data)).then(postMessage, (error) => postMessage({ id: data.id, error: String(error?.message ?? error) }));
};
