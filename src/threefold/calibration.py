"""Calibration: probabilities (n, k) that mean what they say, fitted on rows that no model has seen.

Temperature and vector scaling (Guo et al. 2017, "On calibration of modern neural networks", section 4.2), the choice among
none, temperature and vector, and the temperature of an average of fold models, which out-of-fold rows alone do not
tell. Imports no torch until a module is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from threefold.errors import DataError
from threefold.predictions import FLOOR, check_labels, check_probs

if TYPE_CHECKING:
    from torch import Tensor, nn

LOWEST: Final = 0.05
"""Smallest temperature that is fitted."""

HIGHEST: Final = 20.0
"""Largest temperature that is fitted."""

SHRINKAGE: Final = 10.0
"""Weight of the pull of vector scaling towards temperature scaling, in rows for each class."""

_PARTS: Final = 5
"""Parts of a cross-fit where the caller has no folds."""

_FEWEST: Final = 1e-3
"""Smallest scale of a class, as a share of the temperature's: a scale of 0 or below would turn a class around."""


class VectorScaling(NamedTuple):
    """Scale and bias of each class, both (k,): softmax(scale * log(probs) + bias)."""

    scale: np.ndarray
    bias: np.ndarray


class Calibration(NamedTuple):
    """A chosen calibration.

    Attributes:
        name: none, temperature or vector.
        scaling: the same as scale and bias for each class; a temperature T is the scale 1 / T and the bias 0.
        probs: (n, k), what the choice was made on: every row calibrated by what was fitted on other rows.
        reason: why this one, in words.
    """

    name: str
    scaling: VectorScaling
    probs: np.ndarray
    reason: str


def fit_temperature(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """The T in 0.05..20 that minimises the log loss of softmax(log(probs) / T) (Guo et al. 2017); probs (n, k).

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array = check_probs(probs, 2)
    truth = check_labels(labels, *array.shape)

    logs = np.log(np.maximum(array.astype(np.float64), FLOOR))
    logs -= logs.max(1, keepdims=True)
    hits = logs[np.arange(len(truth)), truth]
    most = -np.log(np.finfo(np.float64).tiny)

    def loss(temperature: float) -> float:
        return float(np.minimum(np.log(np.exp(logs / temperature).sum(1)) - hits / temperature, most).mean())

    return _best_temperature(loss)


def apply_temperature(probs: npt.ArrayLike, temperature: float) -> np.ndarray:
    """softmax(log(probs) / temperature), (n, k) float64; probabilities below FLOOR count as FLOOR.

    Raises:
        DataError: probabilities are not usable, or the temperature is not above 0.
    """
    _check_temperature(temperature)
    return np.asarray(softmax(_logs(check_probs(probs, 2)) / temperature, axis=-1))


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


def fit_averaged_temperature(
    oof: npt.ArrayLike,
    labels: npt.ArrayLike,
    fold_probs: npt.ArrayLike,
    answers: npt.ArrayLike | None = None,
    *,
    averaged: int | None = None,
) -> float:
    """The temperature of an average of fold models, of which no labelled row has a prediction.

    Every out-of-fold row is answered by one fold model, a new image by the average of all, which is less sure of itself:
    the temperature of the former is too high for the latter. What is needed besides is how the fold models answer the
    same rows that none of them has seen, a test split for example; the labels of those rows are not looked at.

    With z_j = log(probs) of fold model j and z their mean, the log loss of softmax(z / T) has a part with labels and
    one without: E[logsumexp(z / T)] - E[z at the label] / T. The mean over fold models of z_j at the label is what
    out-of-fold rows show, and z is linear in z_j; so the part with labels is estimated without bias from out-of-fold
    rows. The part without labels is that of single models on the same rows, plus the difference that averaging makes on
    `fold_probs`. The answer a is the log of an arithmetic mean (or of a combiner of means), not z: its gap a - z at the
    label is estimated under softmax(z / T), calibrated as above. Where all fold models agree, the result is
    `fit_temperature(oof, labels)`.

    Assumes that (1) rows of `fold_probs` come from the same distribution as out-of-fold rows and no fold model has seen
    them, (2) fold models differ by chance only (the same size, recipe and data source), so that out-of-fold rows stand
    for all of them, and (3), for the gap, that the averaged log probabilities can be calibrated by one temperature.
    Exact zeros (votes, small forests) are the weak point: they count as FLOOR and make the gap large.

    Args:
        oof: (n, k) out-of-fold probabilities of what is calibrated, one member or an ensemble.
        labels: (n,) of the out-of-fold rows.
        fold_probs: (f, u, k) the same by every fold model, at least two, on u rows that none has seen.
        answers: (u, k) what a new image gets, without temperature; None = the mean of `fold_probs`.
        averaged: number of fold models in the answer, where `fold_probs` has only some of them (rows that just two
            fold models have not seen). The result is then extrapolated from 1 and f to this number, linear in its
            inverse, as it is for class-conditional Gaussian log odds; `answers` must be None.

    Raises:
        DataError: probabilities or labels are not usable, or the parts contradict each other.
    """
    array = check_probs(oof, 2)
    truth = check_labels(labels, *array.shape)
    folds = check_probs(fold_probs, 3)
    answer = check_probs(folds.mean(0, dtype=np.float64) if answers is None else answers, 2)
    _check_folds(array, folds, answer, answers is not None, averaged)
    single, z = _logs(array), _logs(folds)
    mean, final = z.mean(0), _logs(answer)
    hit = float(single[np.arange(len(truth)), truth].mean())

    def fitted(logs: np.ndarray, gap: float) -> float:
        def loss(t: float) -> float:
            softened = logsumexp(logs / t, axis=-1).mean() - logsumexp(z / t, axis=-1).mean()
            return float(logsumexp(single / t, axis=-1).mean() + softened - (hit + gap) / t)

        return _best_temperature(loss)

    posterior = softmax(mean / fitted(mean, 0.0), axis=-1)
    temperature = fitted(final, float((posterior * (final - mean)).sum(-1).mean()))
    if averaged is None or averaged == len(folds):
        return temperature
    alone = fit_temperature(array, truth)
    step = (1 - 1 / averaged) / (1 - 1 / len(folds))
    return float(np.clip(alone + (temperature - alone) * step, LOWEST, HIGHEST))


def fit_vector(probs: npt.ArrayLike, labels: npt.ArrayLike, shrinkage: float = SHRINKAGE) -> VectorScaling:
    """Scale and bias of each class that minimise the log loss (vector scaling, Guo et al. 2017), pulled to temperature.

    The penalty is shrinkage / 2 * sum(bias ** 2 + (scale * T - 1) ** 2) on the summed log loss, with T from
    `fit_temperature`: a class with few rows stays near the temperature, and with a large shrinkage all do. The problem
    is convex, so the result does not depend on a start. Scales stay above 0.

    Raises:
        DataError: probabilities or labels are not usable, or the shrinkage is not above 0.
    """
    array = check_probs(probs, 2)
    n, k = array.shape
    truth = check_labels(labels, n, k)
    if not 0 < shrinkage < np.inf:
        raise DataError("the shrinkage of vector scaling is a number above 0", got=shrinkage)
    temperature = fit_temperature(array, truth)
    z = _logs(array) / temperature

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scale, bias = parameters.reshape(2, k)
        logs = log_softmax(scale * z + bias, axis=-1)
        error = np.exp(logs)
        error[np.arange(n), truth] -= 1
        value = -logs[np.arange(n), truth].sum() + shrinkage / 2 * (bias @ bias + (scale - 1) @ (scale - 1))
        slope = np.concatenate([(error * z).sum(0) + shrinkage * (scale - 1), error.sum(0) + shrinkage * bias])
        return value / n, slope / n

    start = np.concatenate([np.ones(k), np.zeros(k)])
    bounds = [(_FEWEST, None)] * k + [(None, None)] * k
    scale, bias = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x.reshape(2, k)
    return VectorScaling(scale / temperature, bias)


def apply_vector(probs: npt.ArrayLike, scaling: VectorScaling) -> np.ndarray:
    """softmax(scale * log(probs) + bias), (n, k) float64; probabilities below FLOOR count as FLOOR.

    Raises:
        DataError: probabilities are not usable, or of another number of classes than the scaling.
    """
    array = check_probs(probs, 2)
    scale, bias = _check_scaling(scaling)
    if len(scale) != array.shape[1]:
        raise DataError("the scaling is of other classes", expected=f"{len(scale)} classes", got=array.shape[1])
    return np.asarray(softmax(_logs(array) * scale + bias, axis=-1))


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


_METHODS: Final[dict[str, Callable[[np.ndarray, np.ndarray], VectorScaling]]] = {
    "none": lambda probs, _: as_scaling(1.0, probs.shape[1]),
    "temperature": lambda probs, labels: as_scaling(fit_temperature(probs, labels), probs.shape[1]),
    "vector": fit_vector,
}
"""Ways to calibrate, the simplest first."""


def choose_calibration(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    folds: npt.ArrayLike | None = None,
    groups: Sequence[str] | None = None,
) -> Calibration:
    """None, temperature or vector: the simplest whose log loss is within one standard error of the best, cross-fitted.

    The standard error is that of the paired difference in log loss, row by row, or group by group (Breiman et al. 1984,
    section 3.4.3, for the rule).

    Args:
        probs: (n, k) out-of-fold probabilities.
        labels: (n,).
        folds: (n,) part of each row; None = five parts, with classes or whole groups spread over them.
        groups: (n,) rows that are not independent of each other.

    Raises:
        DataError: probabilities, labels, folds or groups are not usable, or the rows make fewer than two parts.
    """
    array = check_probs(probs, 2)
    truth = check_labels(labels, *array.shape)
    unit = np.arange(len(truth)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if unit.shape != truth.shape:
        raise DataError("groups do not match the labels", expected=len(truth), got=len(unit))
    part = np.asarray(folds) if folds is not None else _parts(truth, None if groups is None else unit)
    if part.shape != truth.shape:
        raise DataError("folds have the wrong shape", expected=f"({len(truth)},), one per row", got=part.shape)
    if len(np.unique(part)) < 2:
        raise DataError("rows cannot be cross-fitted", expected="two parts at least", got="all rows in one")
    crossed = {name: _crossed(fit, array, truth, part) for name, fit in _METHODS.items()}
    losses = {name: -np.log(np.maximum(p[np.arange(len(p)), truth], FLOOR)) for name, p in crossed.items()}
    name, reason = _simplest(losses, unit)
    return Calibration(name, _METHODS[name](array, truth), crossed[name], reason)


def _simplest(losses: dict[str, np.ndarray], unit: np.ndarray) -> tuple[str, str]:
    """The first of the candidates within one standard error of the smallest loss, and why."""
    best = min(losses, key=lambda name: losses[name].mean())
    for name, mine in losses.items():
        difference = mine - losses[best]
        error = _standard_error(difference, unit)
        if name == best or difference.mean() <= error:
            break
    least = f"log loss {losses[best].mean():.4f} cross-fitted"
    if name == best:
        rest = "and the simplest" if name == next(iter(losses)) else "nothing simpler comes within one standard error"
        return name, f"the best, {least}; {rest}"
    return name, f"{losses[name].mean():.4f}, within one standard error ({error:.4f}) of {best}, {least}, and simpler"


def _standard_error(values: np.ndarray, unit: np.ndarray) -> float:
    """Standard error of a mean whose rows are independent only between units."""
    sums = np.bincount(unit, values - values.mean())
    return float(np.sqrt((sums**2).sum()) / len(values))


def _crossed(
    fit: Callable[[np.ndarray, np.ndarray], VectorScaling], probs: np.ndarray, labels: np.ndarray, part: np.ndarray
) -> np.ndarray:
    """Probabilities (n, k) where each row is calibrated by what was fitted on other parts."""
    answer = np.empty(probs.shape)
    for value in np.unique(part):
        held = part == value
        answer[held] = apply_vector(probs[held], fit(probs[~held], labels[~held]))
    return answer


def _parts(labels: np.ndarray, unit: np.ndarray | None) -> np.ndarray:
    """Part number (n,): classes spread evenly, or groups kept whole."""
    rng = np.random.default_rng(0)
    if unit is not None:
        return np.asarray((rng.permutation(unit.max() + 1) % _PARTS)[unit])
    part = np.empty(len(labels), dtype=np.int64)
    part[np.lexsort((rng.random(len(labels)), labels))] = np.arange(len(labels)) % _PARTS
    return part


def _best_temperature(loss: Callable[[float], float]) -> float:
    """The temperature of least loss, searched on a logarithmic scale."""
    found = minimize_scalar(lambda log: loss(float(np.exp(log))), bounds=np.log((LOWEST, HIGHEST)), method="bounded")
    return float(np.exp(found.x))


def _logs(probs: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(np.maximum(probs.astype(np.float64), FLOOR)))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise DataError("a temperature is above 0", got=temperature)


def _check_scaling(scaling: VectorScaling) -> tuple[np.ndarray, np.ndarray]:
    scale, bias = (np.asarray(part, dtype=np.float64) for part in scaling)
    if scale.ndim != 1 or scale.shape != bias.shape or not (np.isfinite(scale) & np.isfinite(bias)).all():
        raise DataError("a scaling is two lists of finite numbers, one each per class", got=(scale.shape, bias.shape))
    return scale, bias


def _check_folds(oof: np.ndarray, folds: np.ndarray, answer: np.ndarray, given: bool, averaged: int | None) -> None:
    """The parts of `fit_averaged_temperature` fit together."""
    f, u, k = folds.shape
    if f < 2:
        raise DataError("one fold model is no average", expected="fold_probs of two or more", got=f)
    if k != oof.shape[1]:
        raise DataError("fold_probs are of other classes than oof", expected=f"{oof.shape[1]} classes", got=k)
    if answer.shape != (u, k):
        raise DataError("answers do not match fold_probs", expected=(u, k), got=answer.shape)
    if averaged is not None and averaged < f:
        raise DataError("fewer fold models are averaged than given", expected=f"averaged >= {f}", got=averaged)
    if averaged is not None and averaged > f and given:
        raise DataError("answers of some fold models cannot be extrapolated", fix="leave answers out, or averaged")
