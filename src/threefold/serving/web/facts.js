// What a model card says, as text.

import { percent } from "./parts.js";

const MAX_CLASSES_SHOWN = 60;

export const setsOf = ({ conformal }) =>
  (conformal ?? []).find((entry) => entry?.state?.by_class === false);
export const target = ({ state }) => `${Number((100 * (1 - state.alpha)).toFixed(2))}\u00a0%`;

// What a score measures: the accuracy, or what its key `metric` says.
export const metricOf = ({ metric }) => (metric ?? "accuracy").replaceAll("_", " ");

export function scoreOf({ accuracy, value, interval }) {
  const number = percent(accuracy ?? value);
  if (!interval) return number;
  return `${number} (${percent(interval[0])} to ${percent(interval[1])})`;
}

const capitalized = (text) => text[0].toUpperCase() + text.slice(1);

// Rows of the model card as text; rows without a value are not shown.
export function factsOf(card) {
  const { score, unknown, parity, versions } = card;
  const sets = setsOf(card);
  const facts = {};
  if (score) {
    const level = score.level ? `${100 * score.level} % interval` : "interval";
    facts[capitalized(metricOf(score))] = `${scoreOf(score)}, ${level}`;
    if (score.macro_f1 !== undefined)
      facts["F1 at the thresholds"] =
        `${percent(score.macro_f1)} macro, ${percent(score.micro_f1)} micro`;
    facts["Scored on"] = `${score.n} rows, ${score.rows}; fitted on ${score.fitted_on}`;
    facts["Protocol"] = score.protocol;
    if (score.protocol === "paper") facts["Protocol"] += ": selected on the reported rows";
  }
  facts["Method"] = card.method;
  facts["Members"] = membersOf(card);
  facts[card.thresholds ? "Labels" : "Classes"] = classesOf(card);
  if (card.n_train !== undefined) facts["Training images"] = String(card.n_train);
  if (typeof card.temperature === "number")
    facts["Temperature"] = card.temperature.toPrecision(3);
  if (sets)
    facts["Prediction sets"] = `target coverage ${target(sets)}; measured `
      + `${percent(sets.coverage)} on ${sets.n} rows (${sets.rows}), `
      + `${Number(sets.mean_size).toFixed(2)} classes on average`;
  if (unknown)
    facts["Unknown images"] = `flags ${percent(unknown.rate)} of the images of known classes; `
      + `measured ${percent(unknown.measured)}`;
  if (parity)
    facts["Export parity"] = `largest difference ${Number(parity.max_difference).toExponential(1)} `
      + `on ${parity.images} images`;
  facts["Runs on"] = card.runtime;
  if (versions)
    facts["Versions"] = Object.entries(versions).map((pair) => pair.join(" ")).join(", ");
  if (typeof card.digest === "string") facts["Recipe digest"] = card.digest.slice(0, 12);
  return facts;
}

function classesOf({ classes, thresholds }) {
  const names = classes.slice(0, MAX_CLASSES_SHOWN).map((name, i) =>
    (thresholds ? `${name} (from ${percent(thresholds[i])})` : name));
  const more = classes.length - names.length;
  return names.join(", ") + (more > 0 ? ` … and ${more} more` : "");
}

function membersOf({ members, backbones }) {
  if (backbones?.length !== members.length) return members.join(", ");
  return members.map((name, i) => (backbones[i] ? `${name} (${backbones[i]})` : name)).join(", ");
}
