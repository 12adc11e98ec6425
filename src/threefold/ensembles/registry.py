"""Ensemble methods by name: make one, select members for it, choose among several, restore one.

The paper trains many networks and joins the best three (Algorithm 1, step 3), which the authors
chose by test accuracy. Here the selection of members is a step of `fit`, so it is cross-fitted with
the rest: no out-of-fold row is answered by members that were chosen on it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from threefold.ensembles.averaging import (
    BestEnsemble,
    GreedyEnsemble,
    MeanEnsemble,
    PrunedEnsemble,
    VoteEnsemble,
    WeightedEnsemble,
)
from threefold.ensembles.base import Ensemble
from threefold.ensembles.log_linear import LogisticEnsemble, LogPoolEnsemble
from threefold.ensembles.scaling import apply_temperature, fit_temperature
from threefold.ensembles.stacked import ShrunkStackedEnsemble, StackedEnsemble
from threefold.errors import DataError, RecipeError
from threefold.predictions.checks import check_labels, check_probs
from threefold.predictions.ledger import SeenRows
from threefold.recipe.ensemble import EnsembleSpec
from threefold.scratch import converted, row_blocks, take_members, top_classes
from threefold.stats.one_standard_error import simplest
from threefold.stats.weighted_scores import log_losses, merit

if TYPE_CHECKING:
    from torch import Tensor, nn

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
"""Every method by its name in a recipe, simplest first; `choose` prefers them in this order."""


BALANCED: Final = ("balanced_accuracy", "macro_f1")
"""Metrics in which every class counts the same."""


def make_ensemble(name: str, seed: int = 0) -> Ensemble:
    """Make an unfitted ensemble by name.

    Raises:
        RecipeError: unknown name; the message suggests the nearest one.
    """
    if name not in ENSEMBLES:
        near = difflib.get_close_matches(name, ENSEMBLES, n=1, cutoff=0.5)
        raise RecipeError(
            "no such ensemble method",
            where=name,
            expected=near[0] if near else f"one of {', '.join(ENSEMBLES)}",
        )
    ensemble = ENSEMBLES[name]()
    ensemble.seed = seed
    return ensemble


class SelectedEnsemble(Ensemble):
    """Another ensemble on the `top` members with the best metric on the fit rows.

    Ties go to the first member.

    Attributes:
        chosen_: (top,) numbers of the selected members, ascending.

    Raises:
        RecipeError: top is below 1.
    """

    _state = ("chosen_",)
    chosen_: np.ndarray

    def __init__(self, inner: Ensemble, top: int = 3) -> None:
        if top < 1:
            raise RecipeError(
                "a selection has a member", where="top", expected="1 or more", got=top
            )
        self.inner, self.top = inner, top

    def state(self) -> dict[str, np.ndarray]:
        """Return the members' numbers and the inner ensemble's arrays; `restore` reads them."""
        return {**super().state(), **self.inner.state()}

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        if self.metric == "accuracy":
            merits = (top_classes(probs) == labels).mean(1)
        else:
            merits = np.array([merit(self.metric, converted(p, np.float64), labels) for p in probs])
        self.chosen_ = np.sort(np.argsort(-merits, kind="stable")[: self.top])
        self.inner.fit(take_members(probs, self.chosen_), labels)

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        return self.inner.predict_proba(probs[self.chosen_])

    def to_module(self) -> nn.Module:
        """Return a torch module that selects the members and applies the inner ensemble."""
        import torch

        class Selected(torch.nn.Module):
            def __init__(self, chosen: np.ndarray, inner: nn.Module) -> None:
                super().__init__()
                self.register_buffer("chosen", torch.tensor(chosen))
                self.inner = inner

            def forward(self, probs: Tensor) -> Tensor:
                answer: Tensor = self.inner(probs.index_select(1, self.get_buffer("chosen")))
                return answer

        self._require_fit()
        return Selected(self.chosen_, self.inner.to_module())


def build_ensemble(
    name: str, spec: EnsembleSpec, seed: int = 0, metric: str = "accuracy"
) -> Ensemble:
    """Make an unfitted ensemble by name, with the options of the recipe.

    Args:
        name: the method.
        spec: the `ensemble` table of a recipe.
        seed: of the methods that draw random numbers.
        metric: what the best members are chosen by.

    Raises:
        RecipeError: unknown name.
    """
    ensemble = make_ensemble(name, seed)
    if isinstance(ensemble, StackedEnsemble):
        ensemble = type(ensemble)(
            spec.stacked.hidden,
            epochs=spec.stacked.epochs or None,
            lr=spec.stacked.lr,
            batch_size=spec.stacked.batch_size,
            seed=seed,
        )
    if spec.top:
        ensemble.metric = metric
        ensemble = SelectedEnsemble(ensemble, spec.top)
    ensemble.metric = metric
    return ensemble


class RestoredEnsemble(NamedTuple):
    """A fitted ensemble read from its state.

    Attributes:
        ensemble: the ensemble, without the selection of members.
        members: names of the members that it combines.
    """

    ensemble: Ensemble
    members: list[str]


def restore(name: str, state: Mapping[str, np.ndarray], members: Sequence[str]) -> RestoredEnsemble:
    """Restore a fitted ensemble from the `state()` of `build_ensemble`'s result.

    Args:
        name: the method.
        state: the arrays, and "seen" if the rows of the fit were recorded.
        members: names of all members that `fit` got.
    """
    ensemble = type(make_ensemble(name)).from_state(state)
    ensemble.seen_ = SeenRows(np.asarray(state["seen"])) if "seen" in state else None
    if "chosen_" in state:
        members = [members[i] for i in state["chosen_"]]
    return RestoredEnsemble(ensemble, list(members))


class ChosenMethod(NamedTuple):
    """The method that `choose` picked, and the reason as a sentence."""

    name: str
    reason: str


def choose(
    candidates: Mapping[str, np.ndarray], labels: npt.ArrayLike, metric: str = "accuracy"
) -> ChosenMethod:
    """Choose the simplest method within one standard error of the least log loss.

    Candidates with a lower metric than the simplest one are out, so that the metric is never traded
    for log loss. The log loss is computed at each candidate's own temperature: it detects
    differences that accuracy needs many times more rows for, and every method is calibrated later
    anyway. For balanced accuracy and macro F1 every class has the same weight in it.

    Args:
        candidates: out-of-fold, cross-fitted probabilities (n, k) by method name.
        labels: (n,).
        metric: a name of `weighted_scores.SCORES`.

    Raises:
        DataError: no candidates, or probabilities are not usable.
        RecipeError: a candidate is not a known method.
    """
    if not candidates:
        raise DataError("there is no ensemble to choose from", expected="one candidate at least")
    unknown = [name for name in candidates if name not in ENSEMBLES]
    if unknown:
        raise RecipeError(
            "no such ensemble method", where=unknown[0], expected=f"one of {', '.join(ENSEMBLES)}"
        )
    names = [name for name in ENSEMBLES if name in candidates]
    merits = {name: _merit(metric, candidates[name], labels) for name in names}
    eligible = [name for name in names if merits[name] >= merits[names[0]]]
    weights = _row_weights(metric, labels)
    losses = [_calibrated_losses(candidates[name], labels) * weights for name in eligible]
    choice = simplest([-loss for loss in losses])
    name, best = eligible[choice.chosen], eligible[choice.best]
    kind = "class-balanced log loss" if metric in BALANCED else "log loss"
    figures = f"calibrated {kind} {losses[choice.chosen].mean():.4f}"
    if metric != "log_loss":
        figures += f", {metric.replace('_', ' ')} {merits[name]:.4f}"
    figures += " cross-fitted"
    if name != best:
        return ChosenMethod(
            name,
            f"{figures}, within one standard error ({choice.error:.4f}) of {best}, "
            f"{losses[choice.best].mean():.4f}, and simpler",
        )
    if name != names[0]:
        remark = "no simpler method comes within one standard error"
    elif len(eligible) < len(names):
        fewer = "classify no fewer rows correctly" if metric == "accuracy" else "have no lower one"
        remark = f"and the simplest of those that {fewer}"
    else:
        remark = "and the simplest"
    return ChosenMethod(name, f"the best, {figures}; {remark}")


def _merit(metric: str, probs: np.ndarray, labels: npt.ArrayLike) -> float:
    """The metric, higher is better; the same for all where the log loss alone decides."""
    array = check_probs(probs, 2)
    truth = check_labels(labels, *array.shape)
    if metric == "log_loss":
        return 0.0
    return merit(metric, converted(array, np.float64), truth)


def _row_weights(metric: str, labels: npt.ArrayLike) -> np.ndarray:
    """Weight (n,) of each row's log loss, 1 on average: equal for rows, or in sum for classes."""
    truth = np.asarray(labels)
    if metric not in BALANCED:
        return np.ones(len(truth))
    _, at, counts = np.unique(truth, return_inverse=True, return_counts=True)
    return np.asarray(len(truth) / (len(counts) * counts[at]))


def _calibrated_losses(probs: np.ndarray, labels: npt.ArrayLike) -> np.ndarray:
    """Return the log loss of each row (n,) at the temperature that fits all rows best.

    A single parameter is hardly optimistic, so it is not cross-fitted.
    """
    temperature, truth = fit_temperature(probs, labels), np.asarray(labels)
    losses = np.empty(len(truth))
    for rows in row_blocks(*probs.shape):
        losses[rows] = log_losses(apply_temperature(probs[rows], temperature), truth[rows])
    return losses
