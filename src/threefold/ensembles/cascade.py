"""A cascade: members run one stage after another, cheapest first, until the answer is confident.

After each stage the members so far are averaged and calibrated. If the margin (the largest
probability minus the second largest) reaches the stage's threshold, that average is the answer.
Rows that are never confident get the answer of the full ensemble, whatever its method. A stage is a
member with all of its fold networks.

What is guaranteed. The thresholds are chosen so that the share of images whose class differs from
the full ensemble's is at most `disagreement`, by a one-sided Clopper-Pearson bound on the fit rows
(Bates et al. 2021, "Distribution-free, risk-controlling prediction sets", whose proof covers the
first stage). Later stages choose on the rows that the first one left, which no proof covers: each
is charged one row, as if the next row below its threshold had another class. With groups, the bound
uses the effective number of rows (Korn and Graubard 1998), estimated from the classes of the first
stage, and a stage is charged the rows that one independent row stands for. In simulations the bound
then holds as often as it claims (`bench/laws.py cascade`). Out-of-fold rows are answered by one
network of each member, new images by the mean of its fold networks, so nothing is guaranteed on new
images: measure there, and quote that.

Exported files read their cascade with this module, so scipy is imported only to fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError, RunError
from threefold.predictions.checks import FLOOR, check_labels, check_probs
from threefold.scratch import row_blocks, scratch, top_classes
from threefold.stats.bootstrap import LEVEL

NEVER: Final = 2.0
"""A threshold that no margin reaches."""

MODES: Final = ("full", "fast")
"""Run every member for every image, or only as many as make the answer confident."""


class CascadeAnswers(NamedTuple):
    """Answers of a cascade.

    Attributes:
        probs: (n, k) float64.
        stages: (n,) number of stages that each row took, 1 or more.
    """

    probs: np.ndarray
    stages: np.ndarray


class Cascade:
    """Stages of members, with a threshold and a temperature for each stage but the last.

    Args:
        stages: numbers of the members that each stage runs; two stages or more, each member once.

    Attributes:
        thresholds_: (stages - 1,) margin at which a stage answers; NEVER if no fit row may stop.
        temperatures_: (stages - 1,) temperature of the mean of the members so far.
        disagreement_: the share of rows that may get another class than the full ensemble's.
        n_: number of rows in `fit`.

    Raises:
        DataError: fewer than two stages, or members that are missing or repeated.
    """

    thresholds_: np.ndarray
    temperatures_: np.ndarray
    disagreement_: float
    n_: int

    def __init__(self, stages: Sequence[Sequence[int]]) -> None:
        self.stages: tuple[tuple[int, ...], ...] = tuple(
            tuple(int(i) for i in stage) for stage in stages
        )
        members = sorted(i for stage in self.stages for i in stage)
        if len(self.stages) < 2 or not all(self.stages) or members != list(range(len(members))):
            raise DataError(
                "not the stages of a cascade",
                expected="every member once, two stages or more",
                got=stages,
            )

    def fit(
        self,
        probs: npt.ArrayLike,
        labels: npt.ArrayLike,
        full: npt.ArrayLike,
        disagreement: float = 0.005,
        groups: npt.ArrayLike | None = None,
    ) -> Self:
        """Choose temperatures and thresholds on rows that the members have not seen.

        Args:
            probs: (m, n, k) probabilities of the members.
            labels: (n,); used to fit the temperatures only.
            full: (n, k) calibrated answers of the full ensemble.
            disagreement: share of rows that may get another class than the full ensemble's.
            groups: (n,) group names; None = rows are independent.

        Raises:
            DataError: probabilities, labels or groups are not usable, the members differ, or the
                share is not between 0 and 1.
        """
        if not 0 < disagreement < 1:
            raise DataError("disagreement is between 0 and 1", got=disagreement)
        from threefold.ensembles.scaling import fit_temperature

        array, answers = self._check(probs, full)
        truth = check_labels(labels, *answers.shape)
        n, classes = len(truth), top_classes(answers)
        temperatures, open_rows, errors, thresholds = [], np.ones(n, bool), 0, []
        for s, mean in enumerate(self._means(array)):
            if s == 0:
                effective_n = _effective_rows(mean.argmax(1) != classes, groups)
                allowed = _allowed_errors(n, disagreement, effective_n)
                charge = math.ceil(n / max(effective_n, 1.0))
                later_stages = min(len(self.stages) - 2, max(allowed, 0) // charge)
            temperatures.append(fit_temperature(mean, truth))
            margin, calibrated_classes = _margins_and_classes(mean, temperatures[-1])
            differs = calibrated_classes != classes
            budget = allowed - later_stages * charge - errors if s <= later_stages else -1
            thresholds.append(_threshold(margin[open_rows], differs[open_rows], budget))
            stops = open_rows & (margin >= thresholds[-1])
            errors += int(differs[stops].sum())
            open_rows &= ~stops
        self.temperatures_ = np.array(temperatures)
        self.thresholds_ = np.array(thresholds)
        self.disagreement_ = float(disagreement)
        self.n_ = n
        return self

    def predict(
        self, probs: npt.ArrayLike, full: npt.ArrayLike, stops: npt.ArrayLike | None = None
    ) -> CascadeAnswers:
        """Answer rows by the first confident stage, and the others by the full ensemble.

        Args:
            probs: (m, n, k) probabilities of the members.
            full: (n, k) answers of the full ensemble.
            stops: thresholds from `stops`; None = those of the fit.

        Raises:
            DataError: probabilities are not usable, or the members differ.
            RunError: not fitted.
        """
        self._require_fit()
        array, full_answers = self._check(probs, full)
        thresholds = self.thresholds_ if stops is None else np.asarray(stops, np.float64)
        answers = scratch(full_answers.shape)
        answers[...] = full_answers
        stages = np.full(len(answers), len(self.stages))
        for s, mean in enumerate(self._means(array)):
            for rows in row_blocks(*mean.shape):
                calibrated = _apply_temperature(mean[rows], self.temperatures_[s])
                stop = (margins(calibrated) >= thresholds[s]) & (stages[rows] == len(self.stages))
                at = np.arange(len(stages))[rows][stop]
                answers[at], stages[at] = calibrated[stop], s + 1
        return CascadeAnswers(answers, stages)

    def stops(self, mode: str = "full", max_stages: int = 0) -> np.ndarray:
        """Return the thresholds (stages - 1,) float32 of a mode.

        Args:
            mode: one of MODES.
            max_stages: stop after this many stages, confident or not; 0 = no limit.

        Raises:
            DataError: the mode is unknown, or there are fewer stages than `max_stages`.
            RunError: not fitted.
        """
        self._require_fit()
        if mode not in MODES:
            raise DataError("unknown mode", expected=" or ".join(MODES), got=mode)
        if not 0 <= max_stages <= len(self.stages):
            raise DataError(
                "there are not so many stages", expected=f"0 to {len(self.stages)}", got=max_stages
            )
        thresholds = self.thresholds_.copy()
        if mode == "full":
            thresholds[:] = NEVER
        if max_stages:
            thresholds[max_stages - 1 :] = 0.0
        return thresholds.astype(np.float32)

    def state(self) -> dict[str, Any]:
        """Return plain values for the model card.

        Raises:
            RunError: not fitted.
        """
        self._require_fit()
        return {
            "score": "margin",
            "stages": [list(stage) for stage in self.stages],
            "thresholds": self.thresholds_.tolist(),
            "temperatures": self.temperatures_.tolist(),
            "disagreement": self.disagreement_,
            "level": LEVEL,
            "n": self.n_,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Restore a cascade from its `state`.

        Raises:
            DataError: a value is missing or invalid.
        """
        try:
            if state["score"] != "margin":
                raise ValueError(f"score {state['score']}")
            cascade = cls(state["stages"])
            cascade.thresholds_ = np.array([float(value) for value in state["thresholds"]])
            cascade.temperatures_ = np.array([float(value) for value in state["temperatures"]])
            cascade.disagreement_, cascade.n_ = float(state["disagreement"]), int(state["n"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                "not the state of a cascade", got=f"{type(error).__name__} {error}"[:200]
            ) from None
        for name, values, lowest in (
            ("thresholds", cascade.thresholds_, 0.0),
            ("temperatures", cascade.temperatures_, 1e-6),
        ):
            valid = (np.isfinite(values) & (values >= lowest)).all()
            if len(values) != len(cascade.stages) - 1 or not valid:
                raise DataError("not the state of a cascade", got=f"{name} {values.tolist()}"[:200])
        return cascade

    def _check(self, probs: npt.ArrayLike, full: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Return checked probabilities of the members (m, n, k) and the full ensemble (n, k)."""
        array, answers = check_probs(probs, 3), check_probs(full, 2)
        members = sum(map(len, self.stages))
        if array.shape != (members, *answers.shape):
            raise DataError(
                "the cascade has other members, rows or classes",
                expected=(members, *answers.shape),
                got=array.shape,
            )
        return array, answers

    def _means(self, probs: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the mean (n, k) of the members so far after each stage but the last."""
        members = list[int]()
        for stage in self.stages[:-1]:
            members.extend(stage)
            mean = scratch(probs.shape[1:])
            for rows in row_blocks(len(mean), len(members) * mean.shape[1]):
                mean[rows] = probs[members, rows].mean(0, dtype=np.float64)
            yield mean

    def _require_fit(self) -> None:
        if not hasattr(self, "thresholds_"):
            raise RunError("the cascade is not fitted", fix="call fit(probs, labels, full) first")


def stages_by_cost(
    costs: Sequence[float],
    used: Sequence[int] | None = None,
    groups: Sequence[object] | None = None,
) -> list[list[int]]:
    """Return one stage per member, or per group of members, cheapest first.

    Members that the ensemble does not use run with the last stage.

    Args:
        costs: cost of each member, in any unit.
        used: numbers of the members that the ensemble uses; None = all.
        groups: a value for each member; members of equal value are one stage, because they share
            most of their cost. None = every member is a group.
    """
    members = range(len(costs)) if used is None else used
    by_group: dict[object, list[int]] = {}
    for i in sorted(members, key=lambda i: (costs[i], i)):
        by_group.setdefault(i if groups is None else groups[i], []).append(i)
    stages = sorted(by_group.values(), key=lambda stage: sum(costs[i] for i in stage))
    if stages:
        stages[-1] += [i for i in range(len(costs)) if i not in members]
    return stages


def margins(probs: np.ndarray) -> np.ndarray:
    """Return the largest minus the second largest probability of each row, (n,)."""
    two = np.partition(probs, probs.shape[1] - 2, axis=1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0])


def _margins_and_classes(mean: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the margin (n,) and the class (n,) of each row of a mean (n, k) at a temperature."""
    margin, classes = np.empty(len(mean)), np.empty(len(mean), np.int64)
    for rows in row_blocks(*mean.shape):
        calibrated = _apply_temperature(mean[rows], temperature)
        margin[rows], classes[rows] = margins(calibrated), calibrated.argmax(1)
    return margin, classes


def disagreement_bound(
    differs: npt.ArrayLike, groups: npt.ArrayLike | None = None, level: float = LEVEL
) -> float:
    """Return a one-sided upper bound of the share of rows that differ (Clopper and Pearson 1934).

    Args:
        differs: (n,) booleans.
        groups: (n,) group names, for the effective number of rows (Korn and Graubard 1998, see
            `stats.effective_rows`); None = rows are independent.
        level: confidence.

    Raises:
        DataError: groups are not usable.
    """
    array = np.asarray(differs, bool)
    return _upper_bound(array.mean(), _effective_rows(array, groups, level), level)


def _upper_bound(share: float, n: float, level: float = LEVEL) -> float:
    """Return the Clopper-Pearson bound for n rows; n need not be a whole number."""
    from scipy.special import betaincinv

    return 1.0 if share >= 1 or n <= 0 else float(betaincinv(share * n + 1, n - share * n, level))


def _effective_rows(
    differs: np.ndarray, groups: npt.ArrayLike | None, level: float = LEVEL
) -> float:
    """Return how many independent rows these rows are worth in a one-sided bound."""
    from threefold.stats.scores import effective_rows

    return float(len(differs)) if groups is None else effective_rows(differs, groups, 2 * level - 1)


def _allowed_errors(n: int, disagreement: float, effective_n: float) -> int:
    """Return the most rows of n that may differ within the bound; -1 if no row may stop.

    A bisection: the bound rises with the count.
    """
    low, high = -1, n
    while low < high:
        middle = math.ceil((low + high) / 2)
        if _upper_bound(middle / n, effective_n) <= disagreement:
            low = middle
        else:
            high = middle - 1
    return low


def _threshold(margin: np.ndarray, differs: np.ndarray, budget: int) -> float:
    """Return the lowest threshold at which at most `budget` of the rows that stop differ.

    It lies between the margins of two rows, so that rounding moves no row across it.
    """
    if budget < 0 or not len(margin):
        return NEVER
    order = np.argsort(-margin, kind="stable")
    falling = margin[order]
    # Rows with equal margins stop together.
    last = np.r_[falling[1:] < falling[:-1], True]
    within = np.flatnonzero((differs[order].cumsum() <= budget) & last)
    if not len(within):
        return NEVER
    end = int(within[-1])
    return 0.0 if end == len(margin) - 1 else float((falling[end] + falling[end + 1]) / 2)


def _apply_temperature(mean: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(log(mean) / temperature) without scipy, which this module must not need."""
    logs = np.log(np.maximum(mean, FLOOR)) / temperature
    exp = np.exp(logs - logs.max(1, keepdims=True))
    return np.asarray(exp / exp.sum(1, keepdims=True))
