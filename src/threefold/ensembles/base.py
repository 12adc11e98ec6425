"""Base classes of all ensembles: the members' probabilities (m, n, k) to one answer (n, k).

The interface is scikit-learn's. `to_module()` returns the same arithmetic as a torch module for
export; torch is imported only there. Fit on out-of-fold rows: probabilities on rows that a member
was trained on are too confident to learn from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError, RunError
from threefold.predictions.checks import check_labels, check_probs
from threefold.predictions.ledger import SeenRows
from threefold.scratch import row_blocks, scratch

if TYPE_CHECKING:
    from torch import Tensor, nn


class Ensemble(ABC):
    """Base class; subclasses implement `_fit`, `_combine` and `to_module`, and name `_state`.

    Attributes:
        needs_fit: whether `fit` learns anything. If not, `predict_proba` works without it.
        seed: for methods that draw random numbers; the others ignore it.
        metric: what the best members are chosen by, one of `weighted_scores.SCORES`; methods that
            choose none ignore it, and greedy selection goes by accuracy.
        seen_: the rows used by `fit`, if it got their ids; else None.
    """

    needs_fit: ClassVar[bool] = True
    seed: int = 0
    metric: str = "accuracy"
    seen_: SeenRows | None = None
    _state: ClassVar[tuple[str, ...]] = ()

    def fit(
        self, probs: npt.ArrayLike, labels: npt.ArrayLike, ids: Sequence[str] | None = None
    ) -> Self:
        """Learn from labelled rows.

        Args:
            probs: (m, n, k) out-of-fold probabilities: members, rows, classes. Those of another
                order are turned by `Predictions.from_arrays`.
            labels: (n,) class numbers.
            ids: n row ids; `seen_` records them, so that scoring on the same rows is refused.

        Raises:
            DataError: probabilities, labels or ids are not usable.
        """
        array = check_probs(probs, 3)
        _check_axes(array, labels)
        if ids is not None and len(ids) != array.shape[1]:
            raise DataError(
                "ids do not match the probabilities", expected=array.shape[1], got=len(ids)
            )
        self.fit_checked(array, check_labels(labels, *array.shape[1:]))
        self.seen_ = SeenRows.from_ids(ids) if ids is not None and self.needs_fit else None
        return self

    def fit_checked(self, probs: np.ndarray, labels: np.ndarray) -> Self:
        """Fit on arrays that `check_probs` and `check_labels` have already accepted.

        Checking millions of probabilities again for every part of a cross-fit takes noticeable
        time.
        """
        if self.needs_fit:
            self._fit(probs, labels)
        return self

    def predict_proba(self, probs: npt.ArrayLike) -> np.ndarray:
        """Combine the members' probabilities (m, n, k) into (n, k) float64.

        Raises:
            DataError: probabilities are not usable, or the members or classes are not those of
                `fit`.
            RunError: not fitted.
        """
        self._require_fit()
        return self.combine_checked(check_probs(probs, 3))

    def combine_checked(self, probs: np.ndarray) -> np.ndarray:
        """Combine an array that `check_probs` has already accepted."""
        return combine_by_block(self._combine, probs)

    def predict(self, probs: npt.ArrayLike) -> np.ndarray:
        """Return class numbers (n,); ties go to the first class."""
        return np.asarray(self.predict_proba(probs).argmax(-1))

    def state(self) -> dict[str, np.ndarray]:
        """Return the fitted arrays by name.

        Raises:
            RunError: not fitted.
        """
        self._require_fit()
        return {name: np.asarray(getattr(self, name)) for name in self._state}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """Restore an ensemble from its `state`.

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
        """Return the same arithmetic as a torch module, (b, m, k) to (b, k)."""

    @abstractmethod
    def _combine(self, probs: np.ndarray) -> np.ndarray:
        """Combine checked probabilities (m, n, k) of a block of rows into (n, k)."""

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        """Learn from checked probabilities (m, n, k) and labels (n,)."""
        raise NotImplementedError(f"{type(self).__name__} needs a fit but does not implement _fit")

    def _require_fit(self) -> None:
        if self.needs_fit and not hasattr(self, self._state[0]):
            raise RunError(
                "the ensemble is not fitted",
                where=type(self).__name__,
                fix="call fit(probs, labels) first",
            )


def _check_axes(probs: np.ndarray, labels: npt.ArrayLike) -> None:
    """Refuse probabilities (n, m, k), which show by the number of labels."""
    rows, members, _ = probs.shape
    if np.shape(labels) == (rows,) and rows != members:
        raise DataError(
            "the axes of the probabilities are in another order",
            expected="(members, rows, classes)",
            got=f"{probs.shape} with {rows} labels",
            fix='probs.transpose(1, 0, 2), or Predictions.from_arrays(..., axes="nmk").probs',
        )


class LinearEnsemble(Ensemble):
    """Average of the members with learned weights `weights_` (m,), which sum to 1."""

    _state = ("weights_",)
    weights_: np.ndarray

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        check_fitted_on(len(self.weights_), len(probs), "members")
        return np.asarray(np.tensordot(self.weights_, probs, 1))

    def to_module(self) -> nn.Module:
        """Return the weighted sum over the members' axis as a torch module."""
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


def combine_by_block(combine: Callable[[np.ndarray], np.ndarray], probs: np.ndarray) -> np.ndarray:
    """Return what `combine` makes of each block of rows (m, r, k), together (n, k) float64."""
    m, n, k = probs.shape
    answers = scratch((n, k))
    for rows in row_blocks(n, m * k):
        answers[rows] = combine(probs[:, rows])
    return answers


def check_fitted_on(expected: int, got: int, what: str) -> None:
    """Check that an ensemble gets as many `what` (members, classes) as in its fit.

    Raises:
        DataError: the numbers differ.
    """
    if expected != got:
        raise DataError(f"the ensemble was fitted on other {what}", expected=expected, got=got)
