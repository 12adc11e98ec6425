// What every part of the page uses: elements, requests, and numbers as people read them.

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function drawing(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A button; while its action runs it is disabled, and a failure goes to `onError`.
export function button(text, action, { primary = false, onError = () => {} } = {}) {
  const node = element("button", { type: "button" }, text);
  if (primary) node.className = "primary";
  node.onclick = async () => {
    node.disabled = true;
    onError("");
    try {
      await action();
    } catch (error) {
      onError(error.message);
    } finally {
      node.disabled = false;
    }
  };
  return node;
}

export class Unreachable extends Error {}

export async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("the server does not answer");
  }
  const tree = await response.json().catch(() => null);
  if (response.ok && tree) return tree;
  throw new Error(tree?.error?.message ?? `the server answered ${response.status}`);
}

export function post(path, body = {}, options = {}) {
  const headers = { "content-type": "application/json" };
  return call(path, { ...options, method: "POST", headers, body: JSON.stringify(body) });
}

export const runPath = (name, rest = "") => `runs/${encodeURIComponent(name)}${rest}`;

// A line for what went wrong, empty at first.
export function makeError() {
  const node = element("p", { class: "note bad", role: "alert" });
  node.hidden = true;
  const show = (text) => {
    node.textContent = text;
    node.hidden = !text;
  };
  return [node, show];
}

// A score as people read it: a share of right answers in per cent, mean average precision as it is.
export const figure = (metric, value) => metric === "mAP" ? value.toFixed(3) : percent(value);

export function percent(p, digits = 1) {
  return `${(100 * p).toFixed(digits)}\u00a0%`;
}

export const count = (n, noun, plural = `${noun}s`) =>
  `${Number(n).toLocaleString("en")}\u00a0${n === 1 ? noun : plural}`;

export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  const [h, m] = [Math.floor(s / 3600), Math.floor((s % 3600) / 60)];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
}

// `20m` as `20 minutes`; `0` is no limit.
export function budgetText(text) {
  const units = { s: "second", m: "minute", h: "hour" };
  const [, number, unit] = /^([\d.]+)([smh]?)$/.exec(text ?? "") ?? [];
  if (!number) return text || "";
  return Number(number) === 0 ? "no limit" : count(Number(number), units[unit] || "minute");
}

export function when(seconds) {
  return new Date(1000 * seconds).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

export function size(bytes) {
  if (bytes < 1e6) return `${Math.ceil(bytes / 1e3)}\u00a0kB`;
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)}\u00a0MB` : `${(bytes / 1e9).toFixed(2)}\u00a0GB`;
}

// Where the images of a run are; those that were sent lie in a folder of the page's own.
export const placeOf = ({ data }) => data.replace(/^.*[/\\]uploads[/\\]\w{16}[/\\]/, "sent: ");

const WORKING = { check: "checking images", plan: "planning", fit: "training" };

// Where a run stands, as [words, kind of chip].
export function standing(run) {
  if (run.running) return [WORKING[run.running], "busy"];
  if (run.problem) return ["damaged", "bad"];
  if (run.finished) return ["finished", "good"];
  if (run.outcome === "failed") return ["failed", "bad"];
  if (run.begun) return ["stopped", "warn"];
  if (run.planned) return ["planned", ""];
  return run.outcome === "done" && run.task === "check" ? ["images checked", ""] : ["stopped", "warn"];
}

export function chip(run) {
  const [words, kind] = standing(run);
  return element("span", { class: `chip ${kind}` }, words);
}
