"""Ensembles that combine logarithms: the logarithmic pool, and logistic stacking shrunk toward the mean.

Both are small convex problems, solved by Newton's method; parameters are few on purpose, one for each member and class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.optimize import nnls
from scipy.special import logsumexp, softmax

from threefold.combiners import Ensemble, check_fitted_on
from threefold.crossfit import stratified_parts
from threefold.errors import RecipeError, RunError
from threefold.predictions__checks import FLOOR

if TYPE_CHECKING:
    from torch import Tensor, nn

RIDGES: Final = (1e6, 1e4, 1e3, 100.0, 10.0, 1.0)
"""What logistic stacking chooses from; the first is as good as infinite."""

_ROWS: Final = 2000
"""Rows on which logistic stacking chooses its ridge: with more, the choice no longer matters."""


class LogPoolEnsemble(Ensemble):
    """Weighted geometric mean, p ~ prod p_i^w_i: the logarithmic opinion pool (Genest & Zidek 1986, section 3).

    Weights `weights_` (m,) are not negative and minimise log loss plus `ridge` * m * sum (w_i - mean w)^2: an infinite
    ridge is the pool of equals. Their sum, an inverse temperature, is free but for a prior around 1.

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
        apart = self.ridge * (m * np.eye(m) - 1)
        model = _LogLinear(
            _logs(probs.swapaxes(1, 2)), labels, apart + 1, np.full(m, 1 / m), positive=True
        )
        self.weights_ = model.solve(np.full(m, 1 / m))

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        check_fitted_on(len(self.weights_), len(probs), "members")
        return np.asarray(softmax(_sum_of_logs(self.weights_, probs), axis=-1))

    def to_module(self) -> nn.Module:
        """Softmax of the weighted sum of logarithms."""
        self._require_fit()
        return _log_linear_module(self.weights_, 0.0, np.zeros(1))


class LogisticEnsemble(Ensemble):
    """Logistic stacking with one weight per member and one bias per class, shrunk toward the mean.

    log p = a log(mean of p_i) + sum w_i log p_i + b, normalised. The penalty against the summed log loss is
    ridge * (m |w|^2 + |b|^2) + (a - 1)^2, so an infinite ridge is exactly the mean at a temperature of its own, with the
    mean's answers. The full matrix of m k^2 weights (Ting & Witten 1999) has too many for the rows that are left over.

    Args:
        ridge: None = chosen from RIDGES by five-part cross-validation on 2,000 rows at most: the
            strongest within one standard error of the least log loss.

    Attributes:
        weights_: (m + 1,): w, then a.
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
        logs = _with_mean(probs)
        self.ridge_ = self.ridge or self._chosen_ridge(logs, labels)
        found = self._model(logs, labels, self.ridge_).solve(_start(m, k))
        self.weights_, self.bias_ = found[: m + 1], found[m + 1 :]

    def _chosen_ridge(self, logs: np.ndarray, labels: np.ndarray) -> float:
        if len(labels) > _ROWS:
            rows = np.sort(np.random.default_rng(0).permutation(len(labels))[:_ROWS])
            logs, labels = logs[..., rows], labels[rows]
        part, ridges = stratified_parts(labels), RIDGES
        if part.max() == 0:
            return ridges[0]
        losses = np.empty((len(ridges), len(labels)))
        for value in np.unique(part):
            held, theta = part == value, _start(len(logs) - 1, logs.shape[1])
            rest, asked = (
                np.ascontiguousarray(logs[..., ~held]),
                np.ascontiguousarray(logs[..., held]),
            )
            for row, ridge in enumerate(ridges):
                theta = self._model(rest, labels[~held], ridge).solve(theta, 1e-4)
                losses[row, held] = self._model(asked, labels[held], ridge).losses(theta)
        away = losses - losses[losses.mean(1).argmin()]
        within = away.mean(1) <= away.std(1) / len(labels) ** 0.5
        return ridges[int(within.argmax())]

    @staticmethod
    def _model(logs: np.ndarray, labels: np.ndarray, ridge: float) -> _LogLinear:
        m, k = len(logs) - 1, logs.shape[1]
        penalty = np.diag(np.r_[np.full(m, m * ridge), 1.0, np.full(k, ridge)])
        return _LogLinear(logs, labels, penalty, _start(m, k), bias=True)

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        check_fitted_on(len(self.weights_) - 1, len(probs), "members")
        check_fitted_on(len(self.bias_), probs.shape[2], "classes")
        logs = _sum_of_logs(self.weights_[:-1], probs) + self.bias_
        return np.asarray(
            softmax(logs + self.weights_[-1] * _logs(probs.mean(0, dtype=np.float64)), axis=-1)
        )

    def to_module(self) -> nn.Module:
        """Softmax of the weighted sum of logarithms, that of the mean among them, plus the bias."""
        self._require_fit()
        return _log_linear_module(self.weights_[:-1], float(self.weights_[-1]), self.bias_)


class _LogLinear:
    """softmax(sum theta_j x_j + bias) with a quadratic penalty around `centre`, fitted by Newton's method.

    Args:
        x: (p, k, n) features; rows last, so that sums over classes take whole rows at a time.
        labels: (n,).
        penalty: (q, q), q = p, or p + k with a bias; the loss is summed over rows plus (theta - centre)' penalty (..).
        centre: (q,).
        bias: whether the last k parameters are added to the classes.
        positive: whether parameters must not be negative.
    """

    def __init__(
        self,
        x: np.ndarray,
        labels: np.ndarray,
        penalty: np.ndarray,
        centre: np.ndarray,
        bias: bool = False,
        positive: bool = False,
    ) -> None:
        self.x = np.ascontiguousarray(
            x, dtype=np.float32
        )  # a slice over rows is not: every reshape would copy it
        self.labels, self.penalty, self.centre = labels, penalty, centre
        self.bias, self.positive = bias, positive
        self.p, self.k, self.n = x.shape

    def logits(self, theta: np.ndarray) -> np.ndarray:
        """(k, n) float64."""
        flat = theta[: self.p].astype(np.float32) @ self.x.reshape(self.p, -1)
        logits = flat.reshape(self.k, self.n).astype(np.float64)
        return logits + theta[self.p :, None] if self.bias else logits

    def losses(self, theta: np.ndarray) -> np.ndarray:
        """Log loss of each row (n,), without the penalty."""
        logits = self.logits(theta)
        return np.asarray(logsumexp(logits, axis=0) - logits[self.labels, np.arange(self.n)])

    def value(self, theta: np.ndarray) -> float:
        """What is minimised."""
        away = theta - self.centre
        return float(self.losses(theta).sum() + away @ self.penalty @ away)

    def slope_and_curvature(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient (q,) and Hessian (q, q) of `value`."""
        probs = softmax(self.logits(theta), axis=0)
        short = probs.astype(np.float32)
        residual = short.copy()
        residual[self.labels, np.arange(self.n)] -= 1
        flat = self.x.reshape(self.p, -1)
        slope = (flat @ residual.reshape(-1)).astype(np.float64)
        roots, centred = np.sqrt(short), self.x - np.einsum("jkn,kn->jn", self.x, short)[:, None]
        centred *= roots
        square = centred.reshape(self.p, -1)
        curvature = (square @ square.T).astype(np.float64)
        if self.bias:
            slope = np.r_[slope, residual.sum(1, dtype=np.float64)]
            mixed = np.einsum("jkn,kn->jk", centred, roots)
            curvature = np.block(
                [[curvature, mixed], [mixed.T, np.diag(probs.sum(1)) - probs @ probs.T]]
            )
        return slope + 2 * self.penalty @ (theta - self.centre), curvature + 2 * self.penalty

    def solve(self, theta: np.ndarray, tolerance: float = 1e-5) -> np.ndarray:
        """The minimum to within `tolerance` in log loss per row, from a starting point.

        Raises:
            RunError: no minimum after 100 steps.
        """
        value = self.value(theta)
        for _ in range(100):
            slope, curvature = self.slope_and_curvature(theta)
            step = self._target(theta, slope, curvature) - theta
            gain = -slope @ step
            if (
                gain < tolerance * self.n
            ):  # so near that the whole step is safe, and squares the distance
                return np.asarray(theta + step)
            length = 1.0
            while (new := self.value(theta + length * step)) > value - 1e-4 * length * gain:
                length /= 2
                if length < 1e-6:
                    return theta  # rounding: nothing lower lies that way
            theta, value = theta + length * step, new
        raise RunError("the members' weights did not converge", fix="raise ridge")

    def _target(self, theta: np.ndarray, slope: np.ndarray, curvature: np.ndarray) -> np.ndarray:
        """Minimum of the quadratic through this point, among parameters that are not negative where they must not be."""
        root = np.linalg.cholesky(curvature + 1e-6 * np.diag(np.diag(curvature)))
        aim = root.T @ theta - np.linalg.solve(root, slope)
        return np.asarray(nnls(root.T, aim)[0] if self.positive else np.linalg.solve(root.T, aim))


def _start(m: int, k: int) -> np.ndarray:
    """Parameters of logistic stacking (m + 1 + k,) that are the mean."""
    return np.asarray(np.eye(m + 1 + k)[m])


def _logs(probs: np.ndarray) -> np.ndarray:
    """Logarithms, of the same dtype; FLOOR stands for less."""
    return np.asarray(np.log(np.maximum(probs, probs.dtype.type(FLOOR))))


def _with_mean(probs: np.ndarray) -> np.ndarray:
    """Logarithms (m + 1, k, n) float32 of the members (m, n, k) and of their mean."""
    m, n, k = probs.shape
    logs = np.empty((m + 1, k, n), np.float32)
    for row, member in enumerate([*probs, probs.mean(0, dtype=np.float64)]):
        logs[row] = _logs(member.T)
    return logs


def _sum_of_logs(weights: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """sum w_i log p_i, (n, k) float64, a member at a time to bound the memory."""
    total = np.zeros(probs.shape[1:])
    for weight, member in zip(weights, probs, strict=True):
        total += weight * _logs(member.astype(np.float64))
    return total


def _log_linear_module(weights: np.ndarray, of_mean: float, bias: np.ndarray) -> nn.Module:
    """(b, m, k) to (b, k): softmax(sum w_i log p_i + of_mean log(mean p) + bias)."""
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
            return (logits + of_mean * probs.mean(1).clamp(min=FLOOR).log()).softmax(-1)

    return LogLinear()


def _check_ridge(ridge: float) -> None:
    if not ridge > 0:
        raise RecipeError("a ridge is above 0", where="ridge", got=ridge)
