"""Calibration: none, temperature or vector scaling, named or chosen, and always cross-fitted.

It turns probabilities (n, k) into ones that match observed frequencies, fitted on rows that no
model has seen. The scalings themselves are in `scaling`. torch is imported only to make a module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self, get_args

import numpy as np
import numpy.typing as npt

from threefold.ensembles.cross_fit import cross_fit_parts
from threefold.ensembles.scaling import (
    VectorScaling,
    apply_vector,
    as_scaling,
    fit_temperature,
    fit_temperatures,
    fit_vector,
    scaled_softmax,
    scaling_from_state,
    scaling_state,
    temperature_module,
    vector_module,
)
from threefold.errors import DataError
from threefold.predictions.checks import FLOOR, check_labels, check_probs
from threefold.scratch import converted, scratch, take_rows
from threefold.stats.one_standard_error import simplest

if TYPE_CHECKING:
    from torch import nn

    from threefold.predictions.results_schema import CalibrationState

Method = Literal["none", "temperature", "vector"]

METHODS: Final[tuple[Method, ...]] = get_args(Method)
"""Ways to calibrate, simplest first."""


class Calibration(NamedTuple):
    """A fitted calibration.

    Attributes:
        name: none, temperature or vector.
        scaling: the scale and bias of each class; a temperature T is the scale 1 / T and bias 0.
        probs: (n, k) float64, each row calibrated by a fit on other rows; (0, k) if read from a
            file.
        reason: why this calibration, as a sentence.
    """

    name: Method
    scaling: VectorScaling
    probs: np.ndarray
    reason: str

    @property
    def temperature(self) -> float | None:
        """The temperature, 1 without calibration; None for vector scaling, which has several."""
        return None if self.name == "vector" else float(1 / self.scaling.scale[0])

    def apply(self, probs: npt.ArrayLike) -> np.ndarray:
        """Calibrate probabilities (n, k), to float64; "none" returns them unchanged.

        Raises:
            DataError: probabilities are not usable, or have other classes.
        """
        if self.name == "none":
            return converted(check_probs(probs, 2), np.float64)
        return apply_vector(probs, self.scaling)

    def to_module(self) -> nn.Module:
        """Return the calibration as a torch module, (b, k) to (b, k), for `pipeline.Combiner`."""
        from torch import nn

        if self.temperature is None:
            return vector_module(self.scaling)
        return nn.Identity() if self.name == "none" else temperature_module(self.temperature)

    def state(self) -> dict[str, Any]:
        """Return plain values for results.json and the model card."""
        return {
            "name": self.name,
            "temperature": self.temperature,
            **scaling_state(self.scaling),
            "reason": self.reason,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Restore a calibration from its `state`, without the cross-fitted probabilities.

        Raises:
            DataError: a value is missing or invalid.
        """
        scaling, name = scaling_from_state(state), state.get("name")
        if name not in METHODS:
            raise DataError(
                "not the state of a calibration", expected=" or ".join(METHODS), got=name
            )
        return cls(name, scaling, np.empty((0, len(scaling.scale))), str(state.get("reason", "")))


def saved_calibration(state: CalibrationState | None, k: int) -> Calibration:
    """Restore the calibration of k classes from results.json.

    Raises:
        DataError: it is missing, invalid, or for another number of classes.
    """
    if state is None:
        raise DataError("no calibration in the results", expected='"calibration"')
    calibration = Calibration.from_state(state.as_json())
    if len(calibration.scaling.scale) != k:
        raise DataError(
            "the calibration is for other classes",
            expected=f"{k} classes",
            got=len(calibration.scaling.scale),
        )
    return calibration


def fit_calibration(
    name: str,
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    folds: npt.ArrayLike | None = None,
    groups: Sequence[str] | None = None,
) -> Calibration:
    """Fit a calibration on all rows, and calibrate each row by a fit on other rows.

    Args:
        name: none, temperature, vector, or auto = the choice of `choose_calibration`.
        probs: (n, k) out-of-fold probabilities.
        labels: (n,).
        folds: (n,) part of each row; None = `stratified_parts`.
        groups: (n,) groups that must stay in one part if `folds` is None.

    Raises:
        DataError: the name is unknown, probabilities, labels, folds or groups are not usable, or
            there are fewer than two parts.
    """
    if name == "auto":
        return choose_calibration(probs, labels, folds, groups)
    if name not in METHODS:
        raise DataError("unknown calibration", expected=", ".join((*METHODS, "auto")), got=name)
    array = check_probs(probs, 2)
    truth = check_labels(labels, *array.shape)
    part = cross_fit_parts(truth, folds, groups)
    if name == "temperature":
        # The fits on the rest of each part start from the fit on all rows.
        temperature, without_part = fit_temperatures(array, truth, part)
        values, index = np.unique(part, return_inverse=True)
        by_row = np.array([without_part[value] for value in values])[index][:, None]
        crossed = scaled_softmax(array, lambda logs, rows: logs / by_row[rows])
        scaling = as_scaling(temperature, array.shape[1])
    else:
        crossed = _cross_fit((name,), array, truth, part)[name]
        scaling = _fit_scalings((name,), array, truth)[name]
    return Calibration(name, scaling, crossed, reason="named by the recipe")


def choose_calibration(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    folds: npt.ArrayLike | None = None,
    groups: Sequence[str] | None = None,
) -> Calibration:
    """Choose none, temperature or vector by the one-standard-error rule on cross-fitted log loss.

    The standard error is that of the paired difference in log loss, by row or by group.

    Args:
        probs: (n, k) out-of-fold probabilities.
        labels: (n,).
        folds: (n,) part of each row; None = `stratified_parts`.
        groups: (n,) groups of rows that are not independent of each other.

    Raises:
        DataError: probabilities, labels, folds or groups are not usable, or there are fewer than
            two parts.
    """
    array = check_probs(probs, 2)
    truth = check_labels(labels, *array.shape)
    part = cross_fit_parts(truth, folds, groups)
    if groups is not None and len(groups) != len(truth):
        raise DataError("groups do not match the labels", expected=len(truth), got=len(groups))
    crossed = _cross_fit(METHODS, array, truth, part)
    losses = [
        -np.log(np.maximum(crossed[name][np.arange(len(truth)), truth], FLOOR)) for name in METHODS
    ]
    choice = simplest([-loss for loss in losses], groups)
    name = METHODS[choice.chosen]
    best = f"log loss {losses[choice.best].mean():.4f} cross-fitted"
    if choice.chosen != choice.best:
        reason = (
            f"{losses[choice.chosen].mean():.4f}, within one standard error "
            f"({choice.error:.4f}) of {METHODS[choice.best]}, {best}, and simpler"
        )
    elif choice.chosen == 0:
        reason = f"the best, {best}; and the simplest"
    else:
        reason = f"the best, {best}; nothing simpler comes within one standard error"
    return Calibration(name, _fit_scalings(METHODS, array, truth)[name], crossed[name], reason)


def _fit_scalings(
    names: Sequence[Method], probs: np.ndarray, labels: np.ndarray
) -> dict[Method, VectorScaling]:
    """Fit each method on these rows; vector scaling shares the temperature's fit."""
    k = probs.shape[1]
    scalings: dict[Method, VectorScaling] = {"none": as_scaling(1.0, k)}
    if set(names) - {"none"}:
        temperature = fit_temperature(probs, labels)
        scalings["temperature"] = as_scaling(temperature, k)
        if "vector" in names:
            scalings["vector"] = fit_vector(probs, labels, temperature=temperature)
    return scalings


def _cross_fit(
    names: Sequence[Method], probs: np.ndarray, labels: np.ndarray, part: np.ndarray
) -> dict[Method, np.ndarray]:
    """Return probabilities (n, k) by method, each row calibrated by a fit on other parts."""
    fitted = [name for name in names if name != "none"]
    answers: dict[Method, np.ndarray] = {name: scratch(probs.shape) for name in fitted}
    if "none" in names:
        answers["none"] = converted(probs, np.float64)
    for value in np.unique(part) if fitted else ():
        inside = part == value
        scalings = _fit_scalings(fitted, take_rows(probs, ~inside), labels[~inside])
        inside_probs = take_rows(probs, inside)
        for name in fitted:
            answers[name][inside] = apply_vector(inside_probs, scalings[name])
    return answers
