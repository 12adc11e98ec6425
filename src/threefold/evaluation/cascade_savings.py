"""The savings of a cascade and their price, measured on rows its thresholds have not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from threefold.ensembles.cascade import Cascade, CascadeAnswers, disagreement_bound
from threefold.ensembles.cross_fit import cross_fit_parts
from threefold.errors import DataError
from threefold.evaluation.scoring import CROSS_FITTED
from threefold.predictions.checks import check_labels, check_probs
from threefold.stats.bootstrap import LEVEL
from threefold.stats.paired_differences import paired_bootstrap
from threefold.stats.paired_tests import mcnemar_exact
from threefold.stats.scores import paired_interval, share_interval


class Saving(NamedTuple):
    """A cascade against its full ensemble, on n labelled rows.

    Attributes:
        n: number of rows.
        accuracy, full: accuracy of the cascade and of the full ensemble.
        difference, interval: accuracy - full, with its 95 % interval.
        only_fast, only_full, p: rows that only the cascade, or only the full ensemble, classifies
            correctly, and the exact McNemar test of them.
        disagreement: share of rows with another class; `disagreement_interval` is its 95 %
            interval, `bound` its one-sided Clopper-Pearson bound.
        shares: share of rows answered after each stage.
        macs: mean multiply-adds of a row, as a share of the full ensemble's.
        rows: name of the rows.
    """

    n: int
    accuracy: float
    full: float
    difference: float
    interval: tuple[float, float]
    only_fast: int
    only_full: int
    p: float
    disagreement: float
    disagreement_interval: tuple[float, float]
    bound: float
    shares: tuple[float, ...]
    macs: float
    rows: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        return {
            name: list(map(float, value)) if isinstance(value, tuple) else value
            for name, value in self._asdict().items()
        }


@dataclass(frozen=True)
class Savings:
    """A cascade fitted on all out-of-fold rows, and its savings.

    Attributes:
        cascade: the fitted cascade.
        members: names of its members, in order.
        costs: multiply-adds of each member for one image, over all of its networks and views.
        measured: the savings, cross-fitted on out-of-fold rows and on test rows if there are any.
        caps: the savings with at most 1, 2, ... stages, on the last of `measured`'s rows.
    """

    cascade: Cascade
    members: tuple[str, ...]
    costs: tuple[float, ...]
    measured: tuple[Saving, ...]
    caps: tuple[Saving, ...]

    def measure(
        self,
        probs: npt.ArrayLike,
        labels: npt.ArrayLike,
        full: npt.ArrayLike,
        rows: str = "test",
        groups: npt.ArrayLike | None = None,
    ) -> Savings:
        """Add the savings on further rows, on which nothing was fitted.

        Args:
            probs: (m, n, k) probabilities of the members in the file: means of fold networks.
            labels: (n,).
            full: (n, k) calibrated answers of the full ensemble.
            rows: name of the rows in the report.
            groups: (n,) group names; None = rows are independent.

        Raises:
            DataError: probabilities, labels or groups are not usable.
        """
        uncapped, *caps = [
            saving(
                self.cascade,
                self.cascade.predict(probs, full, self.cascade.stops("fast", max_stages)),
                full,
                labels,
                self.costs,
                rows,
                groups,
            )
            for max_stages in range(len(self.cascade.stages))
        ]
        return replace(self, measured=(*self.measured, uncapped), caps=tuple(caps))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        return {
            "state": self.cascade.state(),
            "members": list(self.members),
            "costs": list(self.costs),
            "measured": [entry.as_dict() for entry in self.measured],
            "caps": [entry.as_dict() for entry in self.caps],
        }


def cascade_card(savings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry "cascade" of the model card from `Savings.as_dict`.

    Raises:
        DataError: `savings` is not the result of `as_dict`.
    """
    try:
        Cascade.from_state(savings["state"])
        return {"cascade": {key: savings[key] for key in ("state", "members", "measured", "caps")}}
    except (KeyError, TypeError) as error:
        raise DataError("not the cascade of a run", got=f"{type(error).__name__} {error}") from None


def fit_savings(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    full: npt.ArrayLike,
    stages: Sequence[Sequence[int]],
    *,
    costs: Sequence[float],
    members: Sequence[str],
    disagreement: float = 0.005,
    groups: npt.ArrayLike | None = None,
) -> Savings:
    """Fit a cascade on out-of-fold rows and score it cross-fitted on them.

    Args:
        probs: (m, n, k) out-of-fold probabilities of the members.
        labels: (n,).
        full: (n, k) calibrated, cross-fitted out-of-fold probabilities of the ensemble.
        stages: the members that each stage runs, see `cascade.stages_by_cost`.
        costs: (m,) multiply-adds of each member for an image.
        members: m names.
        disagreement: share of images that may get another class than the full ensemble's.
        groups: (n,) group names, or None: they stay whole in the cross-fit and widen the bound and
            the intervals.

    Raises:
        DataError: the arguments are not usable or contradict each other, or there are fewer than
            two parts.
    """
    array, answers = check_probs(probs, 3), check_probs(full, 2)
    truth = check_labels(labels, *answers.shape)
    if not len(costs) == len(members) == len(array):
        raise DataError(
            "costs or names are for other members",
            expected=len(array),
            got=(len(costs), len(members)),
        )
    names = None if groups is None else np.array([str(g) for g in np.asarray(groups)])
    # Not the run's folds: with two of them the thresholds would see only half of the rows.
    part = cross_fit_parts(truth, groups=None if names is None else list(names))

    def fit(among: np.ndarray) -> Cascade:
        own = None if names is None else names[among]
        return Cascade(stages).fit(array[:, among], truth[among], answers[among], disagreement, own)

    cascade = fit(np.ones(len(truth), bool))
    by_part = {value: fit(part != value) for value in np.unique(part)}

    def cross_fitted(max_stages: int) -> Saving:
        crossed = CascadeAnswers(np.empty(answers.shape), np.empty(len(truth), np.int64))
        for value, fitted in by_part.items():
            inside = part == value
            crossed.probs[inside], crossed.stages[inside] = fitted.predict(
                array[:, inside], answers[inside], fitted.stops("fast", max_stages)
            )
        return saving(cascade, crossed, answers, truth, costs, CROSS_FITTED, groups)

    uncapped, *caps = [cross_fitted(max_stages) for max_stages in range(len(cascade.stages))]
    return Savings(
        cascade=cascade,
        members=tuple(members),
        costs=tuple(map(float, costs)),
        measured=(uncapped,),
        caps=tuple(caps),
    )


def saving(
    cascade: Cascade,
    answers: CascadeAnswers,
    full: npt.ArrayLike,
    labels: npt.ArrayLike,
    costs: Sequence[float],
    rows: str,
    groups: npt.ArrayLike | None = None,
) -> Saving:
    """Compare the answers of a cascade with those of its full ensemble.

    Args:
        cascade: the cascade.
        answers: its answers.
        full: (n, k) answers of the full ensemble.
        labels: (n,).
        costs: (m,) cost of each member for one image.
        rows: name of the rows.
        groups: (n,) group names, which widen the intervals; None = rows are independent.

    Raises:
        DataError: probabilities, labels or groups are not usable.
    """
    full_probs = check_probs(full, 2)
    truth = check_labels(labels, *full_probs.shape)
    fast_classes, full_classes = answers.probs.argmax(1), full_probs.argmax(1)
    fast_hits, full_hits = fast_classes == truth, full_classes == truth
    differs = fast_classes != full_classes
    test, n = mcnemar_exact(fast_hits, full_hits, groups), len(truth)
    if groups is None:
        interval = paired_interval(test.only_a, test.only_b, n, LEVEL)
    else:
        interval = paired_bootstrap(fast_hits, full_hits, groups)[1:]
    total_costs = np.cumsum([sum(costs[i] for i in stage) for stage in cascade.stages])
    shares = np.bincount(answers.stages - 1, minlength=len(total_costs)) / n
    return Saving(
        n=n,
        accuracy=float(fast_hits.mean()),
        full=float(full_hits.mean()),
        difference=float(fast_hits.mean() - full_hits.mean()),
        interval=interval,
        only_fast=test.only_a,
        only_full=test.only_b,
        p=test.p,
        disagreement=float(differs.mean()),
        disagreement_interval=share_interval(differs, groups),
        bound=disagreement_bound(differs, groups),
        shares=tuple(shares.tolist()),
        macs=float(shares @ total_costs / total_costs[-1]),
        rows=rows,
    )
