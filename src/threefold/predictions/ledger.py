"""Record which rows each fitted step saw, and refuse honest scores on those rows.

A score on rows that a step was fitted on must be called apparent.
There are three safeguards. `Predictions.roles` says which rows the networks of each fold saw;
predictions cannot be constructed if a row was scored by a network that saw it. A `Ledger` records,
for one table of rows, what each fitted step of an evaluation saw and which rows it scores.
`SeenRows` stays with a fitted ensemble, so that seen rows are recognised in any other table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError
from threefold.names import count_of
from threefold.predictions.results_schema import LedgerLine

FIT: Final = 1
"""Bit of `Predictions.roles`: gradients came from the row."""

SELECT: Final = 2
"""Bit of `Predictions.roles`: checkpoints and stages were chosen on the row."""

SCORE: Final = 4
"""Bit of `Predictions.roles`: the row is scored."""

TEACH: Final = 8
"""Bit of `Predictions.roles`: the teacher of a member learned from the row's label."""

_FIX = (
    "score what was fitted on other rows (cross_fit), or ask for the apparent score (apparent=True)"
)


@dataclass(frozen=True, eq=False)
class SeenRows:
    """The rows that something was fitted on.

    Attributes:
        keys: (r,) uint64, ascending, the first 8 bytes of the BLAKE2b hash of each row's id.
    """

    keys: np.ndarray

    @classmethod
    def from_ids(cls, ids: Iterable[str]) -> SeenRows:
        """The rows with these ids."""
        return cls(np.unique(_hash_ids(ids)))

    def contains(self, ids: Sequence[str]) -> np.ndarray:
        """Which of these ids were seen: booleans (n,)."""
        return np.isin(_hash_ids(ids), self.keys)

    def check(self, step: str, ids: Sequence[str], apparent: bool = False) -> bool:
        """Whether a score on these rows is apparent, that is, whether any of them were seen.

        Args:
            step: what is scored, for the message.
            ids: ids of the scored rows.
            apparent: the caller asks for an apparent score.

        Raises:
            DataError: some rows were seen, and `apparent` is not set.
        """
        seen = self.contains(ids)
        if seen.any() and not apparent:
            raise DataError(
                "what is scored was fitted on some of these rows",
                where=step,
                expected="none",
                got=f"{int(seen.sum()):,} of {len(ids):,}, the first {ids[int(seen.argmax())]}",
                fix=_FIX,
            )
        return bool(seen.any())


def _hash_ids(ids: Iterable[str]) -> np.ndarray:
    """64-bit hashes (n,) of ids."""
    digests = (
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for name in ids
    )
    return np.frombuffer(b"".join(digests), np.uint64)


@dataclass
class _Entry:
    """All fits of one step: number of fits, and numbers of rows (of each fit, scored, in both)."""

    fits: int = 0
    fitted_on: list[int] = field(default_factory=list)
    scored: int = 0
    overlap: int = 0


class Ledger:
    """A record of the rows that each fitted step saw, and of the rows that it scores.

    Args:
        n: number of rows.
        kind: name of the rows in the table (oof, test, foreign).
    """

    def __init__(self, n: int, kind: str) -> None:
        self.n, self.kind = n, kind
        self._entries: dict[str, _Entry] = {}
        self._other_tables: list[LedgerLine] = []

    def declare(
        self, step: str, fitted_on: npt.ArrayLike, scored: npt.ArrayLike, *, apparent: bool = False
    ) -> None:
        """Record one fit.

        Args:
            step: name of the fitted step; its fits in several folds share one line of `table`.
            fitted_on: (n,) booleans, the rows of the fit.
            scored: (n,) booleans, the rows that the fit scores.
            apparent: the score is called apparent (or "selected on the scored rows"), so a row may
                be both fitted and scored.

        Raises:
            DataError: the number of rows is wrong, or rows are both and `apparent` is not set.
        """
        fitted_mask, scored_mask = np.asarray(fitted_on, bool), np.asarray(scored, bool)
        if fitted_mask.shape != (self.n,) or scored_mask.shape != (self.n,):
            raise DataError(
                "the ledger has another number of rows",
                where=step,
                expected=f"({self.n},)",
                got=fitted_mask.shape,
            )
        overlap = int((fitted_mask & scored_mask).sum())
        if overlap and not apparent:
            raise DataError(
                "rows are scored by what was fitted on them",
                where=step,
                expected="none",
                got=count_of(overlap, "row"),
                fix=_FIX,
            )
        entry = self._entries.setdefault(step, _Entry())
        entry.fits += 1
        entry.fitted_on.append(int(fitted_mask.sum()))
        entry.scored += int(scored_mask.sum())
        entry.overlap += overlap

    def declare_other_table(
        self, step: str, ids: Sequence[str], other_ids: Sequence[str], other_kind: str
    ) -> None:
        """Record a step that was fitted on these rows and scores the rows of another table.

        Raises:
            DataError: a row is in both tables.
        """
        SeenRows.from_ids(ids).check(step, other_ids)
        self._other_tables.append(
            LedgerLine(
                step=step,
                fitted_on=f"{len(ids):,} {self.kind} rows",
                scored=f"{len(other_ids):,} {other_kind} rows",
                overlap=0,
            )
        )

    def table(self) -> list[LedgerLine]:
        """Return one line per step."""
        lines = []
        for step, entry in self._entries.items():
            low, high = min(entry.fitted_on), max(entry.fitted_on)
            count = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            fitted_on = f"{count} of {self.n:,} {self.kind} rows"
            scored = f"{entry.scored:,} {self.kind} rows"
            if entry.fits > 1:
                fitted_on += f", {entry.fits} times"
                if not entry.overlap:
                    scored += ", each time the others"
            lines.append(
                LedgerLine(step=step, fitted_on=fitted_on, scored=scored, overlap=entry.overlap)
            )
        return lines + self._other_tables
