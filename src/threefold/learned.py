"""Ensembles that average probabilities with learned weights: the best member, weights on the simplex, greedy picks."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from threefold.combiners import LinearEnsemble
from threefold.errors import RecipeError, RunError
from threefold.predictions__checks import FLOOR


class BestEnsemble(LinearEnsemble):
    """The single member with the highest accuracy on the rows of the fit; ties go to the lower log loss."""

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        self.weights_ = np.eye(len(probs))[
            max(range(len(probs)), key=_ranks(probs, labels).__getitem__)
        ]


class WeightedEnsemble(LinearEnsemble):
    """Weights on the simplex that minimise log loss, shrunk toward equal weights.

    The penalty is `ridge` * |w - 1/m|^2 against the summed log loss, a Gaussian prior of standard deviation
    1 / sqrt(2 * ridge) on each weight: it decides where rows are few and vanishes where they are many.
    """

    def __init__(self, ridge: float = 100.0) -> None:
        self.ridge = ridge

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        m, n, _ = probs.shape
        hits = probs[:, np.arange(n), labels].astype(np.float64)

        def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
            mixed, away = weights @ hits + FLOOR, weights - 1 / m
            value = -np.log(mixed).sum() + self.ridge * away @ away
            slope = -(hits / mixed).sum(1) + 2 * self.ridge * away
            return value / n, slope / n

        found = minimize(
            loss,
            np.full(m, 1 / m),
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * m,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-10, "maxiter": 500},
        )
        if not found.success:
            raise RunError(
                "the members' weights did not converge", got=found.message, fix="raise ridge"
            )
        weights = np.clip(found.x, 0, None)
        self.weights_ = weights / weights.sum()


class GreedyEnsemble(LinearEnsemble):
    """Members picked one at a time, with replacement, for accuracy, then log loss (Caruana et al. 2004, ICML).

    The best beginning of the sequence is kept, so a long one does no harm on the rows of the fit. Against overfitting
    (their sections 2.2 and 2.3): the sequence starts with the best few members at once, and the picking is repeated on
    random halves of the members and averaged.

    Args:
        max_members: picks at most (in each repetition); 3 with `start` 1 and `bags` 0 is a top three.
        start: begin with the best one to `start` members by their own accuracy, as many as do best together.
        bags: repetitions, each on a random half of the members; 0 = once, on all of them.
        seed: of the halves.

    Raises:
        RecipeError: max_members or start is below 1, or bags below 0.
    """

    def __init__(
        self, max_members: int = 25, *, start: int = 1, bags: int = 0, seed: int = 0
    ) -> None:
        for name, value, least in (
            ("max_members", max_members, 1),
            ("start", start, 1),
            ("bags", bags, 0),
        ):
            if value < least:
                raise RecipeError(
                    "a greedy ensemble cannot be made",
                    where=name,
                    expected=f"{least} or more",
                    got=value,
                )
        self.max_members, self.start, self.bags, self.seed = max_members, start, bags, seed

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        m = len(probs)
        if not self.bags:
            self.weights_ = self._picked(probs, labels, np.arange(m))
            return
        draw = np.random.default_rng(self.seed)
        halves = [draw.permutation(m)[: -(-m // 2)] for _ in range(self.bags)]
        self.weights_ = np.mean(
            [self._picked(probs, labels, np.sort(half)) for half in halves], axis=0
        )

    def _picked(self, probs: np.ndarray, labels: np.ndarray, pool: np.ndarray) -> np.ndarray:
        """Weights (m,) of the best sequence of picks among the members `pool`."""
        n, k = probs.shape[1:]
        hits = probs[:, np.arange(n), labels].astype(np.float64)
        ranks = _ranks(probs[pool], labels)
        best = sorted(range(len(pool)), key=ranks.__getitem__, reverse=True)
        picks = [int(pool[i]) for i in best[: min(self.start, self.max_members)]]
        scores = [
            _rank(probs[picks[:size]].sum(0, dtype=np.float64), hits[picks[:size]].mean(0), labels)
            for size in range(1, len(picks) + 1)
        ]
        keep = max(range(len(scores)), key=scores.__getitem__) + 1
        picks, scores = picks[:keep], scores[:keep]
        turned = np.ascontiguousarray(
            probs.swapaxes(1, 2)
        )  # classes first: maxima over them are many times faster
        total = (
            turned[picks].sum(0, dtype=np.float64) - 1e-12 * np.arange(k)[:, None]
        )  # ties go to the first class
        for size in range(keep + 1, self.max_members + 1):
            pick, score = _next_pick(total, size, turned, hits, labels, pool)
            total += turned[pick]
            picks.append(pick)
            scores.append(score)
        size = max(range(len(scores)), key=scores.__getitem__) + 1
        return np.asarray(np.bincount(picks[:size], minlength=len(probs)) / size)


def _next_pick(
    total: np.ndarray,
    size: int,
    turned: np.ndarray,
    hits: np.ndarray,
    labels: np.ndarray,
    pool: np.ndarray,
) -> tuple[int, tuple[float, float]]:
    """The member that does best added to `total`, (k, n) summed probabilities, and how well; `turned` is (m, k, n).

    One more member moves two classes by 1 at most toward each other: rows with a wider margin stand as they are.
    """
    rows, first = np.arange(len(labels)), total.max(0)
    second = np.where(total == first, -1.0, total).max(0)
    had, is_open = total[labels, rows], first - second < 1.001
    settled = int((had >= first)[~is_open].sum())
    part, truth, within = total[:, is_open], labels[is_open], np.arange(int(is_open.sum()))
    right = {}
    for i in map(int, pool):
        trial = part + turned[i][:, is_open]
        right[i] = settled + int((trial[truth, within] >= trial.max(0)).sum())
    most = max(right.values())
    likelihood = {
        i: _likelihood((had + hits[i]) / size) for i, count in right.items() if count == most
    }
    pick = max(likelihood, key=likelihood.__getitem__)
    return pick, (most / len(labels), likelihood[pick])


def _rank(probs: np.ndarray, hits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy, then mean log likelihood of `hits` (n,), the probabilities of the right classes."""
    return float((probs.argmax(-1) == labels).mean()), _likelihood(hits)


def _ranks(probs: np.ndarray, labels: np.ndarray) -> list[tuple[float, float]]:
    """The rank of each member."""
    return [_rank(member, member[np.arange(len(labels)), labels], labels) for member in probs]


def _likelihood(hits: np.ndarray) -> float:
    return float(np.log(np.maximum(hits, FLOOR)).mean(dtype=np.float64))
