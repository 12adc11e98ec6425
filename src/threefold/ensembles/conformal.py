"""Prediction sets with a chosen coverage, and a threshold for images of no known class.

Split conformal prediction (Vovk et al. 2005; Angelopoulos and Bates 2023, "Conformal prediction: a
gentle introduction"): a score measures how badly a class fits a row, and a set contains the classes
whose score is at most the ceil((n + 1) * (1 - alpha))-th smallest score of n labelled rows.

What is guaranteed. If the labelled rows and a new row are exchangeable and are answered by the same
model, the set contains the right class with probability 1 - alpha or more, over the draw of all of
them: not for each image, not for each kind of image, and not if new images come from elsewhere.
Out-of-fold rows are answered by k models and a new row by their average, so this proof does not
apply to them, and sets from pooled out-of-fold rows have no such guarantee. An average of fold
models is less confident than each of them, which makes the sets too large. Hence: measure the
coverage on labelled rows that nothing was fitted on, and quote that.

Exported files read their sets with this module, so scipy is imported only to measure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self, get_args

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError, RunError
from threefold.predictions.checks import check_labels, check_probs
from threefold.scratch import converted, row_blocks, scratch, top_classes

if TYPE_CHECKING:
    from threefold.stats.bootstrap import Interval

Method = Literal["lac", "aps", "raps"]

RAPS_PENALTY: Final = 0.01
"""Penalty that `raps` adds to the score for every rank after the free ones."""

RAPS_FREE: Final = 5
"""Ranks without penalty in `raps`; both values are those of Angelopoulos and Bates 2023."""


class Coverage(NamedTuple):
    """Coverage and size of prediction sets on n labelled rows.

    Attributes:
        n: number of rows.
        coverage: share of rows whose set contains the label.
        interval: Wilson's 95 % interval of the coverage, on the effective number of rows if there
            are groups (`stats.share_interval`).
        mean_size: mean number of classes in a set.
        single: share of sets with exactly one class.
    """

    n: int
    coverage: float
    interval: Interval
    mean_size: float
    single: float


class Rejection(NamedTuple):
    """Share of n rows called unknown, with Wilson's 95 % interval as in `Coverage`."""

    n: int
    rate: float
    interval: Interval


def conformal_quantile(scores: npt.ArrayLike, alpha: float) -> float:
    """Return the ceil((n + 1) * (1 - alpha))-th smallest of n scores; infinity if n < that rank.

    Raises:
        DataError: scores are not a list of numbers, or alpha is not between 0 and 1.
    """
    _check_share("alpha", alpha)
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or np.isnan(array).any():
        raise DataError("scores must be a list of numbers", got=f"shape {array.shape}")
    # The tolerance absorbs rounding: 10 * (1 - 0.1) is slightly above 9 in floating point.
    rank = math.ceil((len(array) + 1) * (1 - alpha) - 1e-9)
    return float(np.partition(array, rank - 1)[rank - 1]) if rank <= len(array) else math.inf


def conformity_scores(probs: npt.ArrayLike, method: Method = "lac") -> np.ndarray:
    """Return how badly each class fits each row, float64 (n, k); small = fits.

    lac: 1 - probability (Sadinle et al. 2019); the smallest sets on average. aps: the sum of the
    probabilities of this class and all more likely ones (Romano et al. 2020); larger sets if the
    model hesitates. It is not randomized, so that an image always gets the same set, which costs
    size if most rows are near certain. raps: aps plus a penalty on ranks after the fifth
    (Angelopoulos et al. 2021), for many classes.

    Args:
        probs: (n, k).
        method: lac, aps or raps.

    Raises:
        DataError: probabilities are not usable, or the method is unknown.
    """
    array = converted(check_probs(probs, 2), np.float64)
    _check_method(method)
    if method == "lac":
        return np.asarray(1 - array)
    order = np.argsort(-array, axis=-1, kind="stable")
    cumulative = np.take_along_axis(array, order, -1).cumsum(-1)
    if method == "raps":
        cumulative += RAPS_PENALTY * np.maximum(np.arange(1, array.shape[1] + 1) - RAPS_FREE, 0)
    scores = np.empty_like(array)
    np.put_along_axis(scores, order, cumulative, -1)
    return scores


class ConformalSets:
    """Prediction sets by split conformal prediction; the module docstring says what they guarantee.

    Args:
        method: lac, aps or raps, see `conformity_scores`.
        by_class: one threshold per class (Mondrian, Vovk et al. 2005), which aims at 1 - alpha for
            every class separately. A class with fewer than about 1 / alpha rows is in every set.
        never_empty: always include the most likely class. If the model is right more often than
            1 - alpha, exact sets must sometimes be empty; these are not, and cover more.

    Attributes:
        alpha: the share of sets that may miss the right class, as passed to `fit`.
        thresholds_: (1,) or, by class, (k,); infinity = always in the set.
        n_: number of rows in `fit`.
        k_: number of classes.

    Raises:
        DataError: the method is unknown.
    """

    alpha: float
    thresholds_: np.ndarray
    n_: int
    k_: int

    def __init__(
        self, method: Method = "lac", *, by_class: bool = False, never_empty: bool = True
    ) -> None:
        _check_method(method)
        self.method, self.by_class, self.never_empty = method, by_class, never_empty

    def fit(self, probs: npt.ArrayLike, labels: npt.ArrayLike, alpha: float = 0.1) -> Self:
        """Fit the thresholds on rows that the model has not seen.

        Args:
            probs: (n, k), calibrated as they will be in use.
            labels: (n,).
            alpha: share of sets that may miss the right class.

        Raises:
            DataError: probabilities or labels are not usable, or alpha is not between 0 and 1.
        """
        array = check_probs(probs, 2)
        n, k = array.shape
        truth, true_scores = check_labels(labels, n, k), np.empty(n)
        for rows in row_blocks(n, k):
            scores, own = conformity_scores(array[rows], self.method), truth[rows]
            true_scores[rows] = scores[np.arange(len(own)), own]
        parts = [true_scores[truth == c] for c in range(k)] if self.by_class else [true_scores]
        self.thresholds_ = np.array([conformal_quantile(part, alpha) for part in parts])
        self.alpha, self.n_, self.k_ = float(alpha), n, k
        return self

    def predict_sets(self, probs: npt.ArrayLike) -> np.ndarray:
        """Return which classes are in the set of each row, booleans (n, k).

        Raises:
            DataError: probabilities are not usable, or have other classes than in `fit`.
            RunError: not fitted.
        """
        self._require_fit()
        array = check_probs(probs, 2)
        if array.shape[1] != self.k_:
            raise DataError(
                "the sets were fitted on other classes",
                expected=f"{self.k_} classes",
                got=array.shape[1],
            )
        sets = scratch(array.shape, bool)
        for rows in row_blocks(*array.shape):
            sets[rows] = conformity_scores(array[rows], self.method) <= self.thresholds_
        if self.never_empty:
            sets[np.arange(len(sets)), top_classes(array)] = True
        return sets

    def measure(
        self, probs: npt.ArrayLike, labels: npt.ArrayLike, groups: npt.ArrayLike | None = None
    ) -> Coverage:
        """Measure coverage and size of the sets on rows that `fit` has not seen.

        The arguments are those of `measure_sets`, with probabilities (n, k) in place of sets.

        Raises:
            DataError: probabilities, labels or groups are not usable.
            RunError: not fitted.
        """
        return measure_sets(self.predict_sets(probs), labels, groups)

    def state(self) -> dict[str, Any]:
        """Return plain values for the model card; a threshold of None = always in the set.

        To read them without this package, for lac: class c is in the set if 1 - probs[c] <=
        thresholds[c or 0], and so is the most likely class if never_empty.

        Raises:
            RunError: not fitted.
        """
        self._require_fit()
        thresholds = [None if math.isinf(t) else float(t) for t in self.thresholds_]
        return {
            "method": self.method,
            "by_class": self.by_class,
            "never_empty": self.never_empty,
            "alpha": self.alpha,
            "n": self.n_,
            "k": self.k_,
            "thresholds": thresholds,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Restore the sets from their `state`.

        Raises:
            DataError: a value is missing or invalid.
        """
        try:
            sets = cls(
                state["method"],
                by_class=bool(state["by_class"]),
                never_empty=bool(state["never_empty"]),
            )
            sets.alpha, sets.n_, sets.k_ = float(state["alpha"]), int(state["n"]), int(state["k"])
            sets.thresholds_ = np.array(
                [math.inf if t is None else float(t) for t in state["thresholds"]]
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                "not the state of ConformalSets", got=f"{type(error).__name__} {error}"
            ) from None
        if not 0 < sets.alpha < 1 or np.isnan(sets.thresholds_).any():
            raise DataError(
                "not the state of ConformalSets",
                expected="alpha in 0..1 and thresholds that are numbers",
                got=f"alpha {sets.alpha}",
            )
        if len(sets.thresholds_) != (sets.k_ if sets.by_class else 1):
            raise DataError(
                "not the state of ConformalSets", got=f"{len(sets.thresholds_)} thresholds"
            )
        return sets

    def _require_fit(self) -> None:
        if not hasattr(self, "thresholds_"):
            raise RunError("the sets are not fitted", fix="call fit(probs, labels, alpha) first")


def measure_sets(
    sets: npt.ArrayLike, labels: npt.ArrayLike, groups: npt.ArrayLike | None = None
) -> Coverage:
    """Measure the coverage and size of prediction sets.

    Args:
        sets: (n, k) booleans: which classes are in the set of each row.
        labels: (n,) the right class of each row.
        groups: (n,) group names, which widen the interval; None = rows are independent.

    Raises:
        DataError: not booleans (n, k), or labels or groups are not usable.
    """
    from threefold.stats.scores import share_interval

    array = np.asarray(sets)
    if array.dtype != np.bool_ or array.ndim != 2 or 0 in array.shape:
        raise DataError("sets must be booleans (rows, classes)", got=f"{array.dtype} {array.shape}")
    hits = array[np.arange(len(array)), check_labels(labels, *array.shape)]
    sizes = array.sum(1)
    return Coverage(
        n=len(array),
        coverage=float(hits.mean()),
        interval=share_interval(hits, groups),
        mean_size=float(sizes.mean()),
        single=float((sizes == 1).mean()),
    )


class UnknownThreshold:
    """Calls an image unknown if the model is less sure of it than of nearly all known images.

    The score is 1 - the largest probability (Hendrycks and Gimpel 2017). The energy score needs
    logits, which an exported file does not return; entropy says nearly the same and cannot be read
    off a bar chart. The score detects images on which the members hesitate or contradict each
    other, not those on which all are confidently wrong: measure it on such images.

    Attributes:
        rate_: share of known images that may be called unknown.
        threshold_: the largest score of an image that is called known; infinity = all are known.
        n_: number of rows in `fit`.
    """

    rate_: float
    threshold_: float
    n_: int

    def fit(self, probs: npt.ArrayLike, rate: float = 0.05) -> Self:
        """Fit the threshold on known images that the model has not seen.

        It is a conformal quantile: a new image of a known class is rejected with probability `rate`
        at most, under the assumptions in the module docstring.

        Args:
            probs: (n, k) probabilities of images of the known classes.
            rate: share of known images that may be called unknown.

        Raises:
            DataError: probabilities are not usable, or the rate is not between 0 and 1.
        """
        _check_share("rate", rate)
        scores = self.score(probs)
        self.threshold_ = conformal_quantile(scores, rate)
        self.rate_ = float(rate)
        self.n_ = len(scores)
        return self

    @staticmethod
    def score(probs: npt.ArrayLike) -> np.ndarray:
        """Return 1 - the largest probability, float64 (n,).

        Raises:
            DataError: probabilities are not usable.
        """
        return np.asarray(1 - check_probs(probs, 2).max(-1).astype(np.float64))

    def is_unknown(self, probs: npt.ArrayLike) -> np.ndarray:
        """Return whether each row is unknown, booleans (n,).

        Raises:
            DataError: probabilities are not usable.
            RunError: not fitted.
        """
        self._require_fit()
        return np.asarray(self.score(probs) > self.threshold_)

    def measure(self, probs: npt.ArrayLike, groups: npt.ArrayLike | None = None) -> Rejection:
        """Measure the share of rows called unknown.

        Of images of known classes these are the false rejections, of others the detections.

        Raises:
            DataError: probabilities or groups are not usable.
            RunError: not fitted.
        """
        return measure_unknown(self.is_unknown(probs), groups)

    def state(self) -> dict[str, Any]:
        """Return plain values for the model card.

        An image is unknown if 1 - max(probs) > threshold; None = never.

        Raises:
            RunError: not fitted.
        """
        self._require_fit()
        threshold = None if math.isinf(self.threshold_) else self.threshold_
        return {"score": "1 - max", "rate": self.rate_, "n": self.n_, "threshold": threshold}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Restore the threshold from its `state`.

        Raises:
            DataError: a value is missing or invalid, or the score is a different one.
        """
        unknown = cls()
        try:
            limit, score = state["threshold"], state["score"]
            unknown.threshold_ = math.inf if limit is None else float(limit)
            unknown.rate_, unknown.n_ = float(state["rate"]), int(state["n"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                "not the state of UnknownThreshold", got=f"{type(error).__name__} {error}"
            ) from None
        if math.isnan(unknown.threshold_) or not 0 <= unknown.rate_ <= 1:
            raise DataError(
                "not the state of UnknownThreshold",
                expected="a threshold that is a number, and a rate in 0..1",
                got=f"threshold {unknown.threshold_}, rate {unknown.rate_}",
            )
        if score != "1 - max":
            raise DataError(
                "not the state of UnknownThreshold", expected="the score 1 - max", got=score
            )
        return unknown

    def _require_fit(self) -> None:
        if not hasattr(self, "threshold_"):
            raise RunError("the threshold is not fitted", fix="call fit(probs, rate) first")


def measure_unknown(unknown: npt.ArrayLike, groups: npt.ArrayLike | None = None) -> Rejection:
    """Measure the share of rows called unknown.

    Args:
        unknown: (n,) booleans.
        groups: (n,) group names, which widen the interval; None = rows are independent.

    Raises:
        DataError: not booleans (n,), or groups are not usable.
    """
    from threefold.stats.scores import share_interval

    interval = share_interval(unknown, groups)
    flags = np.asarray(unknown)
    return Rejection(n=len(flags), rate=float(flags.mean()), interval=interval)


def _check_method(method: str) -> None:
    if method not in get_args(Method):
        raise DataError(
            "unknown conformal method", expected=" or ".join(get_args(Method)), got=method
        )


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise DataError(f"{name} is between 0 and 1", got=value)
