"""Files of what was measured to be fastest: one for the machine, and one in each run folder.

They hold the engines of features, and the precisions of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from threefold.errors import RunError
from threefold.files import one_at_a_time
from threefold.json_files import write_json
from threefold.predictions.records import read_choices, seal


class ChoiceRecord:
    """A JSON file of names by key; one that cannot be read or written is as good as empty.

    Args:
        path: the file; None = nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let other processes wait that are about to choose."""
        if self.path is None:
            yield
            return
        with one_at_a_time(self.path.with_name(f".{self.path.name}.lock")):
            yield

    def get(self, key: str) -> str:
        """Return what was chosen; empty if nothing was."""
        if self.path is None or not self.path.exists():
            return ""
        try:
            return read_choices(self.path).get(key, "")
        except RunError:
            return ""

    def put(self, key: str, name: str, *, must_be_kept: bool = False) -> None:
        """Add or replace a choice.

        Raises:
            RunError: the file cannot be written, and the choice must be kept.
        """
        if self.path is None or self.get(key) == name:
            return
        try:
            choices = read_choices(self.path) if self.path.exists() else {}
        except RunError:
            choices = {}
        try:
            write_json(self.path, seal({**choices, key: name}))
        except RunError:
            if must_be_kept:
                raise
