"""Files of the engines that were chosen: one for the machine, and one in each run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from threefold.errors import RunError
from threefold.files import one_at_a_time, write_json
from threefold.predictions.records import read_choices, seal


class EngineRecord:
    """A JSON file of engines by key; one that cannot be read or written is as good as empty.

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
        """Return the name of an engine; empty if there is none."""
        if self.path is None or not self.path.exists():
            return ""
        try:
            return read_choices(self.path).get(key, "")
        except RunError:
            return ""

    def put(self, key: str, name: str) -> None:
        """Add or replace a choice."""
        if self.path is None or self.get(key) == name:
            return
        try:
            choices = read_choices(self.path) if self.path.exists() else {}
        except RunError:
            choices = {}
        try:
            write_json(self.path, seal({**choices, key: name}))
        except RunError:
            return
