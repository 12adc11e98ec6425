"""Ensembles that average probabilities: plain, pruned, voting, and with learned weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Self

import numpy as np
from scipy.optimize import minimize

from threefold.ensembles.base import Ensemble, LinearEnsemble
from threefold.errors import RecipeError, RunError
from threefold.predictions.checks import FLOOR
from threefold.scratch import class_blocks, converted, row_blocks, top_classes
from threefold.stats.weighted_scores import merit

if TYPE_CHECKING:
    from torch import Tensor, nn


class MeanEnsemble(Ensemble):
    """Average of the members' probabilities (the paper's AVG-Softmax)."""

    needs_fit = False

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(probs.mean(0, dtype=np.float64))

    def to_module(self) -> nn.Module:
        """Return the mean over the members' axis as a torch module."""
        from torch import nn

        class Mean(nn.Module):
            def forward(self, probs: Tensor) -> Tensor:
                return probs.mean(1)

        return Mean()


class PrunedEnsemble(Ensemble):
    """Softmax pruning (the paper's EXT-Softmax, Algorithm 2).

    Keeps the `keep` largest values of each member, sets the rest to zero and averages. Ties keep
    the first class. The average is normalized to sum to 1, which changes no answer. Keeping all
    classes gives the mean.

    Raises:
        RecipeError: keep is below 1.
    """

    needs_fit = False
    _state = ("keep",)

    def __init__(self, keep: int = 1) -> None:
        if keep < 1:
            raise RecipeError(
                "a pruned ensemble keeps at least one value",
                where="keep",
                expected="1 or more",
                got=keep,
            )
        self.keep = keep

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """Restore an ensemble from its `state`."""
        ensemble = super().from_state(state)
        ensemble.keep = int(ensemble.keep)
        return ensemble

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        pruned = np.where(_largest(probs, self.keep), probs, 0).sum(0, dtype=np.float64)
        return np.asarray(pruned / pruned.sum(-1, keepdims=True))

    def to_module(self) -> nn.Module:
        """Return the ensemble as a torch module.

        It finds the largest values by repeated argmax, which breaks ties the same way in numpy,
        torch and ONNX; top-k does not.
        """
        return _pruning_module(self.keep, values=True)


class VoteEnsemble(Ensemble):
    """Share of the members whose top class a class is.

    This is EXT-Softmax as the authors coded it for CIFAR and SVHN. Ties go to the first class,
    within a member and between classes.
    """

    needs_fit = False

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(_largest(probs, 1).mean(0, dtype=np.float64))

    def to_module(self) -> nn.Module:
        """Return the mean of the members' one-hot top classes as a torch module."""
        return _pruning_module(1, values=False)


def _largest(probs: np.ndarray, keep: int) -> np.ndarray:
    """Return a mask of the `keep` largest values of the last axis, the first ones on ties."""
    mask = np.zeros(probs.shape, dtype=bool)
    for _ in range(min(keep, probs.shape[-1])):
        first = np.where(mask, -1, probs).argmax(-1)
        np.put_along_axis(mask, first[..., None], True, -1)
    return mask


def _pruning_module(keep: int, values: bool) -> nn.Module:
    """Return a torch module (b, m, k) to (b, k) that averages the `keep` largest values.

    Without `values` each of them counts as one.
    """
    import torch

    class Pruning(torch.nn.Module):
        def forward(self, probs: Tensor) -> Tensor:
            classes = torch.arange(probs.shape[-1], device=probs.device)
            mask = torch.zeros_like(probs, dtype=torch.bool)
            for _ in range(min(keep, probs.shape[-1])):
                mask = mask | (classes == torch.where(mask, -1.0, probs).argmax(-1, keepdim=True))
            pruned = torch.where(mask, probs if values else 1.0, 0.0).sum(1)
            return pruned / pruned.sum(-1, keepdim=True)

    return Pruning()


class BestEnsemble(LinearEnsemble):
    """The single member with the best metric on the fit rows; ties go to lower log loss."""

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        ranks = _ranks(probs, labels)
        if self.metric != "accuracy":
            merits = [merit(self.metric, converted(p, np.float64), labels) for p in probs]
            ranks = [(first, rank[1]) for first, rank in zip(merits, ranks, strict=True)]
        self.weights_ = np.eye(len(probs))[ranks.index(max(ranks))]


class WeightedEnsemble(LinearEnsemble):
    """Weights on the simplex that minimize log loss, shrunk toward equal weights.

    The penalty is `ridge` * |w - 1/m|^2 against the summed log loss. That is a Gaussian prior of
    standard deviation 1 / sqrt(2 * ridge) on each weight: it decides when rows are few and vanishes
    when they are many.
    """

    def __init__(self, ridge: float = 100.0) -> None:
        self.ridge = ridge

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        m, n, _ = probs.shape
        hits = probs[:, np.arange(n), labels].astype(np.float64)

        def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
            mixed, deviation = weights @ hits + FLOOR, weights - 1 / m
            value = -np.log(mixed).sum() + self.ridge * deviation @ deviation
            slope = -(hits / mixed).sum(1) + 2 * self.ridge * deviation
            return value / n, slope / n

        solution = minimize(
            loss,
            np.full(m, 1 / m),
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * m,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-10, "maxiter": 500},
        )
        if not solution.success:
            raise RunError(
                "the members' weights did not converge", got=solution.message, fix="raise ridge"
            )
        weights = np.clip(solution.x, 0, None)
        self.weights_ = weights / weights.sum()


class GreedyEnsemble(LinearEnsemble):
    """Greedy selection with replacement by accuracy, then log loss (Caruana et al. 2004, ICML).

    The fit keeps the best prefix of the sequence of picks, so that a long sequence does no harm on
    the fit rows. Two measures work against overfitting (sections 2.2 and 2.3 of the reference): the
    sequence starts with the best few members together, and the selection is repeated on random
    halves of the members and averaged.

    Args:
        max_members: most picks in each repetition; 3 with `start` 1 and `bags` 0 is a top three.
        start: start with up to this many of the most accurate members, as many as do best together.
        bags: repetitions, each on a random half of the members; 0 = once, on all members.
        seed: seed of the halves.

    Raises:
        RecipeError: max_members or start is below 1, or bags is below 0.
    """

    def __init__(
        self, max_members: int = 25, *, start: int = 1, bags: int = 0, seed: int = 0
    ) -> None:
        for name, value, minimum in (
            ("max_members", max_members, 1),
            ("start", start, 1),
            ("bags", bags, 0),
        ):
            if value < minimum:
                raise RecipeError(
                    "a greedy ensemble cannot be made",
                    where=name,
                    expected=f"{minimum} or more",
                    got=value,
                )
        self.max_members = max_members
        self.start = start
        self.bags = bags
        self.seed = seed

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        m = len(probs)
        if not self.bags:
            self.weights_ = self._pick(probs, labels, np.arange(m))
            return
        rng = np.random.default_rng(self.seed)
        halves = [rng.permutation(m)[: -(-m // 2)] for _ in range(self.bags)]
        self.weights_ = np.mean(
            [self._pick(probs, labels, np.sort(half)) for half in halves], axis=0
        )

    def _pick(self, probs: np.ndarray, labels: np.ndarray, pool: np.ndarray) -> np.ndarray:
        """Return the weights (m,) of the best sequence of picks among the members `pool`."""
        n = probs.shape[1]
        hits = probs[:, np.arange(n), labels].astype(np.float64)
        ranks = _ranks([probs[i] for i in pool], labels)
        order = sorted(range(len(pool)), key=ranks.__getitem__, reverse=True)
        picks = [int(pool[i]) for i in order[: min(self.start, self.max_members)]]
        scores = [
            _rank_of_sum(probs, picks[:size], hits, labels) for size in range(1, len(picks) + 1)
        ]
        start = scores.index(max(scores)) + 1
        picks, scores = picks[:start], scores[:start]
        search = _GreedySearch(probs, labels, hits, picks)
        for size in range(start + 1, self.max_members + 1):
            pick, score = search.next_pick(size, pool)
            picks.append(pick)
            scores.append(score)
        size = scores.index(max(scores)) + 1
        return np.asarray(np.bincount(picks[:size], minlength=len(probs)) / size)


class _GreedySearch:
    """The sum of the picks so far, and the member that does best added to it.

    Works on blocks of rows with the classes first, where maxima over classes are many times faster.

    Args:
        probs: (m, n, k).
        labels: (n,).
        hits: (m, n) probabilities of the right classes.
        picks: the first picks.
    """

    def __init__(
        self, probs: np.ndarray, labels: np.ndarray, hits: np.ndarray, picks: list[int]
    ) -> None:
        m, n, k = probs.shape
        self.labels, self.hits = labels, hits
        self.members = class_blocks(n, (m, k), probs.dtype, m * k)
        self.totals = class_blocks(n, (k,), np.float64, m * k)
        # The tiny slope breaks ties in favor of the first class.
        slope = 1e-12 * np.arange(k)[:, None]
        for (rows, members), (_, total) in zip(self.members, self.totals, strict=True):
            members[...] = probs[:, rows].swapaxes(1, 2)
            total[...] = members[picks].sum(0, dtype=np.float64) - slope

    def next_pick(self, size: int, pool: np.ndarray) -> tuple[int, tuple[float, float]]:
        """Add the member of `pool` that does best; return it and the rank of the sum.

        One more member moves two classes toward each other by 1 at most, so rows with a wider
        margin keep their class and need no trial.

        Args:
            size: number of picks with the new one.
            pool: numbers of the members to try.
        """
        correct = dict.fromkeys(map(int, pool), 0)
        right_class = np.empty(len(self.labels))
        for (rows, members), (_, total) in zip(self.members, self.totals, strict=True):
            labels, first = self.labels[rows], total.max(0)
            second = np.where(total == first, -1.0, total).max(0)
            own = right_class[rows] = total[labels, np.arange(len(labels))]
            is_open = first - second < 1.001
            settled = int((own >= first)[~is_open].sum())
            open_rows = np.flatnonzero(is_open)
            open_total, open_labels = total[:, open_rows], labels[open_rows]
            at = np.arange(len(open_rows))
            for i in correct:
                trial = open_total + members[i][:, open_rows]
                correct[i] += settled + int((trial[open_labels, at] >= trial.max(0)).sum())
        most = max(correct.values())
        likelihood = {
            i: _log_likelihood((right_class + self.hits[i]) / size)
            for i, count in correct.items()
            if count == most
        }
        pick = max(likelihood, key=likelihood.__getitem__)
        for (_, members), (_, total) in zip(self.members, self.totals, strict=True):
            total += members[pick]
        return pick, (most / len(self.labels), likelihood[pick])


def _rank_of_sum(
    probs: np.ndarray, picks: list[int], hits: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """Return the rank of the sum of `picks`; arguments as of `_GreedySearch`."""
    right = np.empty(len(labels), bool)
    for rows in row_blocks(len(labels), len(picks) * probs.shape[2]):
        total = probs[picks, rows].sum(0, dtype=np.float64)
        right[rows] = total.argmax(-1) == labels[rows]
    return float(right.mean()), _log_likelihood(hits[picks].mean(0))


def _rank(probs: np.ndarray, hits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return accuracy, then mean log likelihood; `hits` (n,) are the right classes' values."""
    return float((top_classes(probs) == labels).mean()), _log_likelihood(hits)


def _ranks(probs: Iterable[np.ndarray], labels: np.ndarray) -> list[tuple[float, float]]:
    return [_rank(member, member[np.arange(len(labels)), labels], labels) for member in probs]


def _log_likelihood(hits: np.ndarray) -> float:
    return float(np.log(np.maximum(hits, FLOOR)).mean(dtype=np.float64))
