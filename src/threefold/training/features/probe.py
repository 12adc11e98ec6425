"""The exact linear head: multinomial logistic regression with an L2 penalty on cached features.

Images with any number of labels have one logistic regression for each label, all with one penalty.

The objective is that of scikit-learn's LogisticRegression with C = 1 / l2: the sum over the rows of
weight times cross-entropy, plus l2 / 2 times the squared norm of the weights, on features that are
standardized by the mean and deviation of the rows. The bias has no penalty. (Of two classes
scikit-learn has one weight vector, and half the penalty.) Standardization is folded into the stored
weight and bias, so the head reads raw features.

With fewer rows than features, the problem is solved in the space that the rows span, where the
penalty is the same (QR decomposition). Products are in float32, sums in float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import softplus

from threefold.models.answers import probabilities
from threefold.tasks import Task
from threefold.training.truth import row_losses, task_of

L2_GRID: Final = tuple(10.0 ** (exponent / 2) for exponent in range(10, -1, -1))
"""Penalties to choose from, the strongest first: 1e5 to 1 in steps of the root of 10."""

FIRST_L2: Final = 1e3
"""The penalty that is tried first: on standardized features the best one is often near it."""

PATIENCE: Final = 2
"""Penalties in a row without a lower loss after which the search in that direction ends; 1 where
some of the rows have told where to begin."""

TOLERANCE: Final = 1e-8
"""Relative decrease of the objective at which L-BFGS stops."""

SEARCH_TOLERANCE: Final = 1e-6
"""The same while penalties are compared, which takes half the steps."""

ITERATIONS: Final = 500
"""Most iterations of L-BFGS for one penalty."""

SEARCH_ROWS: Final = 5_000
"""Rows on which the search begins when there are more than twice as many."""


EVALUATIONS: Final = 300
"""Evaluations of the objective that a head takes on the rows of one fold: the search, and the fits
of the best penalty without and with the select rows. Measured on 200 to 2,400 photographs: 146 to
300."""

TIMED_ROWS: Final = 4_000
"""Most rows on which an evaluation is timed."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What a head learns.

    Attributes:
        labels: (n,) int64, or zeros and ones (n, k) for any number of labels.
        num_classes: classes k.
        weights: (n,) float64, weight of each row; None = 1 each.
        probs: (n, k) probabilities to learn instead of the labels; None = the labels.
    """

    labels: np.ndarray
    num_classes: int
    weights: np.ndarray | None = None
    probs: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Targets:
        """Return the targets of some rows, given by their indices."""
        weights = None if self.weights is None else self.weights[rows]
        probs = None if self.probs is None else self.probs[rows]
        return Targets(self.labels[rows], self.num_classes, weights, probs)


class LinearHead(NamedTuple):
    """A fitted head: logits = features @ weight.T + bias."""

    weight: np.ndarray
    """float32 (k, d)."""
    bias: np.ndarray
    """float32 (k,)."""
    l2: float
    """The penalty it was fitted with."""
    task: Task = "multiclass"
    """What its logits become."""

    def probs(self, features: np.ndarray) -> np.ndarray:
        """Map features (n, d) to probabilities, float32 (n, k)."""
        weight, bias = torch.from_numpy(self.weight), torch.from_numpy(self.bias)
        logits = torch.from_numpy(features).float() @ weight.T + bias
        answers: np.ndarray = probabilities(logits, self.task).numpy()
        return answers


class L2Choice(NamedTuple):
    """The outcome of a search."""

    head: LinearHead
    """Fitted on the fit rows with the best penalty."""
    losses: dict[float, float]
    """Mean log loss on the select rows by penalty, of those that were tried."""


def class_weights(labels: np.ndarray, num_classes: int, power: int = 1) -> np.ndarray:
    """Return row weights (n,) of mean 1 that balance the classes, float64.

    Args:
        labels: (n,) int64.
        num_classes: classes k.
        power: 1 = each class has the same weight together; 0 = each row; 2 = rare classes more.
    """
    counts = np.bincount(labels, minlength=num_classes)[labels]
    weights = (1.0 / counts) ** power
    return np.asarray(weights / weights.mean())


def choose_l2(
    features: np.ndarray,
    targets: Targets,
    select_features: np.ndarray,
    select_labels: np.ndarray,
    select_weights: np.ndarray | None = None,
    grid: Sequence[float] = L2_GRID,
) -> L2Choice:
    """Fit heads with several penalties and choose by the log loss on the select rows.

    The search begins at `FIRST_L2` and goes on to weaker penalties; if none of them is better, it
    goes on to stronger ones. Each fit starts from that of the penalty before. A tie goes to the
    stronger one. Fits are compared at `SEARCH_TOLERANCE`; the best one is then continued to
    `TOLERANCE`. With many rows, `SEARCH_ROWS` of them tell where the search over all rows begins.

    Args:
        features: (n, d) of the fit rows.
        targets: of the fit rows.
        select_features: (m, d).
        select_labels: (m,) int64, or (m, k); the log loss is then the mean over the labels.
        select_weights: (m,) weight of each row in the log loss; None = 1 each.
        grid: penalties, the strongest first.
    """
    start: LinearHead | None = None
    if len(features) > 2 * SEARCH_ROWS:
        some = np.random.default_rng(0).permutation(len(features))[:SEARCH_ROWS]
        start = choose_l2(
            features[some], targets.take(some), select_features, select_labels, select_weights, grid
        ).head
    problem = _Problem(features, targets)
    if start is not None:
        problem.start_from(start)
    search = _PenaltySearch(problem, select_features, select_labels, select_weights)
    first = _nearest(grid, FIRST_L2 if start is None else start.l2)
    patience = PATIENCE if start is None else 1
    search.walk(grid[first:], patience)
    if search.best == grid[first]:
        search.walk(grid[:first][::-1], patience)
    problem.solution = search.solution
    return L2Choice(problem.solve(search.best), search.losses)


def _nearest(grid: Sequence[float], l2: float) -> int:
    """Index of the penalty that is nearest to another, on a logarithmic scale."""
    return int(np.argmin(np.abs(np.log(grid) - np.log(l2))))


def fit_linear(
    features: np.ndarray, targets: Targets, l2: float, start: LinearHead | None = None
) -> LinearHead:
    """Fit a head with one penalty.

    Args:
        features: (n, d).
        targets: of the same rows.
        l2: the penalty, above 0.
        start: a head near the solution, which saves steps; None = zero.
    """
    problem = _Problem(features, targets)
    if start is not None:
        problem.start_from(start)
    return problem.solve(l2)


def fit_penalties(
    features: np.ndarray, targets: Targets, penalties: Sequence[float]
) -> list[LinearHead]:
    """Fit a head with each of several penalties, to compare them: at `SEARCH_TOLERANCE`.

    Args:
        features: (n, d).
        targets: of the same rows.
        penalties: above 0; each fit starts from the one before, so neighbours should be near.
    """
    problem = _Problem(features, targets)
    return [problem.solve(l2, SEARCH_TOLERANCE) for l2 in penalties]


def predict_fit_seconds(features: np.ndarray, num_classes: int, n: int) -> float:
    """Predict how long a head takes on n rows, from a few evaluations of the objective.

    Args:
        features: (m, d) of any rows; they are repeated where m is below n.
        num_classes: classes k.
        n: rows of the fold.
    """
    count = min(n, TIMED_ROWS)
    rows = np.resize(features, (count, features.shape[1]))
    began = time.perf_counter()
    problem = _Problem(rows, Targets(np.arange(count) % num_classes, num_classes))
    setup = time.perf_counter() - began
    times = [problem.time_evaluation() for _ in range(3)]
    return n / count * (setup + EVALUATIONS * min(times))


class _PenaltySearch:
    """The penalties that were tried, and the best of them.

    Attributes:
        losses: mean log loss on the select rows by penalty.
        best: the penalty with the lowest loss.
        solution: of the problem with that penalty.
    """

    def __init__(
        self,
        problem: _Problem,
        features: np.ndarray,
        labels: np.ndarray,
        weights: np.ndarray | None,
    ) -> None:
        self._problem = problem
        self._features, self._labels, self._weights = features, labels, weights
        self.losses: dict[float, float] = {}
        self.best = math.nan
        self.solution = problem.solution

    def walk(self, penalties: Sequence[float], patience: int) -> None:
        """Try penalties in this order, from the best one so far on, while they lower the loss."""
        self._problem.solution = self.solution
        since = 0
        for l2 in penalties:
            loss = self._try(l2)
            since += 1
            if self._is_best(l2, loss):
                self.best, self.solution, since = l2, self._problem.solution, 0
            self.losses[l2] = loss
            if since == patience:
                return

    def _try(self, l2: float) -> float:
        head = self._problem.solve(l2, SEARCH_TOLERANCE)
        probs = head.probs(self._features).astype(np.float64)
        return float(np.average(row_losses(probs, self._labels), weights=self._weights))

    def _is_best(self, l2: float, loss: float) -> bool:
        if not self.losses:
            return True
        lowest = self.losses[self.best]
        return loss < lowest or (loss == lowest and l2 > self.best)


class _Problem:
    """The standardized rows, and the last solution, from which the next one starts."""

    def __init__(self, features: np.ndarray, targets: Targets) -> None:
        # A copy, which is standardized in place: of many images three such tables are gigabytes.
        rows = torch.from_numpy(np.ascontiguousarray(features)).to(torch.float32, copy=True)
        self.n, self.k = len(rows), targets.num_classes
        deviation, self.mean = torch.std_mean(rows, 0, correction=0)
        # A feature that never varies says nothing; of one that hardly does, only noise would grow.
        varies = deviation > 1e-4 * deviation.max()
        self.scale = torch.where(varies, 1.0 / deviation.clamp(min=1e-30), 0.0)
        self.rows = rows.sub_(self.mean).mul_(self.scale)
        self.axes: Tensor | None = None
        if self.n < self.rows.shape[1]:
            self.axes, triangle = torch.linalg.qr(self.rows.T)
            self.rows = triangle.T.contiguous()
        labels = torch.from_numpy(targets.labels)
        self.task = task_of(labels)
        self.targets = labels.float()
        if self.task == "multiclass":
            self.targets = torch.nn.functional.one_hot(labels, self.k).float()
        if targets.probs is not None:
            self.targets = torch.from_numpy(targets.probs).float()
        weights = np.ones(self.n) if targets.weights is None else targets.weights
        self.weights = torch.from_numpy(weights.astype(np.float32))
        self.targets = self.targets.T.contiguous()
        self.solution = np.zeros(self.k * (self.rows.shape[1] + 1))

    def start_from(self, head: LinearHead) -> None:
        """Take a head as the first guess."""
        raw = torch.from_numpy(head.weight).double()
        weight = raw * torch.where(self.scale > 0, 1.0 / self.scale, 0.0)
        bias = torch.from_numpy(head.bias).double() + raw @ self.mean.double()
        if self.axes is not None:
            weight = weight @ self.axes.double()
        self.solution = torch.cat([weight, bias[:, None]], 1).flatten().numpy()

    def solve(self, l2: float, tolerance: float = TOLERANCE) -> LinearHead:
        """Minimize the objective for one penalty, from the last solution on."""
        # The threads of scipy's BLAS and those of torch wait for each other: with both, a fit takes
        # 4 to 30 times as long (measured on two cores).
        with threadpool_limits(1, "blas"):
            result: Any = minimize(
                self._objective,
                self.solution,
                (l2,),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": ITERATIONS, "ftol": tolerance, "gtol": 1e-5},
            )
        self.solution = result.x
        solution = torch.from_numpy(result.x).reshape(self.k, -1)
        weight = solution[:, :-1]
        if self.axes is not None:
            weight = weight @ self.axes.T.double()
        weight = weight * self.scale
        bias = solution[:, -1] - weight @ self.mean.double()
        if self.task == "multiclass":
            # Only differences between classes count; centred, the bias is unique, too.
            bias -= solution[:, -1].mean()
        return LinearHead(weight.float().numpy(), bias.float().numpy(), l2, self.task)

    def time_evaluation(self) -> float:
        """Seconds of one evaluation of the objective."""
        began = time.perf_counter()
        self._objective(self.solution, FIRST_L2)
        return time.perf_counter() - began

    def _objective(self, flat: np.ndarray, l2: float) -> tuple[float, np.ndarray]:
        """Value and gradient, by row, at weights (k, r + 1), whose last column is the bias."""
        weight = torch.from_numpy(flat).float().reshape(self.k, -1)
        # Classes by rows: with few classes this product takes half the time of rows by classes.
        logits = weight[:, :-1] @ self.rows.T + weight[:, -1:]
        if self.task == "multilabel":
            losses = softplus(logits) - self.targets * logits
            value = float((self.weights * losses).double().sum())
            error = self.weights * (logits.sigmoid() - self.targets)
        else:
            log_probs = logits.log_softmax(0)
            value = -float((self.weights * self.targets * log_probs).double().sum())
            error = self.weights * (log_probs.exp() - self.targets)
        gradient = torch.empty_like(weight)
        gradient[:, :-1] = error @ self.rows + l2 * weight[:, :-1]
        gradient[:, -1] = error.sum(1)
        value += 0.5 * l2 * float((weight[:, :-1].double() ** 2).sum())
        return value / self.n, (gradient.double() / self.n).flatten().numpy()
