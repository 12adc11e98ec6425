"""Choosing and calibrating ensembles: the methods by name, cross-fitting, the choice among them, temperature.

The methods themselves are in `combiners`, and can be imported from here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from threefold.calibration import TemperatureModule, apply_temperature, fit_temperature
from threefold.combiners import (
    Ensemble,
    GreedyEnsemble,
    MeanEnsemble,
    PrunedEnsemble,
    StackedEnsemble,
    VoteEnsemble,
    WeightedEnsemble,
)
from threefold.errors import DataError, RecipeError
from threefold.predictions import check_labels, check_probs

__all__ = [
    "ENSEMBLES",
    "Ensemble",
    "GreedyEnsemble",
    "MeanEnsemble",
    "PrunedEnsemble",
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

_PARTS: Final = 5
"""Parts of a cross-fit where the caller has no folds."""

ENSEMBLES: Final[dict[str, Callable[[], Ensemble]]] = {
    "mean": MeanEnsemble,
    "vote": VoteEnsemble,
    "pruned": PrunedEnsemble,
    "top2": lambda: PrunedEnsemble(keep=2),
    "weighted": WeightedEnsemble,
    "greedy": GreedyEnsemble,
    "stacked": StackedEnsemble,
}
"""Every method by its name in a recipe, the simplest first: `choose` prefers in this order."""


def make_ensemble(name: str, seed: int = 0) -> Ensemble:
    """The ensemble of that name, not fitted; its `from_state` reads what an ensemble of that name saved.

    Raises:
        RecipeError: unknown name; the message has the nearest.
    """
    if name not in ENSEMBLES:
        near = difflib.get_close_matches(name, ENSEMBLES, n=1, cutoff=0.5) or list(ENSEMBLES)
        raise RecipeError("no such ensemble method", where=name, expected=f"one of {', '.join(near)}")
    ensemble = ENSEMBLES[name]()
    ensemble.seed = seed
    return ensemble


def cross_fit(
    ensemble_factory: Callable[[], Ensemble],
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    folds: npt.ArrayLike | None = None,
    groups: Sequence[str] | None = None,
) -> np.ndarray:
    """Probabilities (n, k) where each row is predicted by an ensemble that was fitted on other rows.

    Args:
        ensemble_factory: makes an ensemble that is not fitted.
        probs: (m, n, k) out-of-fold probabilities of the members.
        labels: (n,).
        folds: (n,) part of each row; None = five stratified parts.
        groups: (n,) what must stay in one part, where `folds` is None.

    Raises:
        DataError: probabilities or labels are not usable, or the rows make fewer than two parts.
    """
    array = check_probs(probs, 3)
    _, n, k = array.shape
    truth = check_labels(labels, n, k)
    part = np.asarray(folds) if folds is not None else _stratified_parts(truth, groups)
    if part.shape != (n,):
        raise DataError("folds have the wrong shape", expected=f"({n},), one per row", got=part.shape)
    if len(np.unique(part)) < 2:
        raise DataError("rows cannot be cross-fitted", expected="two parts at least", got="all rows in one")
    answer = np.empty((n, k))
    for value in np.unique(part):
        held = part == value
        answer[held] = ensemble_factory().fit(array[:, ~held], truth[~held]).predict_proba(array[:, held])
    return answer


def choose(candidates: Mapping[str, np.ndarray], labels: npt.ArrayLike) -> tuple[str, str]:
    """The simplest method within one standard error of the most accurate, and why, in words.

    The standard error is that of the paired difference in accuracy, row by row.

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
        raise RecipeError("no such ensemble method", where=unknown[0], expected=f"one of {', '.join(ENSEMBLES)}")
    hits = {}
    for name in sorted(candidates, key=list(ENSEMBLES).index):
        array = check_probs(candidates[name], 2)
        hits[name] = array.argmax(-1) == check_labels(labels, *array.shape)
    best = max(hits, key=lambda name: hits[name].mean())
    for name, mine in hits.items():
        difference = hits[best].astype(np.float64) - mine
        error = difference.std() / len(difference) ** 0.5
        if name == best or difference.mean() <= error:
            break
    top = f"{hits[best].mean():.4f} cross-fitted"
    if name == best:
        rest = "and the simplest" if name == next(iter(hits)) else "no simpler method comes within one standard error"
        return name, f"the best, {top}; {rest}"
    return name, f"{hits[name].mean():.4f}, within one standard error ({error:.4f}) of {best}, {top}, and simpler"


def _stratified_parts(labels: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """Part number (n,) of each row, classes spread evenly; groups, where there are any, kept whole.

    Unlike scikit-learn's splitters this also takes classes with fewer rows than parts, without a warning.
    """
    rng = np.random.default_rng(0)
    if groups is None:
        part = np.empty(len(labels), dtype=np.int64)
        part[np.lexsort((rng.random(len(labels)), labels))] = np.arange(len(labels)) % _PARTS
        return part
    if len(groups) != len(labels):
        raise DataError("groups do not match the labels", expected=len(labels), got=len(groups))
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.zeros((len(names), int(labels.max()) + 1))
    np.add.at(counts, (number, labels), 1)
    chosen, load = np.empty(len(names), dtype=np.int64), np.zeros((_PARTS, counts.shape[1]))
    for group in np.argsort(-counts.sum(1), kind="stable"):  # the largest first, each to where its classes are rarest
        chosen[group] = (load @ counts[group]).argmin()
        load[chosen[group]] += counts[group]
    return chosen[number]
