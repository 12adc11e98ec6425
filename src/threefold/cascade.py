"""A cascade: members are asked one after another, the cheapest first, until the answer is sure.

After each stage the members asked so far are averaged and calibrated; where the margin, the largest probability less the
next, reaches the stage's threshold, that mean is the answer. Whoever is never sure gets the answer of the full ensemble,
whatever its method. A stage is a member with all of its fold networks.

What is promised. The thresholds are chosen so that the share of images whose class differs from the full ensemble's is at
most `disagreement`, by a one-sided Clopper-Pearson bound on the rows of the fit (Bates et al. 2021, "Distribution-free,
risk-controlling prediction sets", whose proof covers the first stage). Later stages choose on what the first left, which no
proof covers: each is charged one row, as if the next below its threshold had another class. With groups the bound counts as
many rows as they are worth (Korn and Graubard 1998), judged by the classes of the first stage, and a stage is charged the
rows that one independent row stands for. In simulations the bound then holds as often as it says (`bench/laws.py cascade`).
Out-of-fold rows are answered by one network of each member, new images by the mean of its fold networks, so that on new
images nothing is promised at all: measure there, and quote that.

Exported files read their cascade with this module, so scipy is imported only where something is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError, RunError
from threefold.predictions__checks import FLOOR, check_labels, check_probs

NEVER: Final = 2.0
"""A threshold that no margin reaches."""

LEVEL: Final = 0.95
"""Confidence of the bound on the disagreement."""

MODES: Final = ("full", "fast")
"""Every member for every image, or as few as make the answer sure."""


class Answered(NamedTuple):
    """Answers of a cascade.

    Attributes:
        probs: (n, k) float64.
        asked: (n,) the number of stages that each took, 1 or more.
    """

    probs: np.ndarray
    asked: np.ndarray


class Cascade:
    """Members by stages, with a threshold and a temperature for each stage but the last.

    Args:
        stages: numbers of the members that each stage asks; two stages or more, every member once.

    Attributes:
        thresholds_: (stages - 1,) the margin at which the answer is given; NEVER where no row of the fit may stop.
        temperatures_: (stages - 1,) of the mean of the members so far.
        disagreement_: the share of other classes than the full ensemble's that was allowed.
        n_: number of rows in `fit`.

    Raises:
        DataError: fewer than two stages, or members that are missing or twice.
    """

    thresholds_: np.ndarray
    temperatures_: np.ndarray
    disagreement_: float
    n_: int

    def __init__(self, stages: Sequence[Sequence[int]]) -> None:
        self.stages: tuple[tuple[int, ...], ...] = tuple(
            tuple(int(i) for i in stage) for stage in stages
        )
        asked = sorted(i for stage in self.stages for i in stage)
        if len(self.stages) < 2 or not all(self.stages) or asked != list(range(len(asked))):
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
            probs: (m, n, k) of the members.
            labels: (n,); they fit the temperatures only.
            full: (n, k) what the full ensemble answers, calibrated.
            disagreement: share of rows that may get another class than the full ensemble's.
            groups: (n,) names of what belongs together, or None: rows are independent.

        Raises:
            DataError: probabilities, labels or groups are not usable, of other members, or the share is not between 0 and 1.
        """
        if not 0 < disagreement < 1:
            raise DataError("disagreement is between 0 and 1", got=disagreement)
        from threefold.scaling import fit_temperature

        array, wanted = self._checked(probs, full)
        truth = check_labels(labels, *wanted.shape)
        means = self._means(array)
        self.temperatures_ = np.array([fit_temperature(mean, truth) for mean in means])
        worth = _worth(means[0].argmax(1) != wanted.argmax(1), groups)
        most, charge = (
            _allowed(len(truth), disagreement, worth),
            math.ceil(len(truth) / max(worth, 1.0)),
        )
        later = min(len(means) - 1, max(most, 0) // charge)
        left, wrong, thresholds = np.ones(len(truth), bool), 0, []
        for s, (mean, temperature) in enumerate(zip(means, self.temperatures_, strict=True)):
            warm = _warmed(mean, temperature)
            sure, other = margins(warm), warm.argmax(1) != wanted.argmax(1)
            thresholds.append(
                _threshold(
                    sure[left], other[left], most - later * charge - wrong if s <= later else -1
                )
            )
            stops = left & (sure >= thresholds[-1])
            wrong += int(other[stops].sum())
            left &= ~stops
        self.thresholds_, self.disagreement_, self.n_ = (
            np.array(thresholds),
            float(disagreement),
            len(truth),
        )
        return self

    def predict(
        self, probs: npt.ArrayLike, full: npt.ArrayLike, stops: npt.ArrayLike | None = None
    ) -> Answered:
        """The answers: early ones of the members so far, the others those of the full ensemble.

        Args:
            probs: (m, n, k) of the members.
            full: (n, k) what the full ensemble answers.
            stops: thresholds as `stops` gives them; None = those of the fit.

        Raises:
            DataError: probabilities are not usable, or of other members.
            RunError: not fitted.
        """
        self._require_fit()
        array, wanted = self._checked(probs, full)
        bars = self.thresholds_ if stops is None else np.asarray(stops, np.float64)
        answer, asked = wanted.astype(np.float64), np.full(len(wanted), len(self.stages))
        warm = [
            _warmed(mean, t) for mean, t in zip(self._means(array), self.temperatures_, strict=True)
        ]
        for s in reversed(range(len(bars))):
            stop = margins(warm[s]) >= bars[s]
            answer[stop], asked[stop] = warm[s][stop], s + 1
        return Answered(answer, asked)

    def stops(self, mode: str = "full", most: int = 0) -> np.ndarray:
        """The thresholds (stages - 1,) float32 of a mode, with at most so many stages for any image; 0 = all.

        Raises:
            DataError: the mode is unknown, or there are not so many stages.
            RunError: not fitted.
        """
        self._require_fit()
        if mode not in MODES:
            raise DataError("unknown mode", expected=" or ".join(MODES), got=mode)
        if not 0 <= most <= len(self.stages):
            raise DataError(
                "there are not so many stages", expected=f"0 to {len(self.stages)}", got=most
            )
        found = np.full(len(self.thresholds_), NEVER) if mode == "full" else self.thresholds_.copy()
        if most:
            found[most - 1 :] = 0.0
        return found.astype(np.float32)

    def state(self) -> dict[str, Any]:
        """What a model card needs, as plain values; see `from_state`.

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
        """The cascade whose `state` this is.

        Raises:
            DataError: a value is missing or cannot be.
        """
        try:
            if state["score"] != "margin":
                raise ValueError(f"score {state['score']}")
            made = cls(state["stages"])
            made.thresholds_ = np.array([float(value) for value in state["thresholds"]])
            made.temperatures_ = np.array([float(value) for value in state["temperatures"]])
            made.disagreement_, made.n_ = float(state["disagreement"]), int(state["n"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                "not the state of a cascade", got=f"{type(error).__name__} {error}"[:200]
            ) from None
        for name, values, low in (
            ("thresholds", made.thresholds_, 0.0),
            ("temperatures", made.temperatures_, 1e-6),
        ):
            if (
                len(values) != len(made.stages) - 1
                or not (np.isfinite(values) & (values >= low)).all()
            ):
                raise DataError("not the state of a cascade", got=f"{name} {values.tolist()}"[:200])
        return made

    def _checked(self, probs: npt.ArrayLike, full: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        array, wanted = check_probs(probs, 3), check_probs(full, 2)
        members = sum(map(len, self.stages))
        if array.shape != (members, *wanted.shape):
            raise DataError(
                "the cascade is of other members, rows or classes",
                expected=(members, *wanted.shape),
                got=array.shape,
            )
        return array, wanted

    def _means(self, probs: np.ndarray) -> list[np.ndarray]:
        """Mean (n, k) of the members asked after each stage but the last."""
        asked = [
            [i for stage in self.stages[: s + 1] for i in stage]
            for s in range(len(self.stages) - 1)
        ]
        return [probs[members].mean(0, dtype=np.float64) for members in asked]

    def _require_fit(self) -> None:
        if not hasattr(self, "thresholds_"):
            raise RunError("the cascade is not fitted", fix="call fit(probs, labels, full) first")


def stages_by_cost(costs: Sequence[float], used: Sequence[int] | None = None) -> list[list[int]]:
    """A stage for each member, the cheapest first; members that the ensemble does not look at come with the last.

    Args:
        costs: of each member, in any unit.
        used: numbers of the members that the ensemble looks at; None = all.
    """
    mine = sorted(range(len(costs)) if used is None else used, key=lambda i: (costs[i], i))
    stages = [[i] for i in mine]
    if stages:
        stages[-1] += [i for i in range(len(costs)) if i not in mine]
    return stages


def margins(probs: np.ndarray) -> np.ndarray:
    """How sure (n, k) is: the largest probability less the next, (n,)."""
    two = np.partition(probs, probs.shape[1] - 2, axis=1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0])


def disagreement_bound(
    other: npt.ArrayLike, groups: npt.ArrayLike | None = None, level: float = LEVEL
) -> float:
    """One-sided upper bound of the share of which these rows are a sample (Clopper and Pearson 1934).

    With groups it counts as many rows as they are worth (Korn and Graubard 1998, `stats.effective_rows`).

    Args:
        other: (n,) booleans.
        groups: (n,) names of what belongs together, or None: rows are independent.
        level: confidence.

    Raises:
        DataError: groups are not usable.
    """
    seen = np.asarray(other, bool)
    return _bound(seen.mean(), _worth(seen, groups, level), level)


def _bound(share: float, n: float, level: float = LEVEL) -> float:
    """Clopper and Pearson's, of n rows, which need not be a whole number."""
    from scipy.special import betaincinv

    return 1.0 if share >= 1 or n <= 0 else float(betaincinv(share * n + 1, n - share * n, level))


def _worth(other: np.ndarray, groups: npt.ArrayLike | None, level: float = LEVEL) -> float:
    """How many independent rows these are worth in a one-sided bound."""
    from threefold.stats import effective_rows

    return float(len(other)) if groups is None else effective_rows(other, groups, 2 * level - 1)


def _allowed(n: int, disagreement: float, worth: float) -> int:
    """The most rows of n that may disagree with the bound still kept; -1 where none may stop."""
    low, high = -1, n
    while low < high:  # the bound rises with the count
        middle = math.ceil((low + high) / 2)
        if _bound(middle / n, worth) <= disagreement:
            low = middle
        else:
            high = middle - 1
    return low


def _threshold(sure: np.ndarray, other: np.ndarray, most: int) -> float:
    """The lowest margin at which at most so many of the rows that stop disagree; between rows, so that rounding moves none."""
    if most < 0 or not len(sure):
        return NEVER
    order = np.argsort(-sure, kind="stable")
    falling = sure[order]
    last = np.r_[falling[1:] < falling[:-1], True]  # rows of one margin stop together
    fits = np.flatnonzero((other[order].cumsum() <= most) & last)
    if not len(fits):
        return NEVER
    end = int(fits[-1])
    return 0.0 if end == len(sure) - 1 else float((falling[end] + falling[end + 1]) / 2)


def _warmed(mean: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log(mean) / temperature), without scipy."""
    logs = np.log(np.maximum(mean, FLOOR)) / temperature
    exp = np.exp(logs - logs.max(1, keepdims=True))
    return np.asarray(exp / exp.sum(1, keepdims=True))
