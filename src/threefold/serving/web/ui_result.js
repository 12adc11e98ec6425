// The end of a run: what to expect of its model, its scores, its files, and a box to try it.

import { call, element, figure, makeError, percent, runPath } from "./ui_common.js";

const SHOWN = 8;
const ROWS = { oof: "out of fold", test: "test" };

const HEADLINES = {
  accuracy: "of new images are expected to be right",
  mAP: "mean average precision is expected on new images",
};

export function makeResult(run, tryBox) {
  const { expected, metric } = run;
  const parts = [];
  if (expected) {
    const [low, high] = expected.interval;
    parts.push(
      element("p", { class: "headline-number", id: "expected" }, figure(metric, expected.value)),
      element("p", { class: "lead" }, `${HEADLINES[metric]} (95 % interval `
        + `${figure(metric, low)} to ${figure(metric, high)}), measured on `
        + `${expected.n.toLocaleString("en")} ${expected.basis}.`));
  }
  if (run.pending)
    parts.push(element("p", { class: "note" }, "This is a first answer, of heads on frozen "
      + "networks; tuned networks may improve it."));
  parts.push(makeButtons(run), makeScores(run));
  if (run.notes?.length)
    parts.push(element("details", { "data-keep": "findings" },
      element("summary", {}, `What the scores cannot say (${run.notes.length})`),
      element("ul", { class: "notes" }, ...run.notes.map((text) => element("li", {}, text)))));
  if (run.files.includes("model.onnx"))
    parts.push(element("h3", {}, "Try the model"), tryBox);
  return parts;
}

function makeButtons(run) {
  const box = element("div", { class: "buttons" });
  if (run.files.includes("report.html"))
    box.append(element("a", { class: "button primary", href: runPath(run.name, "/report.html"),
      target: "_blank", rel: "noopener" }, "Open the report"));
  if (run.files.includes("model.onnx"))
    box.append(element("a", { class: "button", href: runPath(run.name, "/model.onnx"),
      download: "" }, "Download model.onnx"));
  return box;
}

function makeScores(run) {
  if (!run.scores?.length) return "";
  const head = ["", "rows", run.metric, "95 % interval", "log loss"];
  const rows = run.scores.slice(0, SHOWN).map((score) => {
    const [low, high] = score.interval;
    const name = score.kind === "ensemble" ? `${score.name} of the members` : score.name;
    const cells = [`${ROWS[score.rows] ?? score.rows} ${score.n.toLocaleString("en")}`,
      figure(run.metric, score.value),
      `${figure(run.metric, low)} – ${figure(run.metric, high)}`, score.log_loss.toFixed(3)];
    const row = element("tr", {}, element("th", { scope: "row" }, name),
      ...cells.map((text, i) => element("td", { class: i ? "n" : "" }, text)));
    if (score.chosen) {
      row.className = "chosen";
      row.firstChild.append(" ", element("span", { class: "chip good" }, "chosen"));
    }
    return row;
  });
  const more = run.scores.length - rows.length;
  const body = [element("div", { class: "scroll" },
    element("table", { class: "plain numbers" },
      element("thead", {}, element("tr", {}, ...head.map((text, i) =>
        element("th", { scope: "col", class: i > 1 ? "n" : "" }, text)))),
      element("tbody", {}, ...rows)))];
  if (more > 0) body.push(element("p", { class: "path" }, `and ${more} more in the report`));
  return element("div", {}, ...body);
}

// A box to drop an image on; it stays the same while the rest of the page is drawn again.
export function makeTryBox(name) {
  const [error, showError] = makeError();
  const answer = element("div", { "aria-live": "polite" });
  const input = element("input", { type: "file", accept: "image/*,.tif,.tiff", id: "pick-image",
    tabindex: "-1", "aria-label": "An image to try" });
  const choose = element("button", { type: "button" }, "Choose an image …");
  choose.onclick = () => input.click();
  const show = async (file) => {
    showError("");
    answer.replaceChildren(element("p", { class: "soft wait" }, "asking the model …"));
    const form = new FormData();
    form.append("files", file, file.name || "image");
    try {
      const path = `try/${encodeURIComponent(name)}/predict?top=5`;
      const { answers } = await call(path, { method: "POST", body: form });
      answer.replaceChildren(describe(answers[0], file));
    } catch (problem) {
      answer.replaceChildren();
      showError(problem.message);
    }
  };
  input.onchange = () => { if (input.files[0]) show(input.files[0]); input.value = ""; };
  const zone = element("div", { class: "dropzone" },
    element("span", {}, "Drop an image here, or paste one"),
    element("div", { class: "buttons" }, choose, input,
      element("a", { href: `try/${encodeURIComponent(name)}/`, target: "_blank",
        rel: "noopener" }, "many images, and why")));
  const box = element("div", { class: "try" }, zone, error, answer);
  box.receive = async (transfer) => { if (transfer.files[0]) await show(transfer.files[0]); };
  return box;
}

function describe(prediction, file) {
  const image = element("img", { alt: `preview of ${file.name || "the image"}` });
  const picture = element("div", { class: "picture" }, image);
  const url = URL.createObjectURL(file);
  image.onload = () => URL.revokeObjectURL(url);
  image.onerror = () => picture.replaceChildren(element("span", {}, "no preview"));
  image.src = url;
  const bars = prediction.top.map(({ label, probability }) => {
    const fill = element("span", { class: "fill" });
    fill.style.width = `${100 * probability}%`;
    return element("li", {}, fill, element("span", {}, label),
      element("span", { class: "n" }, percent(probability)));
  });
  const labels = prediction.labels?.map(({ label }) => label).join(", ") || "No label";
  const body = element("div", {},
    element("strong", { id: "prediction" }, prediction.label ?? labels));
  if (prediction.unknown)
    body.append(element("p", { class: "note" },
      "This image is unlike those the model was trained on."));
  body.append(element("ul", { class: "shares" }, ...bars));
  if (prediction.set)
    body.append(element("p", { class: "set" }, element("span", { class: "soft" },
      "Prediction set:"), ...prediction.set.map((label) => element("b", {}, label))));
  return element("div", { class: "answer-box" }, picture, body);
}
