"""Folds of images with any number of labels: iterative stratification, also of whole groups.

Sechidis, Tsoumakas and Vlahavas 2011, "On the Stratification of Multi-Label Data". The rarest label
is shared out first, since later nothing could make up for it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from threefold.errors import DataError

Rows = NDArray[np.int64]


class LabelTable(NamedTuple):
    """Which row has which label."""

    of_row: NDArray[np.int64]
    """(n, k) zeros and ones."""
    names: list[str]
    """Names of the labels, for messages."""

    @classmethod
    def of(cls, targets: ArrayLike, names: Sequence[str] | None) -> LabelTable:
        """Make a table of targets (n, k); labels without names are numbered."""
        table = np.asarray(targets).astype(np.int64)
        return cls(table, list(names or map(str, range(table.shape[1]))))

    def require_folds(self, k: int) -> None:
        """Check that each label can be with and without images in each of k folds.

        Raises:
            DataError: it cannot.
        """
        positive = self.of_row.sum(0)
        negative = len(self.of_row) - positive
        for counts, which in ((positive, "with"), (negative, "without")):
            rare = int(np.argmin(counts))
            if counts[rare] < k:
                raise DataError(
                    f"too few images {which} the label {self.names[rare]} for {k} folds",
                    expected=f"{k} or more",
                    got=int(counts[rare]),
                    fix="lower folds.k, add such images, or leave the label out",
                )

    def absent(self, rows: Rows) -> str:
        """Return a label that all or none of some rows have; empty if there is none."""
        share = self.of_row[rows].mean(0)
        constant = np.flatnonzero((share == 0) | (share == 1))
        return self.names[int(constant[0])] if len(constant) else ""


def stratify(
    targets: NDArray[np.int64],
    groups: Rows | None,
    shares: Sequence[float],
    rng: np.random.Generator,
) -> Rows:
    """Share out rows so that each part has its share of every label, and of all rows.

    Args:
        targets: (n, k) zeros and ones.
        groups: (n,) number of each row's group, which stays whole; None = each row by itself.
        shares: of each part; their sum is 1.
        rng: decides between parts that need a label equally.

    Returns:
        (n,) the part of each row.
    """
    n, k = targets.shape
    items = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    # The rows themselves are a label that all have: parts get their share of rows, too.
    counts = np.zeros((int(items.max(initial=-1)) + 1, k + 1))
    np.add.at(counts, items, np.column_stack([targets, np.ones(n, np.int64)]))
    wanted = np.outer(shares, counts.sum(0))
    part_of = np.full(len(counts), -1)
    left = counts.copy()
    while True:
        remaining = left[:, :k].sum(0)
        if not remaining.any():
            break
        label = int(np.argmin(np.where(remaining > 0, remaining, np.inf)))
        _assign(np.flatnonzero(left[:, label]), label, counts, left, wanted, part_of, rng)
    _assign(np.flatnonzero(part_of < 0), k, counts, left, wanted, part_of, rng)
    return part_of[items]


def _assign(
    items: Rows,
    label: int,
    counts: NDArray[np.float64],
    left: NDArray[np.float64],
    wanted: NDArray[np.float64],
    part_of: Rows,
    rng: np.random.Generator,
) -> None:
    """Give each of some items to the part that wants most of a label, the largest items first."""
    items = rng.permutation(items)
    for item in items[np.argsort(-counts[items, label], kind="stable")]:
        needs = np.round(wanted[:, [label, -1]], 9)  # sums of shares are not exact
        best = np.flatnonzero(needs[:, 0] == needs[:, 0].max())
        best = best[needs[best, 1] == needs[best, 1].max()]
        part = int(rng.choice(best))
        part_of[item] = part
        wanted[part] -= counts[item]
        left[item] = 0.0


def score_parts(
    table: LabelTable, groups: Rows | None, k: int, rng: np.random.Generator
) -> list[Rows]:
    """Return the rows of each of k folds."""
    parts = stratify(table.of_row, groups, [1 / k] * k, rng)
    return [np.flatnonzero(parts == part) for part in range(k)]


def draw_share(
    rest: Rows,
    table: LabelTable,
    groups: Rows | None,
    share: float,
    rng: np.random.Generator,
) -> Rows:
    """Draw a share of some rows, of every label and in whole groups; at least one if possible.

    What would take the last row with a label, or the last without it, from the others is not drawn.
    """
    items = rest if groups is None else groups[rest]
    parts = stratify(table.of_row[rest], None if groups is None else items, [1 - share, share], rng)
    candidates = np.unique(items[parts == 1])
    if not len(candidates):
        candidates = rng.permutation(np.unique(items))
    targets = table.of_row[rest]
    can_lose = targets.any(0) & ~targets.all(0)
    is_drawn = np.zeros(len(rest), bool)
    for item in candidates:
        kept = targets[~is_drawn & (items != item)]
        if len(kept) and (kept.any(0) & ~kept.all(0))[can_lose].all():
            is_drawn |= items == item
            if not (parts == 1).any():
                break
    return np.sort(rest[is_drawn])
