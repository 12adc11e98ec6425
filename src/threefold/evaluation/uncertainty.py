"""Prediction sets and the unknown threshold of the exported ensemble.

`conformal` has the methods and says what they guarantee. Here they are fitted on the calibrated,
cross-fitted out-of-fold probabilities of the exported ensemble, measured on rows that nothing was
fitted on, and converted for results.json and the model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from threefold.ensembles.conformal import (
    ConformalSets,
    Coverage,
    Rejection,
    UnknownThreshold,
    measure_sets,
    measure_unknown,
)
from threefold.ensembles.cross_fit import cross_fit_parts
from threefold.errors import DataError
from threefold.evaluation.scoring import CROSS_FITTED
from threefold.predictions.checks import check_labels, check_probs
from threefold.scratch import scratch, take_rows
from threefold.stats.bootstrap import check_groups


@dataclass(frozen=True)
class Uncertainty:
    """Prediction sets and the unknown threshold of one ensemble, and their figures.

    Attributes:
        alpha: share of sets that may miss the right class.
        reject: share of images of known classes that may be called unknown.
        sets: lac sets with one threshold for all classes, and with one threshold per class.
        coverage: coverage of each of the sets on `rows`.
        unknown: the threshold of the largest probability.
        rejection: share of images of known classes that are called unknown, on `rows`.
        rows: name of the rows of the figures: "oof, cross-fitted", or the argument of `measure`.
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
        """Return the same thresholds with figures on rows that nothing was fitted on.

        Args:
            probs: (n, k) calibrated answers of the exported file.
            labels: (n,).
            rows: name of the rows in the report.
            groups: (n,) group names; the intervals then hold for new groups.

        Raises:
            DataError: probabilities, labels or groups are not usable.
        """
        first, second = (sets.measure(probs, labels, groups) for sets in self.sets)
        return replace(
            self, coverage=(first, second), rejection=self.unknown.measure(probs, groups), rows=rows
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for results.json: alpha, sets (marginal, by class) and unknown."""
        sets = [
            {
                "by_class": method.by_class,
                "state": method.state(),
                **coverage._asdict(),
                "interval": list(coverage.interval),
                "rows": self.rows,
            }
            for method, coverage in zip(self.sets, self.coverage, strict=True)
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


def uncertainty_card(uncertainty: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model card's entries "conformal" and "unknown" from `Uncertainty.as_dict`.

    Raises:
        DataError: `uncertainty` is not the result of `as_dict`.
    """
    try:
        sets = [dict(entry) for entry in uncertainty["sets"]]
        unknown = dict(uncertainty["unknown"])
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
    """Fit sets and threshold on out-of-fold rows, with cross-fitted figures on the same rows.

    Groups. The guarantee of `conformal` needs rows that are exchangeable with the new image. Rows
    of one group (images of one patient) are not. With groups it holds at best for a new image of
    the groups that are already there. For an image of a new group it holds only approximately,
    depending on how well the groups represent it, however many rows there are; a large group counts
    by its rows. It is no guarantee for each group. The thresholds are the same with and without
    groups. What changes is the measurement: groups stay whole in the cross-fit, so that the
    coverage is that on groups the thresholds have not seen, and the intervals count groups, not
    rows (`stats.share_interval`). Whether the models have seen other rows of a group depends on the
    run's folds.

    Args:
        oof_probs: (n, k) calibrated, cross-fitted out-of-fold probabilities of the ensemble.
        labels: (n,).
        alpha: share of sets that may miss the right class.
        reject: share of images of known classes that may be called unknown.
        groups: (n,) group names, or None.
        folds: (n,) the part of each row in the cross-fit of the figures, ignored if it splits a
            group; None = `stratified_parts`.

    Raises:
        DataError: probabilities, labels, folds or groups are not usable, a share is not between 0
            and 1, or there are fewer than two parts.
    """
    probs = check_probs(oof_probs, 2)
    truth = check_labels(labels, *probs.shape)
    part = _parts(truth, groups, folds)
    sets = (
        ConformalSets().fit(probs, truth, alpha),
        ConformalSets(by_class=True).fit(probs, truth, alpha),
    )
    crossed, rejected = scratch((2, *probs.shape), bool), np.zeros(len(probs), bool)
    for value in np.unique(part):
        inside = part == value
        rest, rest_labels = take_rows(probs, ~inside), truth[~inside]
        inside_probs = take_rows(probs, inside)
        for crossed_sets, by_class in zip(crossed, (False, True), strict=True):
            fitted = ConformalSets(by_class=by_class).fit(rest, rest_labels, alpha)
            crossed_sets[inside] = fitted.predict_sets(inside_probs)
        rejected[inside] = UnknownThreshold().fit(rest, reject).is_unknown(inside_probs)
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
    """Return the part of each row: the folds, or stratified parts if they split a group."""
    if groups is None:
        return cross_fit_parts(labels, folds)
    codes = check_groups(groups, len(labels))
    names = [str(code) for code in codes]
    part = cross_fit_parts(labels, folds, names)
    return cross_fit_parts(labels, groups=names) if _splits_groups(part, codes) else part


def _splits_groups(part: np.ndarray, codes: np.ndarray) -> bool:
    """Return whether rows of one group are in two parts."""
    pairs = np.unique(np.stack([codes, np.unique(part, return_inverse=True)[1]]), axis=1)
    return bool(pairs.shape[1] > codes.max() + 1)
