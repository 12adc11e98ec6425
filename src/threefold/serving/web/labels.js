// Shows the answer of a model that gives an image any number of labels.

import { element, makeBar, percent, share } from "./parts.js";

// The answer of a model that gives an image any number of labels: those whose bars reach their marks.
export function describeLabels(prediction) {
  const given = new Set(prediction.labels.map(({ label }) => label));
  const others = prediction.top.filter(({ label }) => !given.has(label));
  const entries = [...prediction.labels, ...others];
  const bars = entries.map(({ label, probability, threshold }) => {
    const bar = makeBar(label, probability);
    const mark = element("span", { class: "mark" });
    mark.style.left = share(threshold);
    bar.prepend(element("span", { class: "track" }, bar.firstChild, mark));
    bar.lastChild.append(element("small", {}, ` / ${percent(threshold)}`));
    if (!given.has(label)) bar.className = "below";
    return bar;
  });
  const text = "Probability / threshold. An image has the labels whose bars reach their marks.";
  return [
    element("h2", {}, prediction.labels.map(({ label }) => label).join(", ") || "No label"),
    element("ul", { class: "shares labels", "aria-label": "Probabilities of the ensemble" },
      ...bars),
    element("p", { class: "soft legend" }, text),
    describeMemberLabels(prediction.members, entries),
  ];
}

// What each member says of the same labels: a row for each label, a column for each member.
function describeMemberLabels(members, entries) {
  const names = Object.keys(members);
  const heads = names.map((name) => element("th", { scope: "col", class: "n" }, name));
  const rows = entries.map(({ label }) => element("tr", {},
    element("th", { scope: "row" }, label),
    ...names.map((name) => element("td", { class: "n" }, percent(members[name][label])))));
  const table = element("table", { class: "members" },
    element("caption", {}, "Members, without calibration"),
    element("thead", {}, element("tr", {}, element("td"), ...heads)),
    element("tbody", {}, ...rows));
  return element("div", { class: "wide" }, table);
}

// The labels that can be explained: those of the answer, or the most probable one of no label.
export function explainedLabels({ label, labels, top }) {
  if (!labels) return [label];
  return (labels.length ? labels : top.slice(0, 1)).map((entry) => entry.label);
}
