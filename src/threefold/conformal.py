"""Sets of classes that hold the right one with a chosen probability, and a threshold for images of no class.

Split conformal prediction (Vovk et al. 2005; Angelopoulos and Bates 2023, "Conformal prediction: a gentle introduction"):
a score says how badly a class fits a row, and a set holds the classes whose score is at most the
ceil((n + 1) * (1 - alpha))-th smallest score of n labelled rows.

What is promised. If the labelled rows and a new row are exchangeable and answered by the same model, the set holds the
right class with probability 1 - alpha at least, over the draw of all of them; not for each image, not for each kind of
image, and not where new images come from elsewhere. Out-of-fold rows are answered by k models, and a new row by
their average, so that this proof does not apply. Sets in the style of cross-conformal prediction (Vovk 2015), which compare
each fold's rows with the same fold's model (`cross_conformal_sets`), hold the class with probability 1 - 2 * alpha at
least, but for a term that vanishes with the rows per fold (Barber et al. 2021, jackknife+ and CV+; Romano et al. 2020, for
classes); in practice 1 - alpha or more, and the more fold models disagree, the larger the sets. `ConformalSets` on pooled
out-of-fold rows is a simplification of those with no such proof. Where the average has a temperature of its own
(`calibration.fit_averaged_temperature`) its sets were smaller than those and covered about 1 - alpha (0.89 to 0.92 where 0.90 was asked);
without, an average is too unsure, and its sets are too large. Hence: measure the coverage on rows with labels that
nothing was fitted on, and quote that.

Exported files read their sets with this module, so scipy is imported only where something is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self, get_args

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError, RunError
from threefold.predictions__checks import check_labels, check_probs

if TYPE_CHECKING:
    from threefold.resampling import Interval

Method = Literal["lac", "aps", "raps"]

RAPS_PENALTY: Final = 0.01
"""What `raps` adds to the score for every rank after the free ones."""

RAPS_FREE: Final = 5
"""Ranks without penalty in `raps`; both are the values of the example in Angelopoulos and Bates 2023."""


class Coverage(NamedTuple):
    """How prediction sets did on n rows with labels.

    Attributes:
        n: number of rows.
        coverage: share of rows whose set holds the label.
        interval: Wilson's 95 % interval of the coverage, on as many rows as the groups are worth (`stats.share_interval`).
        mean_size: mean number of classes in a set.
        single: share of sets with one class.
    """

    n: int
    coverage: float
    interval: Interval
    mean_size: float
    single: float


class Rejection(NamedTuple):
    """Share of n rows that were called unknown, with Wilson's 95 % interval, on as many rows as the groups are worth."""

    n: int
    rate: float
    interval: Interval


def conformal_quantile(scores: npt.ArrayLike, alpha: float) -> float:
    """The ceil((n + 1) * (1 - alpha))-th smallest of n scores; infinity where n is too small for that rank.

    Raises:
        DataError: scores are not a list of numbers, or alpha is not between 0 and 1.
    """
    _check_share("alpha", alpha)
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or np.isnan(array).any():
        raise DataError("scores must be a list of numbers", got=f"shape {array.shape}")
    rank = math.ceil(
        (len(array) + 1) * (1 - alpha) - 1e-9
    )  # 10 * (1 - 0.1) is a little above 9 in floating point
    return float(np.partition(array, rank - 1)[rank - 1]) if rank <= len(array) else math.inf


def conformity_scores(probs: npt.ArrayLike, method: Method = "lac") -> np.ndarray:
    """How badly each class fits each row: float64 (n, k), small = fits.

    lac: 1 - probability (Sadinle et al. 2019), the smallest sets on average. aps: the sum of the probabilities of this class
    and all likelier ones (Romano et al. 2020), larger sets where the model hesitates; not randomised, so that an image always
    gets the same set, which costs size where most rows are near certain. raps: aps plus a penalty on ranks after the fifth (Angelopoulos et al. 2021), for many classes.

    Raises:
        DataError: probabilities are not usable, or the method is unknown.
    """
    array = check_probs(probs, 2).astype(np.float64)
    if method not in get_args(Method):
        raise DataError(
            "unknown conformal method", expected=" or ".join(get_args(Method)), got=method
        )
    if method == "lac":
        return np.asarray(1 - array)
    order = np.argsort(-array, axis=-1, kind="stable")
    rising = np.take_along_axis(array, order, -1).cumsum(-1)
    if method == "raps":
        rising += RAPS_PENALTY * np.maximum(np.arange(1, array.shape[1] + 1) - RAPS_FREE, 0)
    scores = np.empty_like(array)
    np.put_along_axis(scores, order, rising, -1)
    return scores


class ConformalSets:
    """Sets of classes from probabilities, by split conformal prediction; the module says what they promise.

    Args:
        method: lac, aps or raps, see `conformity_scores`.
        by_class: one threshold per class (Mondrian, Vovk et al. 2005), which aims at 1 - alpha for every class by itself.
            A class with fewer than about 1 / alpha rows cannot be left out of any set: see `always_`.
        never_empty: always put the likeliest class into the set. Where the model is right more often than 1 - alpha, exact
            sets must sometimes be empty; with this they are not, and cover more than asked.

    Attributes:
        alpha_: the share of misses that was asked for.
        thresholds_: (1,) or, by class, (k,); infinity = always in the set.
        n_: number of rows in `fit`.
        k_: number of classes.

    Raises:
        DataError: the method is unknown.
    """

    alpha_: float
    thresholds_: np.ndarray
    n_: int
    k_: int

    def __init__(
        self, method: Method = "lac", *, by_class: bool = False, never_empty: bool = True
    ) -> None:
        if method not in get_args(Method):
            raise DataError(
                "unknown conformal method", expected=" or ".join(get_args(Method)), got=method
            )
        self.method, self.by_class, self.never_empty = method, by_class, never_empty

    def fit(self, probs: npt.ArrayLike, labels: npt.ArrayLike, alpha: float = 0.1) -> Self:
        """Thresholds from probabilities (n, k) of rows that the model has not seen, calibrated as they will be in use.

        Raises:
            DataError: probabilities or labels are not usable, or alpha is not between 0 and 1.
        """
        scores = conformity_scores(probs, self.method)
        n, k = scores.shape
        truth = check_labels(labels, n, k)
        mine = scores[np.arange(n), truth]
        parts = [mine[truth == c] for c in range(k)] if self.by_class else [mine]
        self.thresholds_ = np.array([conformal_quantile(part, alpha) for part in parts])
        self.alpha_, self.n_, self.k_ = float(alpha), n, k
        return self

    @property
    def always_(self) -> np.ndarray:
        """Class numbers that are in every set because `fit` saw too few rows of them.

        Raises:
            RunError: not fitted.
        """
        self._require_fit()
        return np.flatnonzero(np.isinf(np.broadcast_to(self.thresholds_, self.k_)))

    def predict_sets(self, probs: npt.ArrayLike) -> np.ndarray:
        """Which classes are in the set of each row: booleans (n, k).

        Raises:
            DataError: probabilities are not usable, or of other classes.
            RunError: not fitted.
        """
        self._require_fit()
        scores = conformity_scores(probs, self.method)
        if scores.shape[1] != self.k_:
            raise DataError(
                "the sets were fitted on other classes",
                expected=f"{self.k_} classes",
                got=scores.shape[1],
            )
        sets = scores <= self.thresholds_
        if self.never_empty:
            sets[np.arange(len(sets)), np.asarray(probs).argmax(-1)] = True
        return np.asarray(sets)

    def measure(
        self, probs: npt.ArrayLike, labels: npt.ArrayLike, groups: npt.ArrayLike | None = None
    ) -> Coverage:
        """Coverage and size of the sets on rows that `fit` has not seen; groups (n,) as of `measure_sets`.

        Raises:
            DataError: probabilities, labels or groups are not usable.
            RunError: not fitted.
        """
        return measure_sets(self.predict_sets(probs), labels, groups)

    def state(self) -> dict[str, Any]:
        """What a model card needs, as plain values; a threshold of None = always in the set. See `from_state`.

        A reader without this package, for lac: class c is in the set where 1 - probs[c] <= thresholds[c or 0], and the
        likeliest class too if never_empty.

        Raises:
            RunError: not fitted.
        """
        self._require_fit()
        thresholds = [None if math.isinf(t) else float(t) for t in self.thresholds_]
        options = {
            "method": self.method,
            "by_class": self.by_class,
            "never_empty": self.never_empty,
        }
        return {
            **options,
            "alpha": self.alpha_,
            "n": self.n_,
            "k": self.k_,
            "thresholds": thresholds,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The sets whose `state` this is.

        Raises:
            DataError: a value is missing or cannot be.
        """
        try:
            sets = cls(
                state["method"],
                by_class=bool(state["by_class"]),
                never_empty=bool(state["never_empty"]),
            )
            sets.alpha_, sets.n_, sets.k_ = float(state["alpha"]), int(state["n"]), int(state["k"])
            sets.thresholds_ = np.array(
                [math.inf if t is None else float(t) for t in state["thresholds"]]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                "not the state of ConformalSets", got=f"{type(error).__name__} {error}"
            ) from None
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
    """Coverage and size of sets, booleans (n, k), on rows with labels (n,).

    Args:
        sets: which classes are in the set of each row.
        labels: the right class of each row.
        groups: (n,) names of what belongs together, which widens the interval; None = rows are independent.

    Raises:
        DataError: not booleans (n, k), or labels or groups are not usable.
    """
    from threefold.stats import share_interval

    array = np.asarray(sets)
    if array.dtype != np.bool_ or array.ndim != 2 or 0 in array.shape:
        raise DataError("sets must be booleans (rows, classes)", got=f"{array.dtype} {array.shape}")
    hits = array[np.arange(len(array)), check_labels(labels, *array.shape)]
    size, n = array.sum(1), len(array)
    return Coverage(
        n,
        float(hits.mean()),
        share_interval(hits, groups),
        float(size.mean()),
        float((size == 1).mean()),
    )


def cross_conformal_sets(
    oof: npt.ArrayLike,
    labels: npt.ArrayLike,
    folds: npt.ArrayLike,
    fold_probs: npt.ArrayLike,
    alpha: float = 0.1,
    method: Method = "lac",
) -> np.ndarray:
    """Sets with the guarantee of CV+ (Barber et al. 2021; Romano et al. 2020), booleans (u, k).

    Class c is in the set of a new row where (1 + #{out-of-fold rows i: score_i >= score of c by the fold model that answered
    row i}) > alpha * (n + 1).

    Args:
        oof: (n, k) out-of-fold probabilities.
        labels: (n,).
        folds: (n,) the fold whose model answered each row: 0 to f - 1, the place in `fold_probs`.
        fold_probs: (f, u, k) the new rows, answered by every fold model.
        alpha: share of misses: at most 2 * alpha is promised (but for a small term), alpha or less is seen.
        method: see `conformity_scores`.

    Raises:
        DataError: the parts are not usable or contradict each other.
    """
    _check_share("alpha", alpha)
    scores = conformity_scores(oof, method)
    n, k = scores.shape
    truth, new = check_labels(labels, n, k), check_probs(fold_probs, 3)
    fold = check_labels(folds, n, len(new))
    if new.shape[2] != k:
        raise DataError(
            "fold_probs are of other classes than oof", expected=f"{k} classes", got=new.shape[2]
        )
    mine, atypical = scores[np.arange(n), truth], np.ones(new.shape[1:])
    for f, probs in enumerate(new):
        known = np.sort(mine[fold == f])
        atypical += len(known) - np.searchsorted(
            known, conformity_scores(probs, method), side="left"
        )
    return np.asarray(atypical > alpha * (n + 1) + 1e-9)


class UnknownThreshold:
    """Calls an image unknown where the model is less sure than it is of nearly all images that belong to a class.

    The score is 1 - the largest probability (Hendrycks and Gimpel 2017). Energy needs the logits before softmax, which an
    exported file does not give; the entropy says nearly the same and cannot be read off a bar chart. It finds images on which
    the members hesitate or contradict each other, not those on which all are wrongly sure: measure it on such images.

    Attributes:
        rate_: the share of known images that may be called unknown.
        threshold_: the largest score of an image that is called known; infinity = every image is.
        n_: number of rows in `fit`.
    """

    rate_: float
    threshold_: float
    n_: int

    def fit(self, probs: npt.ArrayLike, rate: float = 0.05) -> Self:
        """Choose the threshold on probabilities (n, k) of rows that belong to a class and that the model has not seen.

        It is a conformal quantile: a new image of a class is rejected with probability `rate` at most, under the
        assumptions that the module names.

        Raises:
            DataError: probabilities are not usable, or the rate is not between 0 and 1.
        """
        _check_share("rate", rate)
        scores = self.score(probs)
        self.threshold_, self.rate_, self.n_ = (
            conformal_quantile(scores, rate),
            float(rate),
            len(scores),
        )
        return self

    @staticmethod
    def score(probs: npt.ArrayLike) -> np.ndarray:
        """1 - the largest probability, float64 (n,).

        Raises:
            DataError: probabilities are not usable.
        """
        return np.asarray(1 - check_probs(probs, 2).astype(np.float64).max(-1))

    def is_unknown(self, probs: npt.ArrayLike) -> np.ndarray:
        """Booleans (n,).

        Raises:
            DataError: probabilities are not usable.
            RunError: not fitted.
        """
        if not hasattr(self, "threshold_"):
            raise RunError("the threshold is not fitted", fix="call fit(probs, rate) first")
        return np.asarray(self.score(probs) > self.threshold_)

    def measure(self, probs: npt.ArrayLike, groups: npt.ArrayLike | None = None) -> Rejection:
        """The share that is called unknown: of known rows the false rejects, of unknown ones those found.

        Raises:
            DataError: probabilities or groups are not usable.
            RunError: not fitted.
        """
        return measure_unknown(self.is_unknown(probs), groups)

    def state(self) -> dict[str, Any]:
        """Plain values for a model card: unknown where 1 - max(probs) > threshold (None = never).

        Raises:
            RunError: not fitted.
        """
        if not hasattr(self, "threshold_"):
            raise RunError("the threshold is not fitted", fix="call fit(probs, rate) first")
        threshold = None if math.isinf(self.threshold_) else self.threshold_
        return {"score": "1 - max", "rate": self.rate_, "n": self.n_, "threshold": threshold}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The threshold whose `state` this is.

        Raises:
            DataError: a value is missing or cannot be, or the score is another one.
        """
        unknown = cls()
        try:
            limit, score = state["threshold"], state["score"]
            unknown.threshold_ = math.inf if limit is None else float(limit)
            unknown.rate_, unknown.n_ = float(state["rate"]), int(state["n"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                "not the state of UnknownThreshold", got=f"{type(error).__name__} {error}"
            ) from None
        if score != "1 - max":
            raise DataError(
                "not the state of UnknownThreshold", expected="the score 1 - max", got=score
            )
        return unknown


def measure_unknown(unknown: npt.ArrayLike, groups: npt.ArrayLike | None = None) -> Rejection:
    """Share of rows (n,), booleans, that are called unknown; groups as of `measure_sets`.

    Raises:
        DataError: not booleans (n,), or groups are not usable.
    """
    from threefold.stats import share_interval

    interval = share_interval(unknown, groups)
    flags = np.asarray(unknown)
    return Rejection(len(flags), float(flags.mean()), interval)


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise DataError(f"{name} is between 0 and 1", got=value)
