"""Temperature and vector scaling of probabilities (n, k): fitted, applied, as a torch module, and as plain values.

Guo et al. 2017, "On calibration of modern neural networks", section 4.2. Imports no torch until a module is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax

from threefold.errors import DataError
from threefold.predictions__checks import FLOOR, check_labels, check_probs

if TYPE_CHECKING:
    from torch import Tensor, nn

LOWEST: Final = 0.05
"""Smallest temperature that is fitted."""

HIGHEST: Final = 20.0
"""Largest temperature that is fitted."""

SHRINKAGE: Final = 10.0
"""Weight of the pull of vector scaling towards temperature scaling, in rows for each class."""

_FEWEST: Final = 1e-3
"""Smallest scale of a class, as a share of the temperature's: a scale of 0 or below would turn a class around."""

_NEWTON_CLASSES: Final = 200
"""Most classes for Newton's steps in vector scaling, whose matrix has the side 2 k; more take L-BFGS-B."""


class VectorScaling(NamedTuple):
    """Scale and bias of each class, both (k,): softmax(scale * log(probs) + bias)."""

    scale: np.ndarray
    bias: np.ndarray


_MANY: Final = 100_000
"""Probabilities from which on derivatives are taken in float32: their mean over so many rows is as exact, and sooner there."""


def fit_temperature(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """The T in 0.05..20 that minimises the log loss of softmax(log(probs) / T) (Guo et al. 2017); probs (n, k).

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array = check_probs(probs, 2)
    truth = check_labels(labels, *array.shape)

    return float(1 / _heat(_logs_by_class(array), truth)[0])


def fit_temperatures(
    probs: npt.ArrayLike, labels: npt.ArrayLike, part: np.ndarray
) -> tuple[float, dict[Any, float]]:
    """`fit_temperature` on all rows, and for each part on the rows outside it, in a third of the time of single fits (docs/LOG.md).

    Newton's method converges quadratically: from the last point of the fit on all rows, whose derivatives are known row by
    row, two steps reach the minimum of each part's rest; where they do not, that is fitted by itself.

    Args:
        probs: (n, k).
        labels: (n,).
        part: (n,) the part of each row, two at least.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array = check_probs(probs, 2)
    truth = check_labels(labels, *array.shape)
    logs = _logs_by_class(array)
    heat, near, rise, bend = _heat(logs, truth)
    apart = {}
    for value in np.unique(part):
        rest = part != value
        some, own, found = logs[:, rest], truth[rest], near
        for step in range(2):
            by_row = (rise[rest], bend[rest]) if step == 0 else _slopes(some, own, found)
            away = _step(*by_row)
            if not abs(away) < 0.1 * found:
                break
            found -= away
        else:
            if abs(away) < 1e-3 * found:
                apart[value] = float(1 / found)
                continue
        apart[value] = float(1 / _heat(some, own)[0])
    return float(1 / heat), apart


def _logs_by_class(probs: np.ndarray) -> np.ndarray:
    """Floored logs (k, n), the largest of each row 0: with the classes first, sums over them take whole rows at a time."""
    logs = np.ascontiguousarray(floored_logs(probs).T)
    logs -= logs.max(0)
    return logs.astype(np.float32) if logs.size > _MANY else logs


def _slopes(logs: np.ndarray, truth: np.ndarray, heat: float) -> tuple[np.ndarray, np.ndarray]:
    """First and second derivative (n,) of each row's log loss by 1 / T, in which it is convex; logs (k, n)."""
    p = np.exp(logs.dtype.type(heat) * logs)
    total = p.sum(0)
    p *= logs
    first = p.sum(0) / total
    p *= logs
    rise, bend = first - logs[truth, np.arange(len(truth))], p.sum(0) / total - first**2
    return rise.astype(np.float64), bend.astype(np.float64)


def _step(rise: np.ndarray, bend: np.ndarray) -> float:
    """Newton's step from the rows' derivatives; infinite where there is no bend."""
    curve = float(bend.mean())
    return float(rise.mean()) / curve if curve > 0 else np.inf


def _heat(logs: np.ndarray, truth: np.ndarray) -> tuple[float, float, np.ndarray, np.ndarray]:
    """The best 1 / T, the last point at which derivatives were taken, and these, row by row."""
    low, high, heat = 1 / HIGHEST, 1 / LOWEST, 1.0
    for _ in range(100):
        rise, bend = _slopes(logs, truth, heat)
        slope = float(rise.mean())
        last = heat
        if slope == 0:  # also where every row is uniform, and no temperature matters
            break
        low, high = (low, heat) if slope > 0 else (heat, high)
        step = heat - _step(rise, bend)
        newton = low < step < high
        heat = step if newton else (low * high) ** 0.5
        if abs(heat / last - 1) < (
            1e-5 if newton else 1e-8
        ):  # a Newton step this small leaves its square
            break
    return heat, last, rise, bend


def apply_temperature(probs: npt.ArrayLike, temperature: float) -> np.ndarray:
    """softmax(log(probs) / temperature), (n, k) float64; probabilities below FLOOR count as FLOOR.

    Raises:
        DataError: probabilities are not usable, or the temperature is not above 0.
    """
    _check_temperature(temperature)
    return np.asarray(softmax(floored_logs(check_probs(probs, 2)) / temperature, axis=-1))


def TemperatureModule(temperature: float) -> nn.Module:
    """`apply_temperature` as a torch module, (b, k) to (b, k); a function, so that importing this needs no torch.

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
    """Scale and bias of each class that minimise the log loss (vector scaling, Guo et al. 2017), pulled to temperature.

    The penalty is shrinkage / 2 * sum(bias ** 2 + (scale * T - 1) ** 2) on the summed log loss, with T from
    `fit_temperature` (or as given): a class with few rows stays near the temperature, and with a large shrinkage all do.
    The problem is convex, so the result does not depend on a start. Scales stay above 0.

    Raises:
        DataError: probabilities or labels are not usable, or the shrinkage or the temperature is not above 0.
    """
    array = check_probs(probs, 2)
    n, k = array.shape
    truth = check_labels(labels, n, k)
    if not 0 < shrinkage < np.inf:
        raise DataError("the shrinkage of vector scaling is a number above 0", got=shrinkage)
    if temperature is None:
        temperature = fit_temperature(array, truth)
    _check_temperature(temperature)
    z = floored_logs(array) / temperature
    found = _newton(z, truth, shrinkage) if k <= _NEWTON_CLASSES else None
    if found is None or found[0].min() < _FEWEST:
        found = _bounded(z, truth, shrinkage)
    return VectorScaling(found[0] / temperature, found[1])


def _newton(z: np.ndarray, truth: np.ndarray, shrinkage: float) -> np.ndarray | None:
    """Scale and bias (2, k) by Newton's steps, each of them halved until the loss falls; None where they do not end."""
    n, k = z.shape
    counts, sums = np.bincount(truth, minlength=k), np.bincount(truth, z[np.arange(n), truth], k)
    pull, places = np.repeat([1.0, 0.0], k), np.arange(k)

    def look(x: np.ndarray) -> tuple[float, np.ndarray]:
        logits = x[:k] * z + x[k:]
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(1, keepdims=True)
        p /= total
        value = np.log(total).sum() - logits[np.arange(n), truth].sum()
        return float(value + shrinkage / 2 * ((x - pull) ** 2).sum()), p

    x = pull.copy()
    value, p = look(x)
    for _ in range(50):
        wide = np.concatenate([p * z, p], 1)
        slope = wide.sum(0) - np.concatenate([sums, counts]) + shrinkage * (x - pull)
        curve = -(wide.T @ wide) + shrinkage * np.eye(2 * k)
        curve[places, places] += (wide[:, :k] * z).sum(0)
        curve[places + k, places + k] += wide[:, k:].sum(0)
        curve[places, places + k] += wide[:, :k].sum(0)
        curve[places + k, places] += wide[:, :k].sum(0)
        try:
            step = cho_solve(cho_factor(curve), slope)
        except LinAlgError:
            return None
        gain, share = float(slope @ step), 1.0
        if gain < 1e-9 * n:
            return np.asarray((x - step).reshape(2, k))
        while True:
            lower, next_p = look(x - share * step)
            if lower <= value - 1e-4 * share * gain:
                break
            share /= 2
            if share < 1e-6:
                return None
        x, value, p = x - share * step, lower, next_p
    return None


def _bounded(z: np.ndarray, truth: np.ndarray, shrinkage: float) -> np.ndarray:
    """Scale and bias (2, k) with scales kept above 0, in memory that grows with k, not k squared."""
    n, k = z.shape

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scale, bias = parameters.reshape(2, k)
        logs = log_softmax(scale * z + bias, axis=-1)
        error = np.exp(logs)
        error[np.arange(n), truth] -= 1
        value = -logs[np.arange(n), truth].sum() + shrinkage / 2 * (
            bias @ bias + (scale - 1) @ (scale - 1)
        )
        slope = np.concatenate(
            [(error * z).sum(0) + shrinkage * (scale - 1), error.sum(0) + shrinkage * bias]
        )
        return value / n, slope / n

    start = np.concatenate([np.ones(k), np.zeros(k)])
    bounds = [(_FEWEST, None)] * k + [(None, None)] * k
    return np.asarray(
        minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x.reshape(2, k)
    )


def apply_vector(probs: npt.ArrayLike, scaling: VectorScaling) -> np.ndarray:
    """softmax(scale * log(probs) + bias), (n, k) float64; probabilities below FLOOR count as FLOOR.

    Raises:
        DataError: probabilities are not usable, or of another number of classes than the scaling.
    """
    array = check_probs(probs, 2)
    scale, bias = _check_scaling(scaling)
    if len(scale) != array.shape[1]:
        raise DataError(
            "the scaling is of other classes", expected=f"{len(scale)} classes", got=array.shape[1]
        )
    return np.asarray(softmax(floored_logs(array) * scale + bias, axis=-1))


def VectorModule(scaling: VectorScaling) -> nn.Module:
    """`apply_vector` as a torch module, (b, k) to (b, k); scale and bias are buffers.

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
    """Scale and bias as plain lists, for JSON and npz; see `scaling_from_state`.

    Raises:
        DataError: the scaling is not usable.
    """
    scale, bias = _check_scaling(scaling)
    return {"scale": scale.tolist(), "bias": bias.tolist()}


def scaling_from_state(state: Mapping[str, Any]) -> VectorScaling:
    """The scaling whose `scaling_state` this is, lists or arrays.

    Raises:
        DataError: a part is missing or not a list of finite numbers.
    """
    try:
        return VectorScaling(*_check_scaling(VectorScaling(state["scale"], state["bias"])))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "not the state of a scaling", got=f"{type(error).__name__} {error}"
        ) from None


def as_scaling(temperature: float, k: int, scaling: VectorScaling | None = None) -> VectorScaling:
    """A temperature for k classes as a scaling; after another scaling, where one is given.

    Raises:
        DataError: the temperature is not above 0, or the scaling is of other classes.
    """
    _check_temperature(temperature)
    scale, bias = _check_scaling(scaling or VectorScaling(np.ones(k), np.zeros(k)))
    if len(scale) != k:
        raise DataError("the scaling is of other classes", expected=f"{k} classes", got=len(scale))
    return VectorScaling(scale / temperature, bias / temperature)


def best_temperature(loss: Callable[[float], float]) -> float:
    """The temperature of least loss, searched on a logarithmic scale."""
    found = minimize_scalar(
        lambda log: loss(float(np.exp(log))), bounds=np.log((LOWEST, HIGHEST)), method="bounded"
    )
    return float(np.exp(found.x))


def floored_logs(probs: np.ndarray) -> np.ndarray:
    """log(probs) in float64, probabilities below FLOOR as FLOOR; any shape."""
    return np.asarray(np.log(np.maximum(probs.astype(np.float64), FLOOR)))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise DataError("a temperature is above 0", got=temperature)


def _check_scaling(scaling: VectorScaling) -> tuple[np.ndarray, np.ndarray]:
    scale, bias = (np.asarray(part, dtype=np.float64) for part in scaling)
    if (
        scale.ndim != 1
        or scale.shape != bias.shape
        or not (np.isfinite(scale) & np.isfinite(bias)).all()
    ):
        raise DataError(
            "a scaling is two lists of finite numbers, one each per class",
            got=(scale.shape, bias.shape),
        )
    return scale, bias
