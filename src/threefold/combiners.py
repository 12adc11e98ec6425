"""Ensembles: the members' probabilities (m, n, k) to one answer (n, k), in scikit-learn's grammar.

Here: what every ensemble can do, and the methods without parameters; those that learn are in `learned` and `stacked`.
`to_module()` gives the same arithmetic as a torch module for export; torch is imported only there. Fit on out-of-fold
rows: on rows that members were trained on, their probabilities say nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError, RecipeError, RunError
from threefold.ledger import SeenRows
from threefold.predictions__checks import check_labels, check_probs

if TYPE_CHECKING:
    from torch import Tensor, nn


class Ensemble(ABC):
    """What every ensemble can do; subclasses fill in `_fit`, `_combine` and `to_module`.

    Attributes:
        needs_fit: whether `fit` learns anything; where it does not, `predict_proba` works at once.
        seed: for methods that draw random numbers; the others ignore it.
        seen_: the rows of the fit, where `fit` was told their ids; else None.
    """

    needs_fit: ClassVar[bool] = True
    seed: int = 0
    seen_: SeenRows | None = None
    _state: ClassVar[tuple[str, ...]] = ()

    def fit(
        self, probs: npt.ArrayLike, labels: npt.ArrayLike, ids: Sequence[str] | None = None
    ) -> Self:
        """Learn from probabilities (m, n, k) and labels (n,); `ids` (n) declare the rows that are seen by it.

        Raises:
            DataError: probabilities, labels or ids are not usable.
        """
        array = check_probs(probs, 3)
        if ids is not None and len(ids) != array.shape[1]:
            raise DataError(
                "ids do not match the probabilities", expected=array.shape[1], got=len(ids)
            )
        self.fit_checked(array, check_labels(labels, *array.shape[1:]))
        self.seen_ = SeenRows.from_ids(ids) if ids is not None and self.needs_fit else None
        return self

    def fit_checked(self, probs: np.ndarray, labels: np.ndarray) -> Self:
        """`fit` on arrays that `check_probs` and `check_labels` have passed; a look at 14 million numbers takes its time."""
        self._fit(probs, labels)
        return self

    def predict_proba(self, probs: npt.ArrayLike) -> np.ndarray:
        """Probabilities (n, k) float64 from the members' (m, n, k).

        Raises:
            DataError: probabilities are not usable, or of other members or classes than in `fit`.
            RunError: not fitted.
        """
        self._require_fit()
        return self._combine(check_probs(probs, 3))

    def predict(self, probs: npt.ArrayLike) -> np.ndarray:
        """Class numbers (n,); ties go to the first class."""
        return np.asarray(self.predict_proba(probs).argmax(-1))

    def state(self) -> dict[str, np.ndarray]:
        """The fitted arrays, by name.

        Raises:
            RunError: not fitted.
        """
        self._require_fit()
        return {name: np.asarray(getattr(self, name)) for name in self._state}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """An ensemble that predicts as the one whose `state` this is.

        Raises:
            DataError: an array is missing.
        """
        ensemble = cls()
        for name in cls._state:
            if name not in state:
                raise DataError(
                    f"not the state of a {cls.__name__}",
                    expected=", ".join(cls._state),
                    got=", ".join(state),
                )
            setattr(ensemble, name, np.asarray(state[name]))
        return ensemble

    @abstractmethod
    def to_module(self) -> nn.Module:
        """The same as a torch module: (b, m, k) to (b, k)."""

    @abstractmethod
    def _combine(self, probs: np.ndarray) -> np.ndarray: ...

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:  # noqa: B027 (methods without parameters need none)
        """Learn nothing, unless a subclass does."""

    def _require_fit(self) -> None:
        if self.needs_fit and not hasattr(self, self._state[0]):
            raise RunError(
                "the ensemble is not fitted",
                where=type(self).__name__,
                fix="call fit(probs, labels) first",
            )


class MeanEnsemble(Ensemble):
    """Average of the members' probabilities (the paper's AVG-Softmax)."""

    needs_fit = False

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(probs.mean(0, dtype=np.float64))

    def to_module(self) -> nn.Module:
        """Mean over the members' axis."""
        from torch import nn

        class Mean(nn.Module):
            def forward(self, probs: Tensor) -> Tensor:
                return probs.mean(1)

        return Mean()


class PrunedEnsemble(Ensemble):
    """Keep each member's `keep` largest values, zero the rest, average (the paper's EXT-Softmax, Algorithm 2).

    Ties keep the first class. The average is divided by its sum, which changes no answer. Keeping all classes is the
    mean.

    Raises:
        RecipeError: keep is below 1.
    """

    needs_fit = False
    _state = ("keep",)

    def __init__(self, keep: int = 1) -> None:
        if keep < 1:
            raise RecipeError(
                "a pruned ensemble keeps at least one value",
                where="keep",
                expected="1 or more",
                got=keep,
            )
        self.keep = keep

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """An ensemble that predicts as the one whose `state` this is."""
        ensemble = super().from_state(state)
        ensemble.keep = int(ensemble.keep)
        return ensemble

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        kept = np.where(_largest(probs, self.keep), probs, 0).sum(0, dtype=np.float64)
        return np.asarray(kept / kept.sum(-1, keepdims=True))

    def to_module(self) -> nn.Module:
        """The largest values by repeated argmax, which breaks ties alike in numpy, torch and ONNX (top-k does not)."""
        return _pruning_module(self.keep, values=True)


class VoteEnsemble(Ensemble):
    """Share of the members whose first choice a class is (EXT-Softmax as the authors coded it for CIFAR and SVHN).

    Ties go to the first class, within a member and between classes.
    """

    needs_fit = False

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(_largest(probs, 1).mean(0, dtype=np.float64))

    def to_module(self) -> nn.Module:
        """Mean over the members of the one-hot first choice."""
        return _pruning_module(1, values=False)


class LinearEnsemble(Ensemble):
    """Average of the members with learned weights, `weights_` (m,), which sum to 1."""

    _state = ("weights_",)
    weights_: np.ndarray

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        check_fitted_on(len(self.weights_), len(probs), "members")
        return np.asarray(np.tensordot(self.weights_, probs, 1))

    def to_module(self) -> nn.Module:
        """Weighted sum over the members' axis."""
        import torch

        self._require_fit()

        class Weighted(torch.nn.Module):
            weights: Tensor

            def __init__(self, weights: np.ndarray) -> None:
                super().__init__()
                self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32)[:, None])

            def forward(self, probs: Tensor) -> Tensor:
                return (probs * self.weights).sum(1)

        return Weighted(self.weights_)


def check_fitted_on(fitted: int, got: int, what: str) -> None:
    """Raise unless an ensemble is used on as many `what` (members, classes) as it was fitted on.

    Raises:
        DataError: the numbers differ.
    """
    if fitted != got:
        raise DataError(f"the ensemble was fitted on other {what}", expected=fitted, got=got)


def _largest(probs: np.ndarray, keep: int) -> np.ndarray:
    """True at the `keep` largest values of the last axis, the first ones on ties."""
    mask = np.zeros(probs.shape, dtype=bool)
    for _ in range(min(keep, probs.shape[-1])):
        first = np.where(mask, -1, probs).argmax(-1)
        np.put_along_axis(mask, first[..., None], True, -1)
    return mask


def _pruning_module(keep: int, values: bool) -> nn.Module:
    """(b, m, k) to (b, k): the `keep` largest values of each member, or ones in their places, averaged to sum 1."""
    import torch

    class Pruning(torch.nn.Module):
        def forward(self, probs: Tensor) -> Tensor:
            classes = torch.arange(probs.shape[-1], device=probs.device)
            mask = torch.zeros_like(probs, dtype=torch.bool)
            for _ in range(min(keep, probs.shape[-1])):
                mask = mask | (classes == torch.where(mask, -1.0, probs).argmax(-1, keepdim=True))
            kept = torch.where(mask, probs if values else 1.0, 0.0).sum(1)
            return kept / kept.sum(-1, keepdim=True)

    return Pruning()
