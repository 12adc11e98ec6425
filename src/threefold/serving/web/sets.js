// Prediction sets and the flag for unknown images, from probabilities and the model card, as
// ensembles/conformal.py computes them.

const PENALTY = 0.01, FREE_RANKS = 5; // of the method raps

// Class indices, the most probable first; the sort is stable, so ties stay in order.
export const byProbability = (probs) =>
  Array.from(probs.keys()).sort((a, b) => probs[b] - probs[a]);

function scoresOf(probs, order, method) {
  if (method === "lac") return Array.from(probs, (p) => 1 - p);
  const scores = new Array(probs.length);
  let sum = 0;
  order.forEach((c, rank) => {
    sum += probs[c];
    scores[c] = method === "raps" ? sum + PENALTY * Math.max(rank + 1 - FREE_RANKS, 0) : sum;
  });
  return scores;
}

// Class indices in the set, the most probable first.
export function setOf(probs, { method, by_class, never_empty, thresholds }) {
  if (!["lac", "aps", "raps"].includes(method))
    throw new Error(`the model card has prediction sets of an unknown method: ${method}`);
  const order = byProbability(probs), scores = scoresOf(probs, order, method);
  const isInside = (c) => {
    const threshold = thresholds[by_class ? c : 0];
    return threshold === null || scores[c] <= threshold;
  };
  return order.filter((c, rank) => isInside(c) || (never_empty && rank === 0));
}

// Whether the model is less sure than of nearly all images of the known classes.
export const isUnknown = (probs, { threshold }) =>
  threshold !== null && 1 - Math.max(...probs) > threshold;
