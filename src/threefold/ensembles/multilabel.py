"""The ensemble of several labels per image: a mean of sigmoids, calibrated, with thresholds.

The members' probabilities (m, n, k) are averaged with weights, each label's mean is calibrated on
its logit (Platt 1999), and a label is given from its threshold on. Everything is fitted on
out-of-fold rows, and cross-fitted for its honest score: no image helps to choose the member, the
calibration or the threshold that its own answer is scored with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit

from threefold.ensembles.cross_fit import side_by_side, stratified_parts
from threefold.errors import DataError
from threefold.predictions.checks import check_sigmoids, check_targets
from threefold.predictions.multilabel import MultilabelPredictions
from threefold.stats.multilabel import (
    best_f1_threshold,
    log_losses,
    mean_average_precision,
)
from threefold.stats.multilabel_tables import LEAST_RESAMPLES, draw_scores
from threefold.stats.one_standard_error import simplest

Metric = Literal["mean_average_precision", "log_loss"]
Method = Literal["mean", "best"]

METHODS: Final[tuple[Method, ...]] = ("mean", "best")
"""Ways to combine, simplest first: all members alike (nothing is learned), or the best one."""

LEAST: Final = 1e-5
"""Probabilities count as at least this and at most 1 - LEAST: members answer in float32, whose
steps near 1 are 6e-8, so that the logits of more extreme ones would be rounding."""

_SLOPES: Final = (0.01, 100.0)
"""Least and largest slope of a calibration: a positive slope never turns the order around."""

_ARRAYS: Final = ("weights", "slope", "intercept", "thresholds")


@dataclass(frozen=True, eq=False)
class MultilabelEnsemble:
    """One calibrated answer (n, k) from the members' probabilities (m, n, k), and thresholds.

    The answer is sigmoid(slope * logit(p) + intercept), where p is the weighted mean of the
    members, kept between LEAST and 1 - LEAST. A label is given where the answer is at least its
    threshold.

    Attributes:
        weights: (m,) not negative, with sum 1; members with weight 0 take no part.
        slope: (k,) above 0; 1 without calibration.
        intercept: (k,); 0 without calibration.
        thresholds: (k,) in 0 to 1.

    Raises:
        DataError: an array has a wrong shape or value.
    """

    weights: np.ndarray
    slope: np.ndarray
    intercept: np.ndarray
    thresholds: np.ndarray

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = np.array(getattr(self, name), np.float64)
            expected = self.slope if name != "weights" else self.weights
            if array.ndim != 1 or len(array) != len(np.asarray(expected)) or not len(array):
                raise DataError(
                    "an array of the ensemble has the wrong shape", where=name, got=array.shape
                )
            if not np.isfinite(array).all():
                raise DataError("an array of the ensemble is NaN or infinite", where=name)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if (self.weights < 0).any() or abs(self.weights.sum() - 1) > 1e-6:
            raise DataError(
                "weights of members are not negative and sum to 1", got=self.weights.tolist()
            )
        if (self.slope <= 0).any():
            raise DataError("slopes of a calibration are positive", got=float(self.slope.min()))

    def __call__(self, probs: npt.ArrayLike) -> np.ndarray:
        """Combine and calibrate probabilities (m, n, k) into (n, k) float64.

        Raises:
            DataError: probabilities are not usable, or the members or labels are not those of the
                fit.
        """
        array = check_sigmoids(probs, 3)
        expected = (len(self.weights), array.shape[1], len(self.slope))
        if array.shape != expected:
            raise DataError(
                "the predictions do not match the ensemble",
                expected=f"{expected[0]} members and {expected[2]} labels",
                got=f"{array.shape[0]} and {array.shape[2]}",
            )
        mean = np.tensordot(self.weights, array.astype(np.float64), 1)
        return np.asarray(expit(self.slope * _logits(mean) + self.intercept))

    def decide(self, probs: npt.ArrayLike) -> np.ndarray:
        """Return the labels that calibrated answers (n, k) give: uint8 (n, k)."""
        return (np.asarray(probs) >= self.thresholds).astype(np.uint8)

    def as_json(self) -> dict[str, list[float]]:
        """Return the arrays as lists; `from_json` reads them."""
        return {name: getattr(self, name).tolist() for name in _ARRAYS}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """Read the arrays from `as_json`, or from the arrays of an .npz file.

        Raises:
            DataError: one is missing or wrong.
        """
        missing = [name for name in _ARRAYS if name not in tree]
        if missing:
            raise DataError(
                "the ensemble lacks an array", expected=", ".join(_ARRAYS), got=f"no {missing[0]}"
            )
        return cls(**{name: np.asarray(tree[name]) for name in _ARRAYS})


class ChosenWeights(NamedTuple):
    """How members are combined, their weights (m,), and the reason as a sentence."""

    name: Method
    weights: np.ndarray
    reason: str


class CrossFitted(NamedTuple):
    """Answers (n, k), and the labels (n, k) that they give, each from a fit on other rows."""

    probs: np.ndarray
    decided: np.ndarray


class Rows(NamedTuple):
    """What a fit learns from: probs (m, n, k), targets (n, k), parts (n,) and groups (n,).

    Parts are those of a cross-fit inside the fit.
    """

    probs: np.ndarray
    targets: np.ndarray
    part: np.ndarray
    groups: np.ndarray | None

    def take(self, mask: np.ndarray) -> Rows:
        """Return these rows (booleans) only."""
        groups = None if self.groups is None else self.groups[mask]
        return Rows(self.probs[:, mask], self.targets[mask], self.part[mask], groups)


Fit = Callable[[Rows], MultilabelEnsemble]


def rows_of(predictions: MultilabelPredictions) -> Rows:
    """Return the rows of predictions, with their folds as parts, or parts of similar labels."""
    groups = None if predictions.groups is None else np.asarray(predictions.groups)
    part = predictions.parts
    if part is None:
        part = similar_parts(predictions.targets, predictions.groups)
    if len(np.unique(part)) < 2:
        raise DataError(
            "rows cannot be cross-fitted", expected="two images or groups at least", got="one part"
        )
    return Rows(predictions.probs, predictions.targets, part, groups)


def similar_parts(targets: np.ndarray, groups: Sequence[str] | None = None) -> np.ndarray:
    """Return the part (n,) of each row, with each image's rarest label spread over the parts.

    Args:
        targets: (n, k).
        groups: (n,) names; rows of a group stay in one part.
    """
    k = targets.shape[1]
    rarity = np.argsort(np.argsort(targets.sum(0), kind="stable"))
    rarest = np.where(targets == 1, rarity, k).min(1)
    return stratified_parts(rarest.astype(np.int64), groups)


def fit_multilabel_ensemble(
    predictions: MultilabelPredictions, metric: Metric = "mean_average_precision"
) -> MultilabelEnsemble:
    """Choose how to combine the members, calibrate, and choose each label's threshold.

    Args:
        predictions: out-of-fold predictions: answers of networks that did not see the image.
        metric: what the way to combine is chosen by.

    Raises:
        DataError: there are too few rows to cross-fit.
    """
    return fit_chosen(rows_of(predictions), metric)


def fit_chosen(rows: Rows, metric: Metric = "mean_average_precision") -> MultilabelEnsemble:
    """Fit everything: the way to combine too."""
    return fit_weighted(rows, choose_weights(rows, metric).weights)


def fit_method(
    rows: Rows, method: Method, metric: Metric = "mean_average_precision"
) -> MultilabelEnsemble:
    """Fit calibration and thresholds of one way to combine; "best" chooses its member, too."""
    return fit_weighted(rows, method_weights(rows, method, metric))


def fit_weighted(rows: Rows, weights: np.ndarray) -> MultilabelEnsemble:
    """Fit calibration and thresholds of the members' mean with these weights (m,)."""
    mean = np.tensordot(weights, rows.probs.astype(np.float64), 1)
    slope, intercept = fit_calibration(mean, rows.targets, rows.part, rows.groups)
    answers = expit(slope * _logits(mean) + intercept)
    thresholds = [best_f1_threshold(p, t) for p, t in zip(answers.T, rows.targets.T, strict=True)]
    return MultilabelEnsemble(weights, slope, intercept, np.array(thresholds))


def method_weights(rows: Rows, method: Method, metric: Metric) -> np.ndarray:
    """Return the weights (m,) of one way to combine; of equally good members the first is best."""
    m = len(rows.probs)
    if method == "mean":
        return np.full(m, 1 / m)
    if metric == "log_loss":
        merits = [-float(log_losses(p, rows.targets).mean()) for p in rows.probs]
    else:
        merits = [mean_average_precision(p, rows.targets) for p in rows.probs]
    return _one_hot(int(np.argmax(merits)), m)


def choose_weights(rows: Rows, metric: Metric = "mean_average_precision") -> ChosenWeights:
    """Choose the mean of the members, or the best member where it is better by a standard error.

    Both are judged cross-fitted: an image's own labels never choose the member that answers it.
    The standard error of the difference of mean average precisions is that of bootstrap draws.
    """
    m = len(rows.probs)
    if m == 1:
        return ChosenWeights("best", np.ones(1), "the only member")
    if len(np.unique(rows.part)) < 2:  # inside a cross-fit of two folds
        groups = None if rows.groups is None else [str(group) for group in rows.groups]
        rows = rows._replace(part=similar_parts(rows.targets, groups))
    answers = {}
    for method in METHODS:
        answers[method] = np.empty(rows.targets.shape)
        for mask in _masks(rows):
            weights = method_weights(rows.take(~mask), method, metric)
            answers[method][mask] = np.tensordot(weights, rows.probs[:, mask], 1)
    words = metric.replace("_", " ")
    if metric == "log_loss":
        losses = [log_losses(answers[method], rows.targets).mean(1) for method in METHODS]
        choice = simplest([-loss for loss in losses], rows.groups)
        better, error = choice.chosen == 1, choice.error
        values = [float(loss.mean()) for loss in losses]
    else:
        values = [mean_average_precision(answers[method], rows.targets) for method in METHODS]
        better, error = False, 0.0
        if values[1] > values[0]:
            drawn = [
                draw_scores(
                    answers[method],
                    rows.targets,
                    rows.targets,
                    rows.groups,
                    resamples=LEAST_RESAMPLES,
                ).mean_average_precision
                for method in METHODS
            ]
            error = float(np.nanstd(drawn[1] - drawn[0]))
            better = values[1] - values[0] > error
    name: Method = "best" if better else "mean"
    other = METHODS[0] if better else METHODS[1]
    figures = (
        f"{words} {values[METHODS.index(name)]:.4f} cross-fitted, "
        f"{values[METHODS.index(other)]:.4f} of {other}"
    )
    if better:
        remark = "better by more than one standard error"
    elif error:
        remark = f"within one standard error ({error:.4f}), and simpler"
    else:
        remark = "and the simplest"
    return ChosenWeights(name, method_weights(rows, name, metric), f"{figures}; {remark}")


def fit_calibration(
    probs: np.ndarray, targets: np.ndarray, part: np.ndarray, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit slope and intercept (k,) of each label's logit; 1 and 0 unless that lowers the log loss.

    The log loss is that of calibrations fitted on other parts, and the gain must exceed one
    standard error.

    Args:
        probs: (n, k).
        targets: (n, k).
        part: (n,) part of each row.
        groups: (n,) or None.
    """
    k = probs.shape[1]
    z = _logits(probs)
    crossed = np.empty(probs.shape)
    values = np.unique(part)
    if len(values) < 2:
        return np.ones(k), np.zeros(k)
    for value in values:
        held = part == value
        slope, intercept = _fit_logistic(z[~held], targets[~held])
        crossed[held] = expit(slope * z[held] + intercept)
    plain, fitted = (log_losses(p, targets).mean(1) for p in (expit(z), crossed))
    if simplest([-plain, -fitted], groups).chosen == 0:
        return np.ones(k), np.zeros(k)
    return _fit_logistic(z, targets)


def cross_fit(
    rows: Rows, fit: Fit, declare: Callable[[np.ndarray, np.ndarray], None] | None = None
) -> CrossFitted:
    """Answer every row with an ensemble that was fitted on the rows of the other parts.

    Args:
        rows: out-of-fold rows.
        fit: fits an ensemble.
        declare: called for each fit with the rows it sees and the rows it answers, booleans (n,)
            each (`Ledger.declare`).
    """
    masks = _masks(rows)
    if declare is not None:
        for mask in masks:
            declare(~mask, mask)

    def answer(mask: np.ndarray) -> CrossFitted:
        ensemble = fit(rows.take(~mask))
        probs = ensemble(rows.probs[:, mask])
        return CrossFitted(probs, ensemble.decide(probs))

    probs, decided = np.empty(rows.targets.shape), np.empty(rows.targets.shape, np.uint8)
    for mask, answers in zip(masks, side_by_side(answer, masks), strict=True):
        probs[mask], decided[mask] = answers
    return CrossFitted(probs, decided)


def cross_fit_member(rows: Rows, member: int) -> CrossFitted:
    """Calibrate one member and choose its thresholds, cross-fitted."""
    weights = _one_hot(member, len(rows.probs))
    return cross_fit(rows, partial(fit_weighted, weights=weights))


def cross_fit_thresholds(probs: np.ndarray, targets: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return the labels (n, k) given at thresholds that other parts' rows chose; probs as is."""
    decided = np.empty(targets.shape, np.uint8)
    for value in np.unique(part):
        held = part == value
        for j in range(targets.shape[1]):
            threshold = best_f1_threshold(probs[~held, j], targets[~held, j])
            decided[held, j] = probs[held, j] >= threshold
    return decided


def _one_hot(member: int, m: int) -> np.ndarray:
    return np.asarray(np.arange(m) == member, np.float64)


def _masks(rows: Rows) -> list[np.ndarray]:
    return [rows.part == value for value in np.unique(rows.part)]


def _logits(probs: np.ndarray) -> np.ndarray:
    """Log odds of probabilities, kept between those of LEAST and 1 - LEAST."""
    return np.asarray(logit(np.clip(probs, LEAST, 1 - LEAST)))


def _fit_logistic(z: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and intercept (k,) of least log loss on logits (n, k); 1 and 0 without both kinds."""
    check_targets(targets, *z.shape)
    pairs = [_fit_label(z[:, j], targets[:, j] == 1) for j in range(z.shape[1])]
    slope, intercept = np.array(pairs).T
    return slope, intercept


def _fit_label(z: np.ndarray, has_label: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of one label, with the smoothed targets of Platt (1999).

    They keep the slope finite where the logits separate the images with the label from the others.
    """
    positives = int(has_label.sum())
    negatives = len(z) - positives
    if not positives or not negatives:
        return 1.0, 0.0
    goal = np.where(has_label, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        u = parameters[0] * z + parameters[1]
        value = -(goal * log_expit(u) + (1 - goal) * log_expit(-u)).mean()
        gap = (expit(u) - goal) / len(z)
        return float(value), np.array([gap @ z, gap.sum()])

    found = minimize(
        loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=(_SLOPES, (None, None))
    )
    return float(found.x[0]), float(found.x[1])
