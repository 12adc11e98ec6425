"""What a run reports while it trains: jobs, batches, epochs and notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from threefold.recipe import Job


class Watcher:
    """A progress listener that ignores everything; subclasses override what they show or log."""

    def plan(self, jobs: Sequence[Job], images: Sequence[int]) -> None:
        """Receive the jobs to come, and how many images each will train on."""

    def job(self, job: Job, skipped: bool) -> None:
        """A job begins, or is skipped because it is done."""

    def batch(self, images: int) -> None:
        """Training has advanced by `images` images."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch has ended; `record` is its entry in history.json."""

    def features(self, done: int, total: int) -> None:
        """Frozen backbones have answered `done` of `total` images."""

    def note(self, text: str) -> None:
        """Receive a message for the user."""
