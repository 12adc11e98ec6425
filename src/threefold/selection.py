"""Choosing members: the most accurate few of many, as a step of the ensemble, so that it is cross-fitted with it.

The paper trains many networks and joins the best three (Algorithm 1, step 3), which the authors chose by test accuracy.
Here the choice belongs to `fit`: an out-of-fold row is never answered by members that were chosen on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from threefold.combiners import Ensemble
from threefold.ensemble import make_ensemble
from threefold.errors import RecipeError
from threefold.ledger import SeenRows
from threefold.recipe import EnsembleSpec
from threefold.stacked import StackedEnsemble

if TYPE_CHECKING:
    from torch import Tensor, nn


class SelectedEnsemble(Ensemble):
    """Another ensemble on the `top` members that are most accurate on the rows of `fit`; ties go to the first.

    Attributes:
        chosen_: (top,) ascending numbers of the members.

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
        """The members' numbers and the inner ensemble's arrays; read them with `restore`."""
        return {**super().state(), **self.inner.state()}

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        hits = (probs.argmax(-1) == labels).mean(1)
        self.chosen_ = np.sort(np.argsort(-hits, kind="stable")[: self.top])
        self.inner.fit(probs[self.chosen_], labels)

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        return self.inner.predict_proba(probs[self.chosen_])

    def to_module(self) -> nn.Module:
        """The chosen members' rows, then the inner ensemble."""
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


def build_ensemble(name: str, spec: EnsembleSpec, seed: int = 0) -> Ensemble:
    """The ensemble of that name as a recipe wants it, not fitted.

    Raises:
        RecipeError: unknown name.
    """
    ensemble = make_ensemble(name, seed)
    if isinstance(ensemble, StackedEnsemble):
        s = spec.stacked
        ensemble = type(ensemble)(
            s.hidden, epochs=s.epochs or None, lr=s.lr, batch_size=s.batch_size, seed=seed
        )
    return SelectedEnsemble(ensemble, spec.top) if spec.top else ensemble


def restore(
    name: str, state: Mapping[str, np.ndarray], members: Sequence[str]
) -> tuple[Ensemble, list[str]]:
    """The ensemble that has this `state`, without the step of selection, and the members that it combines.

    Args:
        name: its method.
        state: what its `state()` gave.
        members: names of the members that were there to choose from.
    """
    inner = type(make_ensemble(name)).from_state(state)
    inner.seen_ = SeenRows(np.asarray(state["seen"])) if "seen" in state else None
    return inner, [members[i] for i in state["chosen_"]] if "chosen_" in state else list(members)
