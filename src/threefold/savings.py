"""What a cascade saves and what that costs, measured on rows that its thresholds have not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from threefold.cascade import LEVEL, Answered, Cascade, disagreement_bound
from threefold.crossfit import stratified_parts
from threefold.errors import DataError
from threefold.paired import mcnemar_exact, paired_bootstrap
from threefold.predictions__checks import check_labels, check_probs
from threefold.stats import paired_interval, share_interval

CROSS_FITTED: Final = "oof, cross-fitted"
"""Rows whose thresholds and temperatures were chosen on other rows."""


class Saving(NamedTuple):
    """A cascade against its full ensemble, on n rows with labels.

    Attributes:
        n: number of rows.
        accuracy, full: of the cascade, of the full ensemble.
        difference, interval: accuracy - full, with its 95 % interval.
        only_fast, only_full, p: rows that only one of the two has right, and the exact McNemar test of them.
        disagreement: share of rows with another class, `disagreement_interval` its 95 % interval, `bound` its one-sided
            Clopper-Pearson bound.
        shares: share of rows that got their answer after each stage.
        macs: multiply-adds of a row on average, as a share of the full ensemble's.
        rows: which rows.
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


@dataclass(frozen=True)
class Savings:
    """A cascade fitted on all out-of-fold rows, and what it does.

    Attributes:
        cascade: the fitted cascade.
        members: names, in the order of its members.
        costs: multiply-adds of each member for one image, all of its networks and views.
        measured: cross-fitted out-of-fold, and on test rows where there are any.
        caps: for each number of stages but all: what the cascade does with at most so many, on the last of `measured`'s rows.
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
        """The same cascade with the figures of further rows, on which nothing was fitted.

        Args:
            probs: (m, n, k) of the members, as the file has them: the mean of their fold networks.
            labels: (n,).
            full: (n, k) what the full ensemble answers, calibrated.
            rows: what they are called in the report.
            groups: (n,) names of what belongs together.

        Raises:
            DataError: probabilities, labels or groups are not usable.
        """
        found = [
            self.cascade.predict(probs, full, self.cascade.stops("fast", most))
            for most in range(len(self.cascade.stages))
        ]
        told = [saving(self.cascade, one, full, labels, self.costs, rows, groups) for one in found]
        return replace(self, measured=(*self.measured, told[0]), caps=tuple(told[1:]))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for results.json: state, members, costs, measured, caps."""
        return {
            "state": self.cascade.state(),
            "members": list(self.members),
            "costs": list(self.costs),
            "measured": [_plain(one) for one in self.measured],
            "caps": [_plain(one) for one in self.caps],
        }


def cascade_card(told: Mapping[str, Any]) -> dict[str, Any]:
    """The key "cascade" of the model card from `Savings.as_dict`; see `runtime.Model`.

    Raises:
        DataError: not what `as_dict` gives.
    """
    try:
        Cascade.from_state(told["state"])
        return {"cascade": {key: told[key] for key in ("state", "members", "measured", "caps")}}
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
    """Fit a cascade on out-of-fold rows, and score it cross-fitted on them.

    Args:
        probs: (m, n, k) out-of-fold probabilities of the members.
        labels: (n,).
        full: (n, k) calibrated, cross-fitted out-of-fold probabilities of the ensemble.
        stages: the members that each stage asks, see `cascade.stages_by_cost`.
        costs: (m,) multiply-adds of each member for an image.
        members: m names.
        disagreement: share of images that may get another class than the full ensemble's.
        groups: (n,) names of what belongs together, or None: they stay whole in the cross-fit, and bound and intervals count them.

    Raises:
        DataError: the parts are not usable or contradict each other, or the rows make fewer than two parts.
    """
    array, wanted = check_probs(probs, 3), check_probs(full, 2)
    truth = check_labels(labels, *wanted.shape)
    if not len(costs) == len(members) == len(array):
        raise DataError(
            "costs or names are of other members",
            expected=len(array),
            got=(len(costs), len(members)),
        )
    names = None if groups is None else [str(g) for g in np.asarray(groups)]
    part = stratified_parts(
        truth, names
    )  # not the folds: two of them would leave the thresholds half of the rows
    if len(np.unique(part)) < 2:
        raise DataError(
            "rows cannot be cross-fitted", expected="two parts at least", got="all rows in one"
        )

    def crossed(most: int) -> Saving:
        answer, asked = np.empty(wanted.shape), np.empty(len(truth), np.int64)
        for value, fitted in apart.items():
            held = part == value
            answer[held], asked[held] = fitted.predict(
                array[:, held], wanted[held], fitted.stops("fast", most)
            )
        return saving(cascade, Answered(answer, asked), wanted, truth, costs, CROSS_FITTED, groups)

    def fit_on(among: np.ndarray) -> Cascade:
        mine = None if names is None else np.asarray(names)[among]
        return Cascade(stages).fit(array[:, among], truth[among], wanted[among], disagreement, mine)

    cascade = fit_on(np.ones(len(truth), bool))
    apart = {value: fit_on(part != value) for value in np.unique(part)}
    first, *caps = [crossed(most) for most in range(len(cascade.stages))]
    return Savings(cascade, tuple(members), tuple(map(float, costs)), (first,), tuple(caps))


def saving(
    cascade: Cascade,
    found: Answered,
    full: npt.ArrayLike,
    labels: npt.ArrayLike,
    costs: Sequence[float],
    rows: str,
    groups: npt.ArrayLike | None = None,
) -> Saving:
    """What answers of a cascade are against those of its full ensemble.

    Args:
        cascade: whose stages they are.
        found: the answers.
        full: (n, k) what the full ensemble answers.
        labels: (n,).
        costs: (m,) of each member for one image.
        rows: what the rows are called.
        groups: (n,) names of what belongs together, which widens the intervals of shares; None = rows are independent.

    Raises:
        DataError: probabilities, labels or groups are not usable.
    """
    wanted = check_probs(full, 2)
    truth = check_labels(labels, *wanted.shape)
    mine, whole = found.probs.argmax(1), wanted.argmax(1)
    right, right_full, other = mine == truth, whole == truth, mine != whole
    test, n = mcnemar_exact(right, right_full, groups), len(truth)
    if groups is None:
        interval = paired_interval(test.only_a, test.only_b, n, LEVEL)
    else:
        interval = paired_bootstrap(right, right_full, groups)[1:]
    so_far = np.cumsum([sum(costs[i] for i in stage) for stage in cascade.stages])
    shares = np.bincount(found.asked - 1, minlength=len(so_far)) / n
    return Saving(
        n,
        float(right.mean()),
        float(right_full.mean()),
        float(right.mean() - right_full.mean()),
        interval,
        test.only_a,
        test.only_b,
        test.p,
        float(other.mean()),
        share_interval(other, groups),
        disagreement_bound(other, groups),
        tuple(shares.tolist()),
        float(shares @ so_far / so_far[-1]),
        rows,
    )


def _plain(one: Saving) -> dict[str, Any]:
    """A saving as JSON has it."""
    return {
        name: list(map(float, value)) if isinstance(value, tuple) else value
        for name, value in one._asdict().items()
    }
