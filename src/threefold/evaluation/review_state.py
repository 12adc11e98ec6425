"""The decisions of a review, each of which is written at once."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from PIL import Image

from threefold.errors import DataError, ThreefoldError
from threefold.evaluation.review import (
    Action,
    Decision,
    Review,
    ReviewedTable,
    check_decision,
    check_target,
)

THUMBNAIL: Final = 320
"""Longest side of a picture, pixels."""


@dataclass(eq=False)
class _Pending:
    """A decision that is not yet in the file, or None to undo one."""

    name: str
    decision: Decision | None
    rows: int | None = None
    """Rows of the file that has it."""
    error: ThreefoldError | None = None


class ReviewState:
    """The decisions about a data set, and the file that has them.

    A decision is in the file when `decide` returns. Decisions that arrive while the file is being
    written wait for the next writing, which has all of them.

    Args:
        review: what is looked at.
        target: the CSV file; it is written with the first decision.

    Raises:
        RunError: the file exists, or would lie among the images.
    """

    def __init__(self, review: Review, target: Path) -> None:
        check_target(review, target)
        self.review, self.target = review, target
        self.decisions: dict[str, Decision] = {}
        self._known = {item.id for item in review.items}
        self._table = ReviewedTable(review)
        self._pending: list[_Pending] = []
        self._adding, self._writing = threading.Lock(), threading.Lock()

    def decide(self, name: str, action: str, label: str = "") -> dict[str, Any]:
        """Keep a decision and write the file.

        Args:
            name: id of an image in the review.
            action: accept, relabel, drop, or undo.
            label: the new class of a relabelled image.

        Returns:
            The number of decisions of each kind, and of rows in the file.

        Raises:
            DataError: the image is not in the review, or the action or the class is unknown.
            RunError: the file cannot be written: then the decision is not kept.
        """
        if name not in self._known:
            raise DataError("this image is not in the review", got=name)
        decision = None
        if action in get_args(Action):
            decision = Decision(action, label)  # type: ignore[arg-type]
            check_decision(self.review, decision)
        elif action != "undo":
            raise DataError("no such action", got=action, expected="accept, relabel, drop or undo")
        entry = _Pending(name, decision)
        with self._adding:
            self._pending.append(entry)
        with self._writing:
            if entry.rows is None and entry.error is None:
                self._write_pending()
            if entry.error is not None:
                raise entry.error
            return {**self.count(), "rows": entry.rows}

    def _write_pending(self) -> None:
        """Write the file with all decisions that wait; none of them is kept if that fails."""
        with self._adding:
            entries, self._pending = self._pending, []
        decisions = dict(self.decisions)
        for entry in entries:
            if entry.decision is None:
                decisions.pop(entry.name, None)
            else:
                decisions[entry.name] = entry.decision
        try:
            rows = self._table.write(self.target, decisions)
        except ThreefoldError as error:
            for entry in entries:
                entry.error = error
            return
        self.decisions = decisions
        for entry in entries:
            entry.rows = rows

    def count(self) -> dict[str, int]:
        """Count the decisions of each kind."""
        actions = [decision.action for decision in self.decisions.values()]
        return {name: actions.count(name) for name in get_args(Action)}

    def describe(self) -> dict[str, Any]:
        """Return the classes, the file, the notes, the counts, and the images with decisions."""
        return {
            "classes": self.review.sources.train.classes,
            "file": str(self.target),
            "notes": self.review.notes,
            "counts": self.count(),
            "items": [
                {
                    "id": item.id,
                    "part": item.part,
                    "label": item.label,
                    "kinds": item.kinds,
                    "reasons": item.reasons,
                    "suggested": item.suggested,
                    "copy_of": item.copy_of,
                    "decision": self.decisions[item.id]._asdict()
                    if item.id in self.decisions
                    else None,
                }
                for item in self.review.items
            ],
        }

    def picture(self, name: str) -> bytes:
        """Return a PNG of an image of the data set, at most `THUMBNAIL` pixels long.

        Raises:
            DataError: there is no such image, or its file can no longer be read.
        """
        if name not in self._table.places:
            raise DataError("no such image in the data set", got=name)
        _, data, row = self._table.places[name]
        image = Image.fromarray(data.pixels(row))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()
