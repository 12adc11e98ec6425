// Prediction sets and the unknown mark from probabilities and the model card, as threefold's conformal.py computes them.

const PENALTY = 0.01, FREE = 5; // of `raps`

export const byProbability = (probs) => Array.from(probs.keys()).sort((a, b) => probs[b] - probs[a]); // stable: ties stay in order

function scores(probs, order, method) {
  if (method === "lac") return Array.from(probs, (p) => 1 - p);
  const found = new Array(probs.length);
  let sum = 0;
  order.forEach((c, rank) => {
    sum += probs[c];
    found[c] = method === "raps" ? sum + PENALTY * Math.max(rank + 1 - FREE, 0) : sum;
  });
  return found;
}

// Class numbers in the set, the likeliest first.
export function setOf(probs, { method, by_class, never_empty, thresholds }) {
  if (!["lac", "aps", "raps"].includes(method)) throw new Error(`the card has sets of an unknown method: ${method}`);
  const order = byProbability(probs), score = scores(probs, order, method);
  const inside = (c) => { const limit = thresholds[by_class ? c : 0]; return limit === null || score[c] <= limit; };
  return order.filter((c, rank) => inside(c) || (never_empty && rank === 0));
}

// Whether the model is less sure than of nearly all images of a class.
export const isUnknown = (probs, { threshold }) => threshold !== null && 1 - Math.max(...probs) > threshold;
