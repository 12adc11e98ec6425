"""Calibration: probabilities (n, k) that mean what they say, fitted on rows that no model has seen.

The choice among none, temperature and vector scaling, cross-fitted; and the temperature of an average of fold models,
which out-of-fold rows alone do not tell. The scalings themselves are in `scaling`, and can be imported from here.
Imports no torch until a module is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp, softmax

from threefold.crossfit import stratified_parts
from threefold.errors import DataError
from threefold.predictions__checks import FLOOR, check_labels, check_probs
from threefold.scaling import (
    HIGHEST,
    LOWEST,
    SHRINKAGE,
    TemperatureModule,
    VectorModule,
    VectorScaling,
    apply_temperature,
    apply_vector,
    as_scaling,
    best_temperature,
    fit_temperature,
    fit_temperatures,
    fit_vector,
    floored_logs,
    scaling_from_state,
    scaling_state,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "HIGHEST",
    "LOWEST",
    "METHODS",
    "SHRINKAGE",
    "Calibration",
    "TemperatureModule",
    "VectorModule",
    "VectorScaling",
    "apply_temperature",
    "apply_vector",
    "as_scaling",
    "choose_calibration",
    "fit_averaged_temperature",
    "fit_calibration",
    "fit_temperature",
    "fit_vector",
    "saved_calibration",
    "scaling_from_state",
    "scaling_state",
]

Method = Literal["none", "temperature", "vector"]

METHODS: Final[tuple[Method, ...]] = get_args(Method)
"""Ways to calibrate, the simplest first."""


class Calibration(NamedTuple):
    """A fitted calibration.

    Attributes:
        name: none, temperature or vector.
        scaling: the same as scale and bias for each class; a temperature T is the scale 1 / T and the bias 0.
        probs: (n, k) float64, every row calibrated by what was fitted on other rows; (0, k) where it was read from a file.
        reason: why this one, in words.
    """

    name: Method
    scaling: VectorScaling
    probs: np.ndarray
    reason: str

    @property
    def temperature(self) -> float | None:
        """The temperature, 1 without a calibration; None for vector scaling, which has no single one."""
        return None if self.name == "vector" else float(1 / self.scaling.scale[0])

    def apply(self, probs: npt.ArrayLike) -> np.ndarray:
        """Calibrated probabilities (n, k) float64; with the name none, as they are.

        Raises:
            DataError: probabilities are not usable, or of other classes.
        """
        if self.name == "none":
            return check_probs(probs, 2).astype(np.float64)
        return apply_vector(probs, self.scaling)

    def to_module(self) -> nn.Module:
        """The same as a torch module, (b, k) to (b, k), for `pipeline.Combiner`."""
        from torch import nn

        if self.temperature is None:
            return VectorModule(self.scaling)
        return nn.Identity() if self.name == "none" else TemperatureModule(self.temperature)

    def state(self) -> dict[str, Any]:
        """What results.json and a model card need, as plain values: name, temperature, scale, bias, reason."""
        told = {"name": self.name, "temperature": self.temperature, **scaling_state(self.scaling)}
        return {**told, "reason": self.reason}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The calibration whose `state` this is, without the probabilities that it was chosen on.

        Raises:
            DataError: a value is missing or cannot be.
        """
        scaling, name = scaling_from_state(state), state.get("name")
        if name not in METHODS:
            raise DataError(
                "not the state of a calibration", expected=" or ".join(METHODS), got=name
            )
        return cls(name, scaling, np.empty((0, len(scaling.scale))), str(state.get("reason", "")))


def saved_calibration(results: Mapping[str, Any], k: int) -> Calibration:
    """The calibration in results.json: its "calibration", or the "temperature" alone that older runs have.

    Raises:
        DataError: neither is there, or it is of other classes than k.
    """
    if "calibration" in results:
        found = Calibration.from_state(results["calibration"])
    elif results.get("temperature"):
        scaling = as_scaling(float(results["temperature"]), k)
        found = Calibration(
            "temperature", scaling, np.empty((0, k)), "the only calibration of this run's version"
        )
    else:
        raise DataError("no calibration in the results", expected='"calibration" or "temperature"')
    if len(found.scaling.scale) != k:
        raise DataError(
            "the calibration is of other classes",
            expected=f"{k} classes",
            got=len(found.scaling.scale),
        )
    return found


def fit_calibration(
    name: str,
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    folds: npt.ArrayLike | None = None,
    groups: Sequence[str] | None = None,
) -> Calibration:
    """A calibration fitted on all rows, with every row calibrated by what was fitted on other rows.

    Args:
        name: none, temperature, vector, or auto = the choice of `choose_calibration`.
        probs: (n, k) out-of-fold probabilities.
        labels: (n,).
        folds: (n,) part of each row; None = `stratified_parts`, classes or whole groups spread over them.
        groups: (n,) what must stay in one part where `folds` is None.

    Raises:
        DataError: the name is unknown, probabilities, labels, folds or groups are not usable, or the rows make fewer
            than two parts.
    """
    if name == "auto":
        return choose_calibration(probs, labels, folds, groups)
    if name not in METHODS:
        raise DataError("unknown calibration", expected=", ".join((*METHODS, "auto")), got=name)
    array, truth, part = _checked(probs, labels, folds, groups)
    if name == "temperature":
        return _temperature(array, truth, part)
    crossed = _crossed((name,), array, truth, part)[name]
    return Calibration(name, _fits((name,), array, truth)[name], crossed, "named by the recipe")


def _temperature(probs: np.ndarray, labels: np.ndarray, part: np.ndarray) -> Calibration:
    """Temperature scaling, its fits on the parts' rests from that on all rows."""
    whole, apart = fit_temperatures(probs, labels, part)
    values, at = np.unique(part, return_inverse=True)
    by_row = np.array([apart[value] for value in values])[at][:, None]
    crossed = softmax(floored_logs(probs) / by_row, axis=-1)
    return Calibration(
        "temperature", as_scaling(whole, probs.shape[1]), crossed, "named by the recipe"
    )


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
        folds: (n,) part of each row; None = `stratified_parts`, classes or whole groups spread over them.
        groups: (n,) rows that are not independent of each other.

    Raises:
        DataError: probabilities, labels, folds or groups are not usable, or the rows make fewer than two parts.
    """
    array, truth, part = _checked(probs, labels, folds, groups)
    unit = (
        np.arange(len(truth))
        if groups is None
        else np.unique(np.asarray(groups), return_inverse=True)[1]
    )
    if unit.shape != truth.shape:
        raise DataError("groups do not match the labels", expected=len(truth), got=len(unit))
    crossed = _crossed(METHODS, array, truth, part)
    losses = {
        name: -np.log(np.maximum(p[np.arange(len(p)), truth], FLOOR)) for name, p in crossed.items()
    }
    name, reason = _simplest(losses, unit)
    return Calibration(name, _fits(METHODS, array, truth)[name], crossed[name], reason)


def _checked(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    folds: npt.ArrayLike | None,
    groups: Sequence[str] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (n, k), labels (n,) and the part of each row (n,)."""
    array = check_probs(probs, 2)
    truth = check_labels(labels, *array.shape)
    part = np.asarray(folds) if folds is not None else stratified_parts(truth, groups)
    if part.shape != truth.shape:
        raise DataError(
            "folds have the wrong shape", expected=f"({len(truth)},), one per row", got=part.shape
        )
    if len(np.unique(part)) < 2:
        raise DataError(
            "rows cannot be cross-fitted", expected="two parts at least", got="all rows in one"
        )
    return array, truth, part


def _simplest(losses: dict[Method, np.ndarray], unit: np.ndarray) -> tuple[Method, str]:
    """The first of the candidates within one standard error of the smallest loss, and why."""
    best = min(losses, key=lambda name: losses[name].mean())
    for name, mine in losses.items():
        difference = mine - losses[best]
        error = _standard_error(difference, unit)
        if name == best or difference.mean() <= error:
            break
    least = f"log loss {losses[best].mean():.4f} cross-fitted"
    if name == best:
        rest = (
            "and the simplest"
            if name == next(iter(losses))
            else "nothing simpler comes within one standard error"
        )
        return name, f"the best, {least}; {rest}"
    return (
        name,
        f"{losses[name].mean():.4f}, within one standard error ({error:.4f}) of {best}, {least}, and simpler",
    )


def _standard_error(values: np.ndarray, unit: np.ndarray) -> float:
    """Standard error of a mean whose rows are independent only between units."""
    sums = np.bincount(unit, values - values.mean())
    return float(np.sqrt((sums**2).sum()) / len(values))


def _fits(
    names: Sequence[Method], probs: np.ndarray, labels: np.ndarray
) -> dict[Method, VectorScaling]:
    """Each calibration fitted on these rows; vector scaling starts from the temperature, which is fitted once."""
    k = probs.shape[1]
    found: dict[Method, VectorScaling] = {"none": as_scaling(1.0, k)}
    if set(names) - {"none"}:
        temperature = fit_temperature(probs, labels)
        found["temperature"] = as_scaling(temperature, k)
        if "vector" in names:
            found["vector"] = fit_vector(probs, labels, temperature=temperature)
    return found


def _crossed(
    names: Sequence[Method], probs: np.ndarray, labels: np.ndarray, part: np.ndarray
) -> dict[Method, np.ndarray]:
    """Probabilities (n, k) by each calibration, where each row is calibrated by what was fitted on other parts."""
    answers = {name: probs.astype(np.float64) for name in names}
    fitted = [name for name in names if name != "none"]
    for value in np.unique(part) if fitted else ():
        held = part == value
        scalings = _fits(fitted, probs[~held], labels[~held])
        for name in fitted:
            answers[name][held] = apply_vector(probs[held], scalings[name])
    return answers


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
    single, z = floored_logs(array), floored_logs(folds)
    mean, final = z.mean(0), floored_logs(answer)
    hit = float(single[np.arange(len(truth)), truth].mean())

    def fitted(logs: np.ndarray, gap: float) -> float:
        def loss(t: float) -> float:
            softened = logsumexp(logs / t, axis=-1).mean() - logsumexp(z / t, axis=-1).mean()
            return float(logsumexp(single / t, axis=-1).mean() + softened - (hit + gap) / t)

        return best_temperature(loss)

    posterior = softmax(mean / fitted(mean, 0.0), axis=-1)
    temperature = fitted(final, float((posterior * (final - mean)).sum(-1).mean()))
    if averaged is None or averaged == len(folds):
        return temperature
    alone = fit_temperature(array, truth)
    step = (1 - 1 / averaged) / (1 - 1 / len(folds))
    return float(np.clip(alone + (temperature - alone) * step, LOWEST, HIGHEST))


def _check_folds(
    oof: np.ndarray, folds: np.ndarray, answer: np.ndarray, given: bool, averaged: int | None
) -> None:
    """The parts of `fit_averaged_temperature` fit together."""
    f, u, k = folds.shape
    if f < 2:
        raise DataError("one fold model is no average", expected="fold_probs of two or more", got=f)
    if k != oof.shape[1]:
        raise DataError(
            "fold_probs are of other classes than oof", expected=f"{oof.shape[1]} classes", got=k
        )
    if answer.shape != (u, k):
        raise DataError("answers do not match fold_probs", expected=(u, k), got=answer.shape)
    if averaged is not None and averaged < f:
        raise DataError(
            "fewer fold models are averaged than given", expected=f"averaged >= {f}", got=averaged
        )
    if averaged is not None and averaged > f and given:
        raise DataError(
            "answers of some fold models cannot be extrapolated",
            fix="leave answers out, or averaged",
        )
