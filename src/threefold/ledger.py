"""Who saw which rows: what is fitted declares the rows it saw, and a score on one of them is refused, or called apparent.

Three things hold this up. `Predictions.roles` says which rows the networks of each fold saw, and predictions whose rows were
answered by a network that saw them cannot be made. A `Ledger` holds what each fitted step of an evaluation saw of one table of
rows, and which of them it answers. `Seen` goes with a fitted ensemble, so that it is known on any other table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError
from threefold.files import read_json, write_json

FIT: Final = 1
"""Bit of `Predictions.roles`: gradients came from the row."""

SELECT: Final = 2
"""Bit of `Predictions.roles`: checkpoints and stages were chosen on the row."""

SCORE: Final = 4
"""Bit of `Predictions.roles`: the row is answered."""

TEACH: Final = 8
"""Bit of `Predictions.roles`: the teacher of a member learned from the row's label."""

_FIX = (
    "score what was fitted on other rows (cross_fit), or ask for the apparent score (apparent=True)"
)


@dataclass(frozen=True, eq=False)
class Seen:
    """The rows that something was fitted on, by id: keys (r,) uint64, ascending, the first 8 bytes of BLAKE2b of each id."""

    keys: np.ndarray

    @classmethod
    def of(cls, ids: Iterable[str]) -> Seen:
        """The rows of these ids."""
        return cls(np.unique(_keys(ids)))

    def among(self, ids: Sequence[str]) -> np.ndarray:
        """Which of these ids were seen: booleans (n,)."""
        return np.isin(_keys(ids), self.keys)

    def check(self, what: str, ids: Sequence[str], apparent: bool = False) -> bool:
        """Whether a score on these rows is apparent: some of them were seen.

        Raises:
            DataError: some were, and an apparent score was not asked for.
        """
        seen = self.among(ids)
        if seen.any() and not apparent:
            got = f"{int(seen.sum()):,} of {len(ids):,}, the first {ids[int(seen.argmax())]}"
            raise DataError(
                "the rows were seen by what is scored",
                where=what,
                expected="none",
                got=got,
                fix=_FIX,
            )
        return bool(seen.any())


def _keys(ids: Iterable[str]) -> np.ndarray:
    digests = (
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for name in ids
    )
    return np.frombuffer(b"".join(digests), np.uint64)


@dataclass
class _Entry:
    """One fitted thing: rows that its fits saw, rows that it answers, rows of both."""

    parts: int = 0
    saw: list[int] = field(default_factory=list)
    answers: int = 0
    overlap: int = 0


class Ledger:
    """What each fitted step saw of n rows, and which it answers.

    Args:
        n: number of rows.
        rows: what they are called (oof, test, foreign).
    """

    def __init__(self, n: int, rows: str) -> None:
        self.n, self.rows = n, rows
        self._entries: dict[str, _Entry] = {}
        self._elsewhere: list[dict[str, Any]] = []

    def declare(
        self, what: str, saw: npt.ArrayLike, answers: npt.ArrayLike, *, apparent: bool = False
    ) -> None:
        """Note one fit.

        Args:
            what: the fitted thing; its fits in several folds or parts are one line of `table`.
            saw: (n,) booleans, the rows of the fit.
            answers: (n,) booleans, the rows that are scored with it.
            apparent: the score is called apparent (or "selected on the scored rows"): rows may be both.

        Raises:
            DataError: another number of rows, or rows are both and `apparent` is not set.
        """
        seen, answered = np.asarray(saw, bool), np.asarray(answers, bool)
        if seen.shape != (self.n,) or answered.shape != (self.n,):
            raise DataError(
                "a ledger of other rows", where=what, expected=f"({self.n},)", got=seen.shape
            )
        both = int((seen & answered).sum())
        if both and not apparent:
            raise DataError(
                "rows are scored by what was fitted on them",
                where=what,
                expected="none",
                got=f"{both:,} rows",
                fix=_FIX,
            )
        entry = self._entries.setdefault(what, _Entry())
        entry.parts += 1
        entry.saw.append(int(seen.sum()))
        entry.answers += int(answered.sum())
        entry.overlap += both

    def declare_elsewhere(
        self, what: str, ids: Sequence[str], other: Sequence[str], rows: str
    ) -> None:
        """Note something that was fitted on these rows and answers the rows of another table.

        Raises:
            DataError: a row is in both tables.
        """
        Seen.of(ids).check(what, other)
        saw, answers = f"{len(ids):,} {self.rows} rows", f"{len(other):,} {rows} rows"
        self._elsewhere.append({"what": what, "saw": saw, "answers": answers, "overlap": 0})

    def table(self) -> list[dict[str, Any]]:
        """A line per fitted thing: what, saw, answers (in words), overlap (number of rows)."""
        lines = []
        for what, entry in self._entries.items():
            low, high = min(entry.saw), max(entry.saw)
            told = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            saw = f"{told} of {self.n:,} {self.rows} rows" + (
                f", {entry.parts} times" if entry.parts > 1 else ""
            )
            answers = f"{entry.answers:,} {self.rows} rows" + (
                ", each time the others" if entry.parts > 1 and not entry.overlap else ""
            )
            lines.append({"what": what, "saw": saw, "answers": answers, "overlap": entry.overlap})
        return lines + self._elsewhere


def open_test(run: Path, by: str, rows: int) -> None:
    """Note in a run folder's ledger.json that a verb opens its test rows.

    Training that is begun again opens them once, and so do a reproduction and an export: what they ask is fixed before.
    """
    opened = _opened(run)
    again = (
        opened
        if by == "train"
        else [entry for entry in opened if entry["by"] == by in ("reproduce", "export")]
    )
    if not again:
        entry = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "by": by, "rows": rows}
        write_json(run / "ledger.json", {"test_opened": [*opened, entry]})


def when_opened(run: Path) -> dict[str, Any] | None:
    """When a run's test rows were first opened: at, by, rows, times (how often in all); None if never.

    An export is not counted: it asks whether a file answers as the run does, and tells no score.
    """
    opened = [entry for entry in _opened(run) if entry["by"] != "export"]
    return {**opened[0], "times": len(opened)} if opened else None


def _opened(run: Path) -> list[dict[str, Any]]:
    path = run / "ledger.json"
    found: list[dict[str, Any]] = read_json(path)["test_opened"] if path.exists() else []
    return found
