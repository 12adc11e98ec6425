"""Ensembles that combine log probabilities: the logarithmic pool, and shrunk logistic stacking.

Both are small convex problems, solved by Newton's method. They have few parameters on purpose: one
for each member and class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.optimize import nnls
from scipy.special import logsumexp, softmax

from threefold.ensembles.base import Ensemble, check_fitted_on
from threefold.ensembles.cross_fit import stratified_parts
from threefold.ensembles.scaling import HIGHEST
from threefold.ensembles.wide_hessian import WideHessian
from threefold.errors import RecipeError, RunError
from threefold.predictions.checks import FLOOR
from threefold.scratch import RowBlock, class_blocks, take_rows
from threefold.stats.one_standard_error import simplest

if TYPE_CHECKING:
    from torch import Tensor, nn

RIDGES: Final = (1e6, 1e4, 1e3, 100.0, 10.0, 1.0)
"""Candidates of logistic stacking; the first is practically infinite."""

_RIDGE_ROWS: Final = 2000
"""Most rows for the choice of the ridge; with more, the choice no longer matters."""


_DENSE_CLASSES: Final = 100
"""Most classes for a Hessian that is written out; with more, its factors take less time."""


class LogPoolEnsemble(Ensemble):
    """Logarithmic opinion pool, p ~ prod p_i^w_i (Genest & Zidek 1986, section 3).

    Weights `weights_` (m,) are not negative and minimize log loss plus `ridge` * m * sum (w_i -
    mean w)^2, so an infinite ridge makes them equal. Their sum, an inverse temperature, is free
    except for a prior around 1.

    Raises:
        RecipeError: ridge is not above 0.
    """

    _state = ("weights_",)
    weights_: np.ndarray

    def __init__(self, ridge: float = 10.0) -> None:
        _check_ridge(ridge)
        self.ridge = ridge

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        m = len(probs)
        penalty: np.ndarray = self.ridge * (m * np.eye(m) - 1) + 1
        model = _LogLinear(_log_blocks(probs), labels, penalty, np.full(m, 1 / m), positive=True)
        self.weights_ = model.solve(np.full(m, 1 / m))

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        check_fitted_on(len(self.weights_), len(probs), "members")
        return np.asarray(softmax(_sum_of_logs(self.weights_, probs), axis=-1))

    def to_module(self) -> nn.Module:
        """Return the softmax of the weighted sum of log probabilities as a torch module."""
        self._require_fit()
        return _log_linear_module(self.weights_, 0.0, np.zeros(1))


class LogisticEnsemble(Ensemble):
    """Logistic stacking with one weight per member and one bias per class, shrunk toward the mean.

    log p = a log(mean of p_i) + sum w_i log p_i + b, normalized. The penalty on the summed log loss
    is ridge * (m |w|^2 + |b|^2) + (a - 1)^2, so an infinite ridge gives exactly the mean at a
    temperature of its own, with the same classes. The weights and a sum to 1 / HIGHEST or more:
    with few rows, and all of them wrong, a sum below 0 would reverse the classes. The full
    matrix of m k^2 weights (Ting & Witten 1999) has too many parameters for the number of
    out-of-fold rows.

    Args:
        ridge: None = chosen from RIDGES by five-fold cross-validation on up to 2,000 rows: the
            largest within one standard error of the least log loss.

    Attributes:
        weights_: (m + 1,) w, then a.
        bias_: (k,) b.
        ridge_: the ridge that was used.

    Raises:
        RecipeError: ridge is not above 0.
    """

    _state = ("weights_", "bias_")
    weights_: np.ndarray
    bias_: np.ndarray
    ridge_: float

    def __init__(self, ridge: float | None = None) -> None:
        if ridge is not None:
            _check_ridge(ridge)
        self.ridge = ridge

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        m, _, k = probs.shape
        self.ridge_ = self.ridge or self._choose_ridge(probs, labels)
        model = self._model(_log_blocks(probs, with_mean=True), labels, self.ridge_)
        theta = model.solve(_mean_parameters(m, k))
        self.weights_, self.bias_ = theta[: m + 1], theta[m + 1 :]

    def _choose_ridge(self, probs: np.ndarray, labels: np.ndarray) -> float:
        m, _, k = probs.shape
        if len(labels) > _RIDGE_ROWS:
            rows = np.sort(np.random.default_rng(0).permutation(len(labels))[:_RIDGE_ROWS])
            probs, labels = take_rows(probs, rows), labels[rows]
        part = stratified_parts(labels)
        if part.max() == 0:
            return RIDGES[0]
        losses = np.empty((len(RIDGES), len(labels)))
        for value in np.unique(part):
            inside = part == value
            fit_logs = _log_blocks(take_rows(probs, ~inside), with_mean=True)
            score_logs = _log_blocks(take_rows(probs, inside), with_mean=True)
            # Each ridge starts from the solution of the one before.
            theta = _mean_parameters(m, k)
            for row, ridge in enumerate(RIDGES):
                theta = self._model(fit_logs, labels[~inside], ridge).solve(theta, 1e-4)
                losses[row, inside] = self._model(score_logs, labels[inside], ridge).losses(theta)
        return RIDGES[simplest(list(-losses)).chosen]

    @staticmethod
    def _model(logs: list[RowBlock], labels: np.ndarray, ridge: float) -> _LogLinear:
        m, k = len(logs[0].values) - 1, logs[0].values.shape[1]
        penalty = np.r_[np.full(m, m * ridge), 1.0, np.full(k, ridge)]
        return _LogLinear(logs, labels, penalty, _mean_parameters(m, k), bias=True)

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        check_fitted_on(len(self.weights_) - 1, len(probs), "members")
        check_fitted_on(len(self.bias_), probs.shape[2], "classes")
        logs = _sum_of_logs(self.weights_[:-1], probs) + self.bias_
        return np.asarray(
            softmax(logs + self.weights_[-1] * _logs(probs.mean(0, dtype=np.float64)), axis=-1)
        )

    def to_module(self) -> nn.Module:
        """Return the ensemble as a torch module, (b, m, k) to (b, k)."""
        self._require_fit()
        return _log_linear_module(self.weights_[:-1], float(self.weights_[-1]), self.bias_)


class _LogLinear:
    """softmax(sum theta_j x_j + bias) with a quadratic penalty, fitted by Newton's method.

    The objective is the log loss summed over rows plus (theta - center)' penalty (theta - center).

    Args:
        x: features (p, k, r) float32 of each block of rows; rows last, so that sums over classes
            add whole contiguous rows.
        labels: (n,).
        penalty: (q, q) with q = p, or the diagonal (q,) with q = p + k and a bias.
        center: (q,).
        bias: whether the last k parameters are a bias of each class. If so, the others sum
            to at least 1 / HIGHEST.
        positive: whether parameters must not be negative.
    """

    def __init__(
        self,
        x: list[RowBlock],
        labels: np.ndarray,
        penalty: np.ndarray,
        center: np.ndarray,
        bias: bool = False,
        positive: bool = False,
    ) -> None:
        self.x, self.labels, self.penalty, self.center = x, labels, penalty, center
        self.bias, self.positive = bias, positive
        self.p, self.k, _ = x[0].values.shape
        self.n = len(labels)

    def logits(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the logits (k, r) float64 of a block of rows (p, k, r)."""
        flat = theta[: self.p].astype(np.float32) @ x.reshape(self.p, -1)
        logits: np.ndarray = flat.reshape(self.k, -1).astype(np.float64)
        return logits + theta[self.p :, None] if self.bias else logits

    def losses(self, theta: np.ndarray) -> np.ndarray:
        """Return the log loss of each row (n,), without the penalty."""
        losses = np.empty(self.n)
        for rows, x in self.x:
            logits, labels = self.logits(theta, x), self.labels[rows]
            losses[rows] = logsumexp(logits, axis=0) - logits[labels, np.arange(len(labels))]
        return losses

    def value(self, theta: np.ndarray) -> float:
        """Return the objective."""
        deviation = theta - self.center
        is_diagonal = self.penalty.ndim == 1
        pull = deviation * self.penalty if is_diagonal else deviation @ self.penalty
        return float(self.losses(theta).sum() + pull @ deviation)

    def slope_and_hessian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray | WideHessian]:
        """Return the gradient (q,) and Hessian (q, q) of the objective."""
        p, k = self.p, self.k if self.bias else 0
        is_wide = k > _DENSE_CLASSES
        slope, members, mixed = np.zeros(p + k), np.zeros((p, p)), np.zeros((p, k))
        sums, products = np.zeros(k), np.zeros((0, 0) if is_wide else (k, k))
        kept = class_blocks(self.n, (k,), np.float64, p * k) if is_wide else []
        for number, (rows, x) in enumerate(self.x):
            labels = self.labels[rows]
            probs = softmax(self.logits(theta, x), axis=0)
            probs32 = probs.astype(np.float32)
            residual = probs32.copy()
            residual[labels, np.arange(len(labels))] -= 1
            slope[:p] += x.reshape(p, -1) @ residual.reshape(-1)
            roots = np.sqrt(probs32)
            centered = x - np.einsum("jkn,kn->jn", x, probs32)[:, None]
            centered *= roots
            square = centered.reshape(p, -1)
            members += square @ square.T
            if self.bias:
                slope[p:] += residual.sum(1, dtype=np.float64)
                mixed += np.einsum("jkn,kn->jk", centered, roots)
                sums += probs.sum(1)
                if is_wide:
                    kept[number].values[...] = probs
                else:
                    products += probs @ probs.T
        deviation = theta - self.center
        if self.penalty.ndim == 2:
            return slope + 2 * self.penalty @ deviation, members + 2 * self.penalty
        slope += 2 * self.penalty * deviation
        members += np.diag(2 * self.penalty[:p])
        if is_wide:
            return slope, WideHessian(members, mixed, sums + 2 * self.penalty[p:], kept)
        of_bias = np.diag(sums) - products + np.diag(2 * self.penalty[p:])
        return slope, np.block([[members, mixed], [mixed.T, of_bias]])

    def solve(self, theta: np.ndarray, tolerance: float = 1e-5) -> np.ndarray:
        """Minimize the objective to within `tolerance` of log loss per row.

        Args:
            theta: (q,) starting point.
            tolerance: largest remaining gain per row.

        Raises:
            RunError: no convergence after 100 steps.
        """
        value = self.value(theta)
        for _ in range(100):
            slope, hessian = self.slope_and_hessian(theta)
            step = self._newton_target(theta, slope, hessian) - theta
            gain = -slope @ step
            # This close, the full step is safe and squares the distance.
            if gain < tolerance * self.n:
                return np.asarray(theta + step)
            length = 1.0
            while True:
                next_value = self.value(theta + length * step)
                if next_value <= value - 1e-4 * length * gain:
                    break
                length /= 2
                if length < 1e-6:  # Rounding: there is no lower point in this direction.
                    return theta
            theta, value = theta + length * step, next_value
        raise RunError("the members' weights did not converge", fix="raise ridge")

    def _newton_target(
        self, theta: np.ndarray, slope: np.ndarray, hessian: np.ndarray | WideHessian
    ) -> np.ndarray:
        """Minimize the local quadratic model within the bounds of the parameters."""
        if isinstance(hessian, WideHessian):
            return self._within_bounds(theta - hessian.solve(slope), hessian.solve)
        root = np.linalg.cholesky(hessian + 1e-6 * np.diag(np.diag(hessian)))
        target = root.T @ theta - np.linalg.solve(root, slope)
        if self.positive:
            return np.asarray(nnls(root.T, target)[0])
        return self._within_bounds(
            np.linalg.solve(root.T, target),
            lambda total: np.linalg.solve(root.T, np.linalg.solve(root, total)),
        )

    def _within_bounds(
        self, target: np.ndarray, solve: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Return the minimum with members' weights whose sum is not too small.

        Args:
            target: the minimum without bounds.
            solve: divides a vector by the Hessian.
        """
        missing = 1 / HIGHEST - target[: self.p].sum()
        if missing > 0:
            total = np.repeat([1.0, 0.0], [self.p, self.k])
            direction = solve(total)
            target = target + missing / (total @ direction) * direction
        return np.asarray(target)


def _mean_parameters(m: int, k: int) -> np.ndarray:
    """Return the parameters (m + 1 + k,) with which logistic stacking is the mean."""
    theta = np.zeros(m + 1 + k)
    theta[m] = 1
    return theta


def _logs(probs: np.ndarray) -> np.ndarray:
    """Return log(probs) in the same dtype; probabilities below FLOOR count as FLOOR."""
    return np.asarray(np.log(np.maximum(probs, probs.dtype.type(FLOOR))))


def _log_blocks(probs: np.ndarray, with_mean: bool = False) -> list[RowBlock]:
    """Return log probabilities (m, k, r) float32 of blocks of rows of the members (m, n, k).

    With the mean they are (m + 1, k, r), and the last is the log of the members' mean.
    """
    m, n, k = probs.shape
    blocks = class_blocks(n, (m + with_mean, k), np.float32, (m + with_mean) * k)
    for rows, logs in blocks:
        some = probs[:, rows]
        for row, member in enumerate(some):
            logs[row] = _logs(member.T)
        if with_mean:
            logs[m] = _logs(some.mean(0, dtype=np.float64).T)
    return blocks


def _sum_of_logs(weights: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return sum w_i log p_i, (n, k) float64, one member at a time to bound the memory."""
    total = np.zeros(probs.shape[1:])
    for weight, member in zip(weights, probs, strict=True):
        total += weight * _logs(member.astype(np.float64))
    return total


def _log_linear_module(weights: np.ndarray, mean_weight: float, bias: np.ndarray) -> nn.Module:
    """Return a torch module of softmax(sum w_i log p_i + mean_weight log(mean p) + bias)."""
    import torch

    class LogLinear(torch.nn.Module):
        weights: Tensor
        bias: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32)[:, None])
            self.register_buffer("bias", torch.tensor(bias, dtype=torch.float32))

        def forward(self, probs: Tensor) -> Tensor:
            logits = (probs.clamp(min=FLOOR).log() * self.weights).sum(1) + self.bias
            return (logits + mean_weight * probs.mean(1).clamp(min=FLOOR).log()).softmax(-1)

    return LogLinear()


def _check_ridge(ridge: float) -> None:
    if not ridge > 0:
        raise RecipeError("a ridge is above 0", where="ridge", got=ridge)
