"""Tables of scores of several labels per image, with intervals by bootstrap over images or groups.

`probs`, `targets` and NaN are as in `multilabel`; `groups` is (n,) names of patients, scenes and
the like, or None.

Draws of a nearly perfect ranking are nearly all perfect: where 15 images have a label, a 95 %
percentile interval of an average precision of 0.97 covers it in half of all samples. So the
interval of a label is the wider, at each end, of the percentiles and of Wilson's interval with the
images that have the label as trials (the binomial interval of Boyd et al. 2013); that of the mean
over labels is the wider of the percentiles and of the labels' intervals put together (MOVER, Zou
and Donner 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError
from threefold.predictions.checks import check_targets
from threefold.stats.bootstrap import (
    LEVEL,
    RESAMPLES,
    Interval,
    check_draws,
    check_groups,
    percentile_interval,
    row_weights,
)
from threefold.stats.multilabel import (
    average_precision,
    brier,
    checked,
    label_ece,
    log_loss,
    log_losses,
    macro_f1,
    mean_average_precision,
    mean_of_defined,
    micro_f1,
    weighted_f1,
    weighted_precisions,
)
from threefold.stats.scores import binary_scores, share_interval, wilson_interval

LEAST_RESAMPLES: Final = 200
"""Fewest draws, of very large tables: five lie beyond each end of a 95 % interval."""

_CELLS: Final = 400_000_000
"""Rows x labels x draws that are scored in a few seconds; larger tables get fewer draws."""


class Draws(NamedTuple):
    """Scores of r bootstrap draws; those of two answers to the same rows are paired.

    Attributes:
        average_precision: (k, r) of each label.
        mean_average_precision: (r,), the mean over labels.
        macro_f1: (r,), the mean of the labels' F1.
        micro_f1: (r,), F1 of all pairs of image and label together.
    """

    average_precision: np.ndarray
    mean_average_precision: np.ndarray
    macro_f1: np.ndarray
    micro_f1: np.ndarray


def draw_scores(
    probs: npt.ArrayLike,
    decided: npt.ArrayLike,
    targets: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> Draws:
    """Score bootstrap draws of the images, or of whole groups (Efron 1979).

    Args:
        probs: (n, k).
        decided: (n, k) zeros and ones, the labels that each image is given.
        targets: (n, k).
        groups: (n,) names, or None.
        resamples: number of draws; None = RESAMPLES, or fewer for more than 200,000 rows x labels.
        seed: of the draws. Equal seeds draw the same rows.

    Raises:
        DataError: an array is not usable.
    """
    array, truth = checked(probs, targets)
    given = check_targets(decided, *truth.shape).astype(np.float64)
    part = None if groups is None else check_groups(groups, len(truth))
    if resamples is None:
        resamples = max(LEAST_RESAMPLES, min(RESAMPLES, _CELLS // truth.size))
    drawn = []
    for weights in row_weights(len(truth), part, resamples, seed):
        precisions = weighted_precisions(array, truth, weights)
        counts = weighted_f1(given, truth, weights)
        drawn.append(
            Draws(
                precisions,
                mean_of_defined(precisions),
                mean_of_defined(counts.f1),
                counts.micro_f1,
            )
        )
    return Draws(*(np.concatenate(parts, -1) for parts in zip(*drawn, strict=True)))


def score_table(
    probs: npt.ArrayLike,
    decided: npt.ArrayLike,
    targets: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    level: float = LEVEL,
    draws: Draws | None = None,
) -> dict[str, Any]:
    """All scores of one answer to several labels per image, as in an entry of results.json.

    Args:
        probs: (n, k).
        decided: (n, k) zeros and ones, the labels that each image is given.
        targets: (n, k).
        groups: (n,) names, or None.
        level: confidence level.
        draws: of these arrays (`draw_scores`), where they are known.

    Returns:
        n, level, mean_average_precision, macro_f1, micro_f1 and subset_accuracy, each with an
        interval (name_interval); log_loss and brier.

    Raises:
        DataError: an array is not usable, or no image has a label.
    """
    array, truth = checked(probs, targets)
    given = check_targets(decided, *truth.shape)
    if not truth.any():
        raise DataError("the scores are not defined", got="no image has a label")
    draws = draw_scores(array, given, truth, groups) if draws is None else draws
    check_draws(level, len(draws.micro_f1))
    exact = (given == truth).all(1)
    all_right = share_interval(exact, groups, level)
    table: dict[str, Any] = {
        "n": len(truth),
        "level": level,
        "subset_accuracy": float(exact.mean()),
        "subset_accuracy_interval": tuple(all_right),
        "log_loss": log_loss(array, truth),
        "brier": brier(array, truth),
    }
    ranked = _label_precisions(array, truth, groups, level)
    marks = _label_f1(given, truth, groups, level)
    table["mean_average_precision"] = mean_average_precision(array, truth)
    table["mean_average_precision_interval"] = _mean_interval(
        ranked, draws.mean_average_precision, level
    )
    table["macro_f1"] = macro_f1(given, truth)
    table["macro_f1_interval"] = _mean_interval(marks, draws.macro_f1, level)
    micro = micro_f1(given, truth)
    # Draws of a perfect answer are all perfect: the share of perfect images has a width.
    ends = all_right if micro == 1 else percentile_interval(draws.micro_f1, level)
    table["micro_f1"], table["micro_f1_interval"] = micro, tuple(ends)
    return table


def label_table(
    probs: npt.ArrayLike,
    decided: npt.ArrayLike,
    targets: npt.ArrayLike,
    classes: Sequence[str],
    groups: npt.ArrayLike | None = None,
    *,
    level: float = LEVEL,
    draws: Draws | None = None,
) -> list[dict[str, Any]]:
    """Scores of each label.

    Intervals of recall, precision and F1 are as those of `scores.per_class`, with a width even
    where all or no images are right.

    Args:
        probs: (n, k).
        decided: (n, k) zeros and ones, the labels that each image is given.
        targets: (n, k).
        classes: k names.
        groups: (n,) names, or None.
        level: confidence level.
        draws: of these arrays (`draw_scores`), where they are known.

    Returns:
        One entry per label: class, n (images with the label), average_precision and its interval,
        recall, precision and f1 with theirs, log_loss, brier and ece.

    Raises:
        DataError: an array is not usable, or the number of names is wrong.
    """
    array, truth = checked(probs, targets)
    given = check_targets(decided, *truth.shape)
    if len(classes) != truth.shape[1]:
        raise DataError("names do not match the labels", expected=truth.shape[1], got=len(classes))
    draws = draw_scores(array, given, truth, groups) if draws is None else draws
    part = None if groups is None else check_groups(groups, len(truth))
    ranked = _label_precisions(array, truth, groups, level)
    losses = log_losses(array, truth)
    entries = []
    for j, name in enumerate(classes):
        has_label = truth[:, j] == 1
        decisions = binary_scores(has_label, given[:, j] == 1, part, level)
        decisions["recall_interval"] = decisions.pop("interval")
        entry: dict[str, Any] = {
            "class": name,
            "average_precision": None,
            "average_precision_interval": None,
            **decisions,
            "log_loss": float(losses[:, j].mean()),
            "brier": float(((array[:, j] - truth[:, j]) ** 2).mean()),
            "ece": label_ece(array[:, j], truth[:, j]),
        }
        if has_label.any():
            wilson = ranked.intervals[j]
            low, high = percentile_interval(draws.average_precision[j], level)
            entry["average_precision"] = float(ranked.values[j])
            entry["average_precision_interval"] = (min(low, wilson.low), max(high, wilson.high))
        entries.append(entry)
    return entries


def difference_interval(
    estimate: float, drawn: np.ndarray, level: float = LEVEL
) -> tuple[Interval, float]:
    """Percentile interval and p-value of a paired difference from its bootstrap draws.

    The p-value is twice the share of draws on the far side of no difference, and at least
    2 / (draws + 1); draws of exactly no difference count on both sides.

    Args:
        estimate: the difference on all rows; 1 is returned where it is 0 in all draws.
        drawn: (r,) differences of the draws.
        level: confidence level.
    """
    defined = drawn[~np.isnan(drawn)]
    if estimate == 0 and not defined.any():
        return Interval(0.0, 0.0), 1.0
    below = (1 + (defined <= 0).sum()) / (len(defined) + 1)
    above = (1 + (defined >= 0).sum()) / (len(defined) + 1)
    return percentile_interval(drawn, level), float(min(1.0, 2 * min(below, above)))


class _LabelScores(NamedTuple):
    """Scores of the labels, 0 to 1, and their intervals by Wilson; NaN where there is none.

    Attributes:
        values: (k,).
        intervals: k intervals.
    """

    values: np.ndarray
    intervals: list[Interval]


def _label_precisions(
    probs: np.ndarray, targets: np.ndarray, groups: npt.ArrayLike | None, level: float
) -> _LabelScores:
    """Average precisions, with the images that have the label as trials.

    With groups there are as many trials as if a group's images were one, weighted by their number.
    """
    values = average_precision(probs, targets)
    trials = targets.sum(0)
    if groups is not None:
        part = check_groups(groups, len(targets))
        sizes = np.array([np.bincount(part, column) for column in targets.T])
        trials = trials**2 / np.maximum((sizes**2).sum(1), 1)
    intervals = [
        wilson_interval(min(value * n, n), n, level) if n else Interval(np.nan, np.nan)
        for value, n in zip(values.tolist(), trials.tolist(), strict=True)
    ]
    return _LabelScores(values, intervals)


def _label_f1(
    decided: np.ndarray, targets: np.ndarray, groups: npt.ArrayLike | None, level: float
) -> _LabelScores:
    part = None if groups is None else check_groups(groups, len(targets))
    entries = [
        binary_scores(truth == 1, given == 1, part, level)
        for truth, given in zip(targets.T, decided.T, strict=True)
    ]
    values = [np.nan if entry["f1"] is None else entry["f1"] for entry in entries]
    return _LabelScores(np.array(values), [Interval(*entry["f1_interval"]) for entry in entries])


def _mean_interval(scores: _LabelScores, drawn: np.ndarray, level: float) -> tuple[float, float]:
    """Interval of the mean over labels: the wider of the percentiles of the draws and of MOVER."""
    defined = ~np.isnan(scores.values)
    values, ends = scores.values[defined], np.array(scores.intervals)[defined]
    mean, count = float(values.mean()), len(values)
    below = float(np.sqrt(((values - ends[:, 0]) ** 2).sum())) / count
    above = float(np.sqrt(((ends[:, 1] - values) ** 2).sum())) / count
    low, high = percentile_interval(drawn, level)
    return max(0.0, min(low, mean - below)), min(1.0, max(high, mean + above))
