"""Choosing and calibrating ensembles: the methods by name, cross-fitting, the choice among them, temperature.

The methods themselves are in `combiners`, and can be imported from here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import numpy.typing as npt

from threefold.calibration import TemperatureModule, apply_temperature, fit_temperature
from threefold.combiners import Ensemble, LinearEnsemble, MeanEnsemble, PrunedEnsemble, VoteEnsemble
from threefold.crossfit import cross_fit, stratified_parts
from threefold.errors import DataError, RecipeError
from threefold.learned import BestEnsemble, GreedyEnsemble, WeightedEnsemble
from threefold.loglinear import LogisticEnsemble, LogPoolEnsemble
from threefold.predictions__checks import FLOOR, check_labels, check_probs
from threefold.stacked import ShrunkStackedEnsemble, StackedEnsemble

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "CANDIDATES",
    "ENSEMBLES",
    "AutoEnsemble",
    "BestEnsemble",
    "Ensemble",
    "GreedyEnsemble",
    "LinearEnsemble",
    "LogPoolEnsemble",
    "LogisticEnsemble",
    "MeanEnsemble",
    "PrunedEnsemble",
    "ShrunkStackedEnsemble",
    "StackedEnsemble",
    "TemperatureModule",
    "VoteEnsemble",
    "WeightedEnsemble",
    "apply_temperature",
    "choose",
    "cross_fit",
    "fit_temperature",
    "make_ensemble",
]

ENSEMBLES: Final[dict[str, Callable[[], Ensemble]]] = {
    "mean": MeanEnsemble,
    "best": BestEnsemble,
    "vote": VoteEnsemble,
    "pruned": PrunedEnsemble,
    "top2": lambda: PrunedEnsemble(keep=2),
    "weighted": WeightedEnsemble,
    "greedy": GreedyEnsemble,
    "pool": LogPoolEnsemble,
    "logistic": LogisticEnsemble,
    "stacked-shrunk": ShrunkStackedEnsemble,
    "stacked": StackedEnsemble,
}
"""Every method by its name in a recipe, the simplest first: `choose` prefers in this order."""


CANDIDATES: Final = ("mean", "best", "weighted", "greedy", "pool", "logistic")
"""What `auto` chooses from: the methods that are fitted in seconds, without those that only throw information away."""


def make_ensemble(name: str, seed: int = 0) -> Ensemble:
    """The ensemble of that name, or of `auto`, not fitted; its `from_state` reads what one of that name saved.

    Raises:
        RecipeError: unknown name; the message has the nearest.
    """
    if name == "auto":
        return AutoEnsemble(seed=seed)
    if name not in ENSEMBLES:
        near = difflib.get_close_matches(name, ENSEMBLES, n=1, cutoff=0.5) or list(ENSEMBLES)
        raise RecipeError(
            "no such ensemble method", where=name, expected=f"one of {', '.join(near)}"
        )
    ensemble = ENSEMBLES[name]()
    ensemble.seed = seed
    return ensemble


class AutoEnsemble(Ensemble):
    """The candidate that `choose` picks after cross-fitting each on the rows of the fit, then fitted on all of them.

    It answers at the temperature of those cross-fitted probabilities: candidates are calibrated differently, and the
    parts of a cross-fit may choose different ones.

    `cross_fit(AutoEnsemble, probs, labels)` is nested: it scores the whole procedure, the choice included, so unlike the
    score of the winner it is not too good. The mean is the simplest candidate, so what replaces it has to be better by
    more than one standard error.

    Args:
        candidates: names of ENSEMBLES; `stacked` among them takes six fits of the network.
        rows: where there are more, the choice is made on a stratified part of at most so many; the fit takes all.
        seed: passed on to the candidates.

    Attributes:
        name_, reason_: the method, and why, in words.
        ensemble_: that method, fitted.
        temperature_: () its calibration.

    Raises:
        RecipeError: no candidate, or one that is not a method.
    """

    _state = ("ensemble_",)
    ensemble_: Ensemble
    name_: str
    reason_: str
    temperature_: np.ndarray

    def __init__(
        self, candidates: Sequence[str] = CANDIDATES, *, rows: int = 10_000, seed: int = 0
    ) -> None:
        if rows < 2:
            raise RecipeError("auto cannot choose", where="rows", expected="2 or more", got=rows)
        if not candidates or "auto" in candidates:
            raise RecipeError(
                "auto cannot choose",
                where="candidates",
                expected=", ".join(ENSEMBLES),
                got=candidates,
            )
        for name in candidates:
            make_ensemble(name)
        self.candidates = tuple(sorted(set(candidates), key=list(ENSEMBLES).index))
        self.rows, self.seed = rows, seed

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        n = len(labels)
        self.temperature_ = np.asarray(1.0)
        if len(self.candidates) == 1 or n == 1:
            self.name_, self.reason_ = (
                self.candidates[0],
                "nothing to choose from" if n > 1 else "one row only",
            )
        else:
            some = stratified_parts(labels, parts=-(-n // self.rows)) == 0
            part, truth, few = stratified_parts(labels[some]), labels[some], probs[:, some]
            crossed = {name: np.empty(few.shape[1:]) for name in self.candidates}
            for value in np.unique(part):
                held = part == value
                rest, asked = few[:, ~held], few[:, held]
                for name, table in crossed.items():
                    table[held] = (
                        make_ensemble(name, self.seed).fit(rest, truth[~held]).predict_proba(asked)
                    )
            self.name_, self.reason_ = choose(crossed, truth)
            self.temperature_ = np.asarray(fit_temperature(crossed[self.name_], truth))
            if len(truth) < n:
                self.reason_ += f"; chosen on {len(truth):,} of {n:,} rows"
        self.ensemble_ = make_ensemble(self.name_, self.seed).fit(probs, labels)

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        return apply_temperature(self.ensemble_.predict_proba(probs), float(self.temperature_))

    def to_module(self) -> nn.Module:
        """The chosen method's module, then the temperature."""
        from torch import nn

        self._require_fit()
        return nn.Sequential(
            self.ensemble_.to_module(), TemperatureModule(float(self.temperature_))
        ).eval()

    def state(self) -> dict[str, np.ndarray]:
        """The chosen method's arrays, the temperature, and the name as bytes, which every array format can hold.

        Raises:
            RunError: not fitted.
        """
        self._require_fit()
        name = np.frombuffer(self.name_.encode(), np.uint8)
        return {"method": name, "temperature": self.temperature_, **self.ensemble_.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """An ensemble that predicts as the one whose `state` this is.

        Raises:
            DataError: an array is missing, or the method is unknown.
        """
        auto = cls()
        try:
            auto.name_ = bytes(np.asarray(state["method"], np.uint8)).decode()
            auto.ensemble_ = type(make_ensemble(auto.name_)).from_state(state)
            auto.temperature_ = np.asarray(state["temperature"])
        except (KeyError, ValueError, RecipeError):
            raise DataError(
                "not the state of an AutoEnsemble",
                expected="method, temperature",
                got=", ".join(state),
            ) from None
        auto.reason_ = "read from a file"
        return auto


def choose(candidates: Mapping[str, np.ndarray], labels: npt.ArrayLike) -> tuple[str, str]:
    """The simplest method within one standard error of the least log loss, and why, in words.

    Log loss is counted at each candidate's own temperature: it sees differences that accuracy needs many times the rows
    for, and calibration is mended later anyway. Of the candidates only those stand that classify no fewer rows correctly
    than the simplest, so that no accuracy is paid for log loss. The standard error is that of the paired difference, row
    by row (Breiman et al. 1984, section 3.4.3, for the rule).

    Args:
        candidates: method name -> probabilities (n, k), out-of-fold and cross-fitted.
        labels: (n,).

    Raises:
        DataError: nothing to choose from, or probabilities are not usable.
        RecipeError: a candidate that is not a method.
    """
    if not candidates:
        raise DataError("there is no ensemble to choose from", expected="one candidate at least")
    if unknown := [name for name in candidates if name not in ENSEMBLES]:
        raise RecipeError(
            "no such ensemble method", where=unknown[0], expected=f"one of {', '.join(ENSEMBLES)}"
        )
    names = sorted(candidates, key=list(ENSEMBLES).index)
    right = {name: _right(candidates[name], labels) for name in names}
    simplest = names[0]
    standing = [name for name in names if right[name] >= right[simplest]]
    losses = {name: _calibrated_losses(candidates[name], labels) for name in standing}
    best = min(standing, key=lambda name: losses[name].mean())
    for name in standing:
        away = losses[name] - losses[best]
        error = away.std() / len(away) ** 0.5
        if name == best or away.mean() <= error:
            break
    accuracy = f"accuracy {right[name] / len(losses[name]):.4f}"
    found = f"log loss {losses[name].mean():.4f}, {accuracy} cross-fitted"
    if name != best:
        return (
            name,
            f"{found}, within one standard error ({error:.4f}) of {best}, {losses[best].mean():.4f}, and simpler",
        )
    rest = (
        "and the simplest"
        if name == simplest
        else "no simpler method comes within one standard error"
    )
    if len(standing) < len(names) and name == simplest:
        rest += " of those that classify no fewer rows correctly"
    return name, f"the best, {found}; {rest}"


def _right(probs: np.ndarray, labels: npt.ArrayLike) -> int:
    """How many rows are classified correctly."""
    array = check_probs(probs, 2)
    return int((array.argmax(-1) == check_labels(labels, *array.shape)).sum())


def _calibrated_losses(probs: np.ndarray, labels: npt.ArrayLike) -> np.ndarray:
    """Log loss of each row (n,) at the temperature that suits them all; one number, so hardly optimistic."""
    warm = apply_temperature(probs, fit_temperature(probs, labels))
    return np.asarray(-np.log(np.maximum(warm[np.arange(len(warm)), np.asarray(labels)], FLOOR)))
