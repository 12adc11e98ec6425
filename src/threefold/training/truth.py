"""What networks learn: one class for each image, (n,), or any number of labels, (n, k).

Everything that compares answers (n, k) with either of the two is here.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from threefold.stats.multilabel import log_losses as label_losses
from threefold.stats.multilabel import mean_average_precision, mean_of_defined, weighted_precisions
from threefold.stats.weighted_scores import WeightedScore, check_score, log_losses, score_value
from threefold.tasks import Task


def task_of(truth: np.ndarray | Tensor) -> Task:
    """Return the task of labels (n,) or targets (n, k)."""
    return "multilabel" if truth.ndim == 2 else "multiclass"


def row_losses(probs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the log loss (n,) of each image; of any number of labels, the mean over them."""
    if truth.ndim == 2:
        return np.asarray(label_losses(probs, truth).mean(1))
    return log_losses(probs, truth)


def right_share(probs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return for each image (n,) whether its class is right, or the share of its labels that are.

    A label is given from a probability of one half on.
    """
    if truth.ndim == 2:
        return np.asarray(((probs >= 0.5) == (truth == 1)).mean(1))
    return np.asarray(probs.argmax(1) == truth)


def metric_value(metric: str, probs: np.ndarray, truth: np.ndarray) -> float:
    """Return a metric of `train.metric`; NaN if it is not defined on these rows."""
    if metric == "mean_average_precision":
        return mean_average_precision(probs, truth)
    if metric == "log_loss":
        return float(row_losses(probs, truth).mean())
    return score_value(metric, probs, truth)


def weighted_metric(metric: str) -> WeightedScore:
    """Return a metric as a function of probs, truth and weights (n, r), for a bootstrap."""
    if metric == "mean_average_precision":
        return _weighted_precision
    return check_score(metric)


def _weighted_precision(probs: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return mean_of_defined(weighted_precisions(probs, truth.astype(np.float64), weights))


def describe_quality(probs: np.ndarray, truth: np.ndarray) -> str:
    """Return the accuracy, or the mean average precision of any number of labels, in words."""
    if truth.ndim == 2:
        return f"mAP {mean_average_precision(probs, truth):.3f}"
    return f"{right_share(probs, truth).mean():.1%}"
