// The first view: images for a new run, sent or named, and the list of runs.

import {
  button, call, chip, count, element, figure, makeError, placeOf, post, size, when,
} from "./ui_common.js";

const CONCURRENT = 4;
const IGNORED = /(^|\/)(\.|__MACOSX\/|Thumbs\.db$|desktop\.ini$)/;

export function makeNew(state) {
  const [error, showError] = makeError();
  const zone = element("div", { class: "dropzone" });
  const begin = async (data) => {
    const { name } = await post("runs", { data });
    location.hash = `#/run/${encodeURIComponent(name)}`;
  };
  const send = async (files) => {
    showError("");
    try {
      if (files.length) await upload(files, state.piece_bytes, zone, begin);
    } catch (problem) {
      if (problem.name !== "AbortError") showError(problem.message);
    } finally {
      showZone(zone, send);
    }
  };
  showZone(zone, send);
  const card = element("section", { class: "card", "aria-labelledby": "new" },
    element("h2", { id: "new" }, "New run"), zone, makeNamed(begin, showError), error);
  card.receive = async (transfer) => send(await filesOf(transfer));
  return card;
}

function showZone(zone, send) {
  const choose = (text, attributes) => {
    const input = element("input", { type: "file", multiple: "", tabindex: "-1",
      "aria-label": text, ...attributes });
    input.onchange = () => send(Array.from(input.files, (file) =>
      ({ file, name: file.webkitRelativePath || file.name })));
    return [button(text, () => input.click()), input];
  };
  zone.replaceChildren(
    element("strong", {}, "Drop a folder or a zip file of images here"),
    element("small", {}, "one folder for each class, or train/ and test/ with class folders "
      + "inside; or a zip, tar, CSV, parquet or npz file"),
    element("div", { class: "buttons" },
      ...choose("Choose a folder …", { webkitdirectory: "", id: "pick-folder" }),
      ...choose("Choose a file …", { id: "pick-file" })));
}

function makeNamed(begin, showError) {
  const input = element("input", { type: "text", id: "path", autocomplete: "off",
    spellcheck: "false", placeholder: "/home/me/photos" });
  const places = element("div", { class: "places" });
  places.hidden = true;
  const use = button("Use", () => begin(input.value), { onError: showError });
  const browse = button("Browse …", async () => {
    places.hidden = !places.hidden;
    if (!places.hidden) await showPlaces(places, input.value, input, begin);
  }, { onError: showError });
  input.onkeydown = (event) => { if (event.key === "Enter") use.click(); };
  const label = element("label", { for: "path", class: "soft" },
    "Images of this machine need not be sent: name their folder or file.");
  return element("div", {}, element("p", { class: "or" }, label),
    element("div", { class: "row" }, input, browse, use), places);
}

async function showPlaces(places, path, input, begin) {
  let found;
  try {
    found = await call(`places?path=${encodeURIComponent(path)}`);
  } catch (problem) {
    if (!path) throw problem;
    found = await call("places?path=");
  }
  const [error, showError] = makeError();
  const join = (name) => found.path.endsWith(found.separator)
    ? found.path + name : found.path + found.separator + name;
  const open = (target) => showPlaces(places, target, input, begin);
  const entry = (text, kind, action) =>
    element("li", { class: kind }, button(text, action, { onError: showError }));
  input.value = found.path;
  const where = element("div", { class: "where" }, element("span", {}, found.path),
    button("Use this folder", () => begin(found.path), { onError: showError }));
  const list = element("ul", {});
  if (found.parent) list.append(entry("↑ up", "folder", () => open(found.parent)));
  for (const name of found.folders)
    list.append(entry(`${name}/`, "folder", () => open(join(name))));
  for (const name of found.files) list.append(entry(name, "file", () => begin(join(name))));
  if (found.more) list.append(element("li", { class: "soft" }, `and ${found.more} more`));
  places.replaceChildren(where, list, error);
}

// Files of what was dropped: [{file, name}], with the folders that they are in.
async function filesOf(transfer) {
  const entries = Array.from(transfer.items, (item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const loose = Array.from(transfer.files, (file) => ({ file, name: file.name }));
  if (!entries.length) return loose;
  const found = [];
  const walk = async (entry, prefix) => {
    const name = prefix + entry.name;
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      found.push({ file, name });
      return;
    }
    const reader = entry.createReader();
    for (;;) { // a browser gives at most 100 entries at once
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) break;
      for (const inner of some) await walk(inner, `${name}/`);
    }
  };
  for (const entry of entries) await walk(entry, "");
  return found;
}

// Sends files in pieces, some at a time, and hands over where they are.
async function upload(all, pieceBytes, zone, begin) {
  const files = all.filter(({ name }) => !IGNORED.test(name));
  if (!files.length) throw new Error("no files were dropped but hidden ones");
  const total = files.reduce((sum, { file }) => sum + file.size, 0);
  const stop = new AbortController();
  const bar = element("progress", { max: "1", value: "0", "aria-label": "sent" });
  const text = element("p", { class: "soft", role: "status" });
  zone.replaceChildren(element("strong", {}, "Sending the images to this machine's server …"), bar,
    text, button("Cancel", () => stop.abort()));
  const { upload: id } = await post("uploads");
  let sent = 0, done = 0, next = 0;
  const show = () => {
    bar.value = total ? sent / total : 1;
    text.textContent = `${count(done, "file")} of ${files.length.toLocaleString("en")}, `
      + `${size(sent)} of ${size(total)}`;
  };
  const sendFile = async ({ file, name }) => {
    for (let offset = 0; offset === 0 || offset < file.size; offset += pieceBytes) {
      const body = file.slice(offset, offset + pieceBytes);
      const headers = { "content-type": "application/octet-stream" };
      const query = `name=${encodeURIComponent(name)}&offset=${offset}`;
      await call(`uploads/${id}?${query}`, { method: "PUT", headers, body, signal: stop.signal });
      sent += body.size;
      show();
    }
    done += 1;
    show();
  };
  const work = async () => { while (next < files.length) await sendFile(files[next++]); };
  show();
  try {
    await Promise.all(Array.from({ length: CONCURRENT }, work));
    const { data } = await post(`uploads/${id}/finish`);
    await begin(data);
  } catch (problem) {
    stop.abort();
    await post(`uploads/${id}/discard`).catch(() => {}); // it may be finished already
    throw problem;
  }
}

export function makeList(state) {
  const items = state.runs.map((run) => {
    const link = element("a", { href: `#/run/${encodeURIComponent(run.name)}` }, run.name);
    const expected = run.expected
      ? `${run.metric === "mAP" ? "mAP " : ""}${figure(run.metric, run.expected.value)} expected`
      : "";
    const about = [when(run.created), placeOf(run) || "started in a terminal"].join(" · ");
    return element("li", {}, link, element("span", { class: "n" }, expected), chip(run),
      element("small", {}, about));
  });
  const heading = element("h2", { id: "runs" }, "Runs");
  const list = items.length ? element("ul", { class: "runs" }, ...items)
    : element("p", { class: "soft" }, "None yet.");
  const title = element("div", { class: "runs-title" }, heading,
    element("small", {}, `in ${state.folder}`));
  return element("section", { class: "card", "aria-labelledby": "runs" }, title, list);
}
