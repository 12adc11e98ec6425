"""What an ensemble's answers hold besides the likeliest class: sets of classes, and a mark for images of no class.

`conformal` has the methods and says what they promise. Here they are fitted on the calibrated, cross-fitted out-of-fold
probabilities of the ensemble that is exported, measured on rows that nothing was fitted on, and written down for
results.json and the model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from threefold.conformal import (
    ConformalSets,
    Coverage,
    Rejection,
    UnknownThreshold,
    measure_sets,
    measure_unknown,
)
from threefold.crossfit import stratified_parts
from threefold.errors import DataError
from threefold.predictions__checks import check_labels, check_probs
from threefold.resampling import check_groups

CROSS_FITTED: Final = "oof, cross-fitted"
"""Where figures come from without rows that nothing was fitted on: thresholds of the other parts' out-of-fold rows."""


@dataclass(frozen=True)
class Uncertainty:
    """Prediction sets and the unknown threshold of one ensemble, and how they did.

    Attributes:
        alpha: share of sets that may miss the right class.
        reject: share of images of a class that may be called unknown.
        sets: lac sets, with one threshold for all classes and with one for each class.
        coverage: of each of the sets, on `rows`.
        unknown: the threshold of the likeliest class' probability.
        rejection: share of images of a class that are called unknown, on `rows`.
        rows: the rows of the figures, "oof, cross-fitted" or as told to `measure`.
    """

    alpha: float
    reject: float
    sets: tuple[ConformalSets, ConformalSets]
    coverage: tuple[Coverage, Coverage]
    unknown: UnknownThreshold
    rejection: Rejection
    rows: str

    def measure(
        self,
        probs: npt.ArrayLike,
        labels: npt.ArrayLike,
        rows: str = "test",
        groups: npt.ArrayLike | None = None,
    ) -> Uncertainty:
        """The same thresholds with the figures of rows that nothing was fitted on.

        Args:
            probs: (n, k) what the exported file answers on them, calibrated.
            labels: (n,).
            rows: what they are called in the report.
            groups: (n,) names of what belongs together; the intervals then speak of other groups.

        Raises:
            DataError: probabilities, labels or groups are not usable.
        """
        first, second = (sets.measure(probs, labels, groups) for sets in self.sets)
        return replace(
            self, coverage=(first, second), rejection=self.unknown.measure(probs, groups), rows=rows
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for results.json: alpha, sets (marginal, by class) and unknown, each with state and figures."""
        sets = [
            {
                "by_class": method.by_class,
                "state": method.state(),
                **found._asdict(),
                "interval": list(found.interval),
                "rows": self.rows,
            }
            for method, found in zip(self.sets, self.coverage, strict=True)
        ]
        unknown = {
            "state": self.unknown.state(),
            "rate": self.reject,
            "measured": self.rejection.rate,
            "interval": list(self.rejection.interval),
            "n": self.rejection.n,
            "rows": self.rows,
        }
        return {"alpha": self.alpha, "sets": sets, "unknown": unknown}


def uncertainty_card(told: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the model card from `Uncertainty.as_dict`: "conformal", the sets, and "unknown"; see `runtime.Model`.

    Raises:
        DataError: not what `as_dict` gives.
    """
    try:
        sets, unknown = [dict(entry) for entry in told["sets"]], dict(told["unknown"])
        for entry in sets:
            ConformalSets.from_state(entry["state"])
        UnknownThreshold.from_state(unknown["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "not the uncertainty of a run", got=f"{type(error).__name__} {error}"
        ) from None
    return {"conformal": sets, "unknown": unknown}


def fit_uncertainty(
    oof_probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    alpha: float = 0.1,
    reject: float = 0.05,
    groups: npt.ArrayLike | None = None,
    folds: npt.ArrayLike | None = None,
) -> Uncertainty:
    """Fit sets and threshold on out-of-fold rows; the figures are cross-fitted on these rows until `measure` has others.

    Groups. The promise of `conformal` needs rows that are exchangeable with the new image. Rows of one group (images of
    one patient) are not: with groups it holds for a new image of the groups that are already there at best, and for one of
    a new group only about, as well as the groups stand for it and however many rows there are; a large group counts by
    its rows. By group it is no promise at all. The thresholds are the same with and without groups. What changes is the
    measurement: groups stay whole in the cross-fit, so that coverage is that on groups which the thresholds have not seen, and
    the intervals count groups, not rows (`stats.share_interval`). Whether the models had seen other rows of a group is
    up to the run's folds.

    Args:
        oof_probs: (n, k) calibrated, cross-fitted out-of-fold probabilities of the ensemble that is exported.
        labels: (n,).
        alpha: share of sets that may miss the right class.
        reject: share of images of a class that may be called unknown.
        groups: (n,) names of what belongs together, or None.
        folds: (n,) the part of each row in the cross-fit of the figures; not used where they tear groups apart. None =
            `stratified_parts`, classes or whole groups spread over them.

    Raises:
        DataError: probabilities, labels, folds or groups are not usable, a share is not between 0 and 1, or the rows make
            fewer than two parts.
    """
    probs = check_probs(oof_probs, 2)
    truth = check_labels(labels, *probs.shape)
    part = _parts(truth, groups, folds)
    sets = (
        ConformalSets().fit(probs, truth, alpha),
        ConformalSets(by_class=True).fit(probs, truth, alpha),
    )
    crossed, rejected = np.zeros((2, *probs.shape), bool), np.zeros(len(probs), bool)
    for value in np.unique(part):
        held = part == value
        for found, by_class in zip(crossed, (False, True), strict=True):
            fitted = ConformalSets(by_class=by_class).fit(probs[~held], truth[~held], alpha)
            found[held] = fitted.predict_sets(probs[held])
        rejected[held] = UnknownThreshold().fit(probs[~held], reject).is_unknown(probs[held])
    return Uncertainty(
        alpha=alpha,
        reject=reject,
        sets=sets,
        coverage=(measure_sets(crossed[0], truth, groups), measure_sets(crossed[1], truth, groups)),
        unknown=UnknownThreshold().fit(probs, reject),
        rejection=measure_unknown(rejected, groups),
        rows=CROSS_FITTED,
    )


def _parts(
    labels: np.ndarray, groups: npt.ArrayLike | None, folds: npt.ArrayLike | None
) -> np.ndarray:
    """The part of each row: the folds, unless they tear groups apart, or parts of whole groups."""
    number = None if groups is None else check_groups(groups, len(labels))
    part = None if folds is None else np.asarray(folds)
    if part is not None and part.shape != labels.shape:
        raise DataError(
            "folds have the wrong shape", expected=f"({len(labels)},), one per row", got=part.shape
        )
    if part is None or (number is not None and _torn(part, number)):
        part = stratified_parts(labels, None if number is None else [str(g) for g in number])
    if len(np.unique(part)) < 2:
        raise DataError(
            "rows cannot be cross-fitted", expected="two parts at least", got="all rows in one"
        )
    return part


def _torn(part: np.ndarray, number: np.ndarray) -> bool:
    """Whether rows of one group are in two parts."""
    pairs = np.unique(np.stack([number, np.unique(part, return_inverse=True)[1]]), axis=1)
    return bool(pairs.shape[1] > number.max() + 1)
