"""Newton's steps of logistic stacking with many classes.

Its Hessian has a row for each member and each class. As a whole it takes k squared numbers, and a
Cholesky factor k cubed operations; kept as the product that it is, both grow with k.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from threefold.scratch import RowBlock

_TOLERANCE: Final = 1e-9
"""Remaining share of the right-hand side at which conjugate gradients stop."""

_STEPS: Final = 1000
"""Most steps of conjugate gradients; it takes about ten with few rows of each class."""


class WideHessian:
    """The matrix [[members, mixed], [mixed', diag(diagonal) - P P']], positive definite.

    Args:
        members: (p, p).
        mixed: (p, k).
        diagonal: (k,).
        probs: the probabilities P (k, r) of each block of rows.
    """

    def __init__(
        self, members: np.ndarray, mixed: np.ndarray, diagonal: np.ndarray, probs: list[RowBlock]
    ) -> None:
        self.members, self.mixed, self.diagonal, self.probs = members, mixed, diagonal, probs
        self._by_member: np.ndarray | None = None

    def solve(self, target: np.ndarray) -> np.ndarray:
        """Return x (p + k,) with H x = target, by blocks: of the members directly."""
        p = len(self.members)
        if self._by_member is None:
            solved = self._solve_classes(np.column_stack([self.mixed.T, target[p:]]))
            self._by_member, of_classes = solved[:, :p], solved[:, p]
        else:
            of_classes = self._solve_classes(target[p:, None])[:, 0]
        rest = self.members - self.mixed @ self._by_member
        of_members = np.linalg.solve(rest, target[:p] - self.mixed @ of_classes)
        return np.concatenate([of_members, of_classes - self._by_member @ of_members])

    def _times(self, vectors: np.ndarray) -> np.ndarray:
        """Multiply the lower right block by vectors (k, c)."""
        product: np.ndarray = self.diagonal[:, None] * vectors
        for _, probs in self.probs:
            product -= probs @ (probs.T @ vectors)
        return product

    def _solve_classes(self, targets: np.ndarray) -> np.ndarray:
        """Solve the lower right block for each column of targets (k, c), by conjugate gradients."""
        scale = self.diagonal[:, None].copy()
        for _, probs in self.probs:
            scale[:, 0] -= np.einsum("kr,kr->k", probs, probs)
        answer, left = np.zeros_like(targets), np.array(targets)
        goal = _TOLERANCE * np.linalg.norm(targets, axis=0)
        direction = left / scale
        gain = (left * direction).sum(0)
        for _ in range(_STEPS):
            if (np.linalg.norm(left, axis=0) <= goal).all():
                break
            product = self._times(direction)
            # A column that is solved exactly has no direction left.
            curvature = np.maximum((direction * product).sum(0), np.finfo(np.float64).tiny)
            length = gain / curvature
            answer += length * direction
            left -= length * product
            scaled = left / scale
            previous, gain = gain, (left * scaled).sum(0)
            share = np.divide(gain, previous, out=np.zeros_like(gain), where=previous > 0)
            direction = scaled + share * direction
        return answer
