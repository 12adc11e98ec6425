"""Temperature and vector scaling of probabilities (n, k): fit, apply, torch modules, plain values.

Guo et al. 2017, "On calibration of modern neural networks", section 4.2. torch is imported only to
make a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from threefold.errors import DataError
from threefold.predictions.checks import FLOOR, check_labels, check_probs
from threefold.scratch import row_blocks, scratch

if TYPE_CHECKING:
    from torch import Tensor, nn

LOWEST: Final = 0.05
"""Smallest temperature that a fit returns."""

HIGHEST: Final = 20.0
"""Largest temperature that a fit returns."""

SHRINKAGE: Final = 10.0
"""Strength of the shrinkage of vector scaling toward temperature scaling, in rows per class."""

SMALLEST_SCALE: Final = 1e-3
"""Smallest scale of a class, relative to 1 / temperature; 0 or below would reverse a class."""

_NEWTON_CLASSES: Final = 200
"""Most classes for Newton's method in vector scaling, whose Hessian is (2k, 2k); else L-BFGS-B."""

_FLOAT32_SIZE: Final = 100_000
"""Number of probabilities above which a temperature is fitted in float32.

The mean derivative over so many rows is as exact in float32, and faster.
"""


class VectorScaling(NamedTuple):
    """Scale and bias of each class, both (k,): softmax(scale * log(probs) + bias)."""

    scale: np.ndarray
    bias: np.ndarray


class _TemperatureFit(NamedTuple):
    """Result of Newton's method.

    Attributes:
        inverse_temperature: the minimum.
        point: the last point at which derivatives were computed.
        slopes, curvatures: (n,) derivatives of each row's log loss there.
    """

    inverse_temperature: float
    point: float
    slopes: np.ndarray
    curvatures: np.ndarray


def fit_temperature(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Fit the temperature T in 0.05..20 that minimizes the log loss of softmax(log(probs) / T).

    Args:
        probs: (n, k).
        labels: (n,).

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array = check_probs(probs, 2)
    truth = check_labels(labels, *array.shape)
    return float(1 / _fit_inverse_temperature(_logs_by_class(array), truth).inverse_temperature)


def fit_temperatures(
    probs: npt.ArrayLike, labels: npt.ArrayLike, part: np.ndarray
) -> tuple[float, dict[Any, float]]:
    """Fit a temperature on all rows, and one for each part on the rows outside it.

    This takes a third of the time of separate fits. Newton's method converges quadratically:
    starting from the fit on all rows, whose derivatives are known row by row, two steps reach the
    minimum without a part. If they do not, that minimum is fitted separately.

    Args:
        probs: (n, k).
        labels: (n,).
        part: (n,) the part of each row, at least two.

    Returns:
        The temperature of all rows, and by part the temperature of the rows outside it.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array = check_probs(probs, 2)
    truth = check_labels(labels, *array.shape)
    logs = _logs_by_class(array)
    fit = _fit_inverse_temperature(logs, truth)
    temperatures = {}
    for value in np.unique(part):
        rest = part != value
        inverse_temperature = _refine(fit, logs, truth, rest)
        if inverse_temperature is None:
            inverse_temperature = _fit_inverse_temperature(logs, truth, rest).inverse_temperature
        temperatures[value] = float(1 / inverse_temperature)
    return float(1 / fit.inverse_temperature), temperatures


def _refine(
    fit: _TemperatureFit, logs: np.ndarray, labels: np.ndarray, rest: np.ndarray
) -> float | None:
    """Take two Newton steps from `fit` toward the minimum on the rows `rest`, booleans (n,).

    Returns None if the steps are too long to trust.
    """
    step = _newton_step(fit.slopes[rest], fit.curvatures[rest])
    if not abs(step) < 0.1 * fit.point:
        return None
    inverse_temperature = fit.point - step
    step = _newton_step(*_derivatives(logs, labels, inverse_temperature, rest))
    if not abs(step) < 0.1 * inverse_temperature:
        return None
    inverse_temperature -= step
    return inverse_temperature if abs(step) < 1e-3 * inverse_temperature else None


def _logs_by_class(probs: np.ndarray) -> np.ndarray:
    """Return floored logs (k, n), shifted so that the largest of each row is 0.

    With the classes first, sums over classes are sums of whole contiguous rows.
    """
    is_large = probs.size > _FLOAT32_SIZE
    logs = scratch(probs.shape[::-1], np.float32 if is_large else np.float64)
    for rows in row_blocks(*probs.shape):
        block = floored_logs(probs[rows]).T
        logs[:, rows] = block - block.max(0)
    return logs


def _derivatives(
    logs: np.ndarray,
    labels: np.ndarray,
    inverse_temperature: float,
    among: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return slope and curvature (n,) of each row's log loss, which is convex in 1 / T.

    With `among`, booleans (n,), only those of these rows.
    """
    slopes, curvatures = [], []
    for rows in row_blocks(len(labels), len(logs)):
        part, own_labels = logs[:, rows], labels[rows]
        if among is not None:
            part, own_labels = part[:, among[rows]], own_labels[among[rows]]
        p = np.exp(logs.dtype.type(inverse_temperature) * part)
        total = p.sum(0)
        p *= part
        first = p.sum(0) / total
        p *= part
        slopes.append(first - part[own_labels, np.arange(len(own_labels))])
        curvatures.append(p.sum(0) / total - first**2)
    return np.concatenate(slopes, dtype=np.float64), np.concatenate(curvatures, dtype=np.float64)


def _newton_step(slopes: np.ndarray, curvatures: np.ndarray) -> float:
    """Return Newton's step from the rows' derivatives; infinite without curvature."""
    curvature = float(curvatures.mean())
    return float(slopes.mean()) / curvature if curvature > 0 else np.inf


def _fit_inverse_temperature(
    logs: np.ndarray, labels: np.ndarray, among: np.ndarray | None = None
) -> _TemperatureFit:
    """Minimize the log loss by Newton's method, with bisection as a safeguard.

    Arguments as of `_derivatives`.
    """
    low, high, inverse_temperature = 1 / HIGHEST, 1 / LOWEST, 1.0
    for _ in range(100):
        slopes, curvatures = _derivatives(logs, labels, inverse_temperature, among)
        slope = float(slopes.mean())
        point = inverse_temperature
        # The slope is also exactly 0 if every row is uniform, and no temperature matters.
        if slope == 0:
            break
        low, high = (low, point) if slope > 0 else (point, high)
        newton = point - _newton_step(slopes, curvatures)
        inside = low < newton < high
        inverse_temperature = newton if inside else (low * high) ** 0.5
        # The error after a Newton step is about the square of the step.
        if abs(inverse_temperature / point - 1) < (1e-5 if inside else 1e-8):
            break
    return _TemperatureFit(inverse_temperature, point=point, slopes=slopes, curvatures=curvatures)


def apply_temperature(probs: npt.ArrayLike, temperature: float) -> np.ndarray:
    """Return softmax(log(probs) / temperature), (n, k) float64.

    Probabilities below FLOOR count as FLOOR.

    Raises:
        DataError: probabilities are not usable, or the temperature is not above 0.
    """
    _check_temperature(temperature)
    return scaled_softmax(check_probs(probs, 2), lambda logs, _: logs / temperature)


def scaled_softmax(
    probs: np.ndarray, scale: Callable[[np.ndarray, slice], np.ndarray]
) -> np.ndarray:
    """Return softmax(scale(log(probs), rows)) of each block of rows, together (n, k) float64."""
    answers = scratch(probs.shape)
    for rows in row_blocks(*probs.shape):
        answers[rows] = softmax(scale(floored_logs(probs[rows]), rows), axis=-1)
    return answers


def temperature_module(temperature: float) -> nn.Module:
    """Return `apply_temperature` as a torch module, (b, k) to (b, k).

    Raises:
        DataError: the temperature is not above 0.
    """
    import torch

    _check_temperature(temperature)

    class Temperature(torch.nn.Module):
        def forward(self, probs: Tensor) -> Tensor:
            return (probs.clamp(min=FLOOR).log() / temperature).softmax(-1)

    return Temperature()


def fit_vector(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    shrinkage: float = SHRINKAGE,
    temperature: float | None = None,
) -> VectorScaling:
    """Fit the scale and bias of each class that minimize the log loss, shrunk toward temperature.

    The penalty on the summed log loss is shrinkage / 2 * sum(bias ** 2 + (scale * T - 1) ** 2):
    a class with few rows stays near the temperature, and with a large shrinkage all do. The problem
    is convex, so the result does not depend on a start. Scales stay above 0.

    Args:
        probs: (n, k).
        labels: (n,).
        shrinkage: strength of the penalty, in rows per class.
        temperature: T in the penalty; None = `fit_temperature`.

    Raises:
        DataError: probabilities or labels are not usable, or the shrinkage or the temperature is
            not above 0.
    """
    array = check_probs(probs, 2)
    n, k = array.shape
    truth = check_labels(labels, n, k)
    if not 0 < shrinkage < np.inf:
        raise DataError("the shrinkage of vector scaling is a number above 0", got=shrinkage)
    if temperature is None:
        temperature = fit_temperature(array, truth)
    _check_temperature(temperature)
    z = scratch((n, k))
    for rows in row_blocks(n, k):
        z[rows] = floored_logs(array[rows]) / temperature
    solution = minimize_newton(z, truth, shrinkage) if k <= _NEWTON_CLASSES else None
    if solution is None or solution[0].min() < SMALLEST_SCALE:
        solution = minimize_bounded(z, truth, shrinkage)
    return VectorScaling(solution[0] / temperature, solution[1])


def minimize_newton(z: np.ndarray, labels: np.ndarray, shrinkage: float) -> np.ndarray | None:
    """Fit vector scaling by Newton's method with step halving, without bounds on the scales.

    Args:
        z: (n, k) log probabilities divided by the temperature.
        labels: (n,).
        shrinkage: strength of the penalty.

    Returns:
        Scale and bias (2, k), or None if the method does not converge.
    """
    n, k = z.shape
    counts = np.bincount(labels, minlength=k)
    sums = np.bincount(labels, z[np.arange(n), labels], k)
    center, diagonal = np.repeat([1.0, 0.0], k), np.arange(k)

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        p, total, own = scratch((n, k)), np.empty(n), np.empty(n)
        for rows in row_blocks(n, k):
            logits = x[:k] * z[rows] + x[k:]
            logits -= logits.max(1, keepdims=True)
            own[rows] = logits[np.arange(len(logits)), labels[rows]]
            exps = np.exp(logits)
            total[rows] = exps.sum(1)
            p[rows] = exps / total[rows, None]
        loss = np.log(total).sum() - own.sum()
        return float(loss + shrinkage / 2 * ((x - center) ** 2).sum()), p

    def derivatives(x: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        columns, hessian = np.zeros(2 * k), shrinkage * np.eye(2 * k)
        for rows in row_blocks(n, k):
            wide = np.concatenate([p[rows] * z[rows], p[rows]], 1)
            total = wide.sum(0)
            columns += total
            hessian -= wide.T @ wide
            hessian[diagonal, diagonal] += (wide[:, :k] * z[rows]).sum(0)
            hessian[diagonal + k, diagonal + k] += total[k:]
            hessian[diagonal, diagonal + k] += total[:k]
            hessian[diagonal + k, diagonal] += total[:k]
        return columns - np.concatenate([sums, counts]) + shrinkage * (x - center), hessian

    x = center.copy()
    loss, p = evaluate(x)
    for _ in range(50):
        slope, hessian = derivatives(x, p)
        try:
            step = cho_solve(cho_factor(hessian), slope)
        except LinAlgError:
            return None
        gain, length = float(slope @ step), 1.0
        if gain < 1e-9 * n:
            return np.asarray((x - step).reshape(2, k))
        while True:
            next_loss, next_p = evaluate(x - length * step)
            if next_loss <= loss - 1e-4 * length * gain:
                break
            length /= 2
            if length < 1e-6:
                return None
        x, loss, p = x - length * step, next_loss, next_p
    return None


def minimize_bounded(z: np.ndarray, labels: np.ndarray, shrinkage: float) -> np.ndarray:
    """Fit vector scaling by L-BFGS-B with scales of at least SMALLEST_SCALE.

    Its memory grows with k instead of k squared. Arguments and result as in `minimize_newton`.
    """
    n, k = z.shape

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scale, bias = parameters.reshape(2, k)
        value = shrinkage / 2 * (bias @ bias + (scale - 1) @ (scale - 1))
        slope = shrinkage * np.concatenate([scale - 1, bias])
        for rows in row_blocks(n, k):
            logs, own = log_softmax(scale * z[rows] + bias, axis=-1), labels[rows]
            error = np.exp(logs)
            error[np.arange(len(own)), own] -= 1
            value -= logs[np.arange(len(own)), own].sum()
            slope += np.concatenate([(error * z[rows]).sum(0), error.sum(0)])
        return value / n, slope / n

    start = np.concatenate([np.ones(k), np.zeros(k)])
    bounds = [(SMALLEST_SCALE, None)] * k + [(None, None)] * k
    solution = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return np.asarray(solution.x.reshape(2, k))


def apply_vector(probs: npt.ArrayLike, scaling: VectorScaling) -> np.ndarray:
    """Return softmax(scale * log(probs) + bias), (n, k) float64.

    Probabilities below FLOOR count as FLOOR.

    Raises:
        DataError: probabilities are not usable, or have another number of classes than the scaling.
    """
    array = check_probs(probs, 2)
    scale, bias = _check_scaling(scaling)
    if len(scale) != array.shape[1]:
        raise DataError(
            "the scaling is for other classes", expected=f"{len(scale)} classes", got=array.shape[1]
        )
    return scaled_softmax(array, lambda logs, _: logs * scale + bias)


def vector_module(scaling: VectorScaling) -> nn.Module:
    """Return `apply_vector` as a torch module, (b, k) to (b, k); scale and bias are buffers.

    Raises:
        DataError: the scaling is not usable.
    """
    import torch

    scale, bias = _check_scaling(scaling)

    class Vector(torch.nn.Module):
        scale: Tensor
        bias: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
            self.register_buffer("bias", torch.tensor(bias, dtype=torch.float32))

        def forward(self, probs: Tensor) -> Tensor:
            return (probs.clamp(min=FLOOR).log() * self.scale + self.bias).softmax(-1)

    return Vector()


def scaling_state(scaling: VectorScaling) -> dict[str, list[float]]:
    """Return scale and bias as plain lists, for JSON and npz.

    Raises:
        DataError: the scaling is not usable.
    """
    scale, bias = _check_scaling(scaling)
    return {"scale": scale.tolist(), "bias": bias.tolist()}


def scaling_from_state(state: Mapping[str, Any]) -> VectorScaling:
    """Restore a scaling from its `scaling_state`, lists or arrays.

    Raises:
        DataError: a part is missing or not a list of finite numbers.
    """
    try:
        return VectorScaling(*_check_scaling(VectorScaling(state["scale"], state["bias"])))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "not the state of a scaling", got=f"{type(error).__name__} {error}"
        ) from None


def as_scaling(temperature: float, k: int) -> VectorScaling:
    """Return a temperature for k classes as a scaling.

    Raises:
        DataError: the temperature is not above 0.
    """
    _check_temperature(temperature)
    return VectorScaling(np.full(k, 1 / temperature), np.zeros(k))


def floored_logs(probs: np.ndarray) -> np.ndarray:
    """Return log(probs) in float64, any shape; probabilities below FLOOR count as FLOOR."""
    return np.asarray(np.log(np.maximum(probs.astype(np.float64), FLOOR)))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise DataError("a temperature is above 0", got=temperature)


def _check_scaling(scaling: VectorScaling) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and bias as float64."""
    scale, bias = (np.asarray(part, dtype=np.float64) for part in scaling)
    finite = (np.isfinite(scale) & np.isfinite(bias)).all() if scale.shape == bias.shape else False
    if scale.ndim != 1 or not finite:
        raise DataError(
            "a scaling is two lists of finite numbers, one each per class",
            got=(scale.shape, bias.shape),
        )
    return scale, bias
