"""What a run reports while it trains, and how it is stopped where nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from threefold.predictions.run_results import AnyResults
from threefold.recipe.recipe import Job, Recipe


class Watcher:
    """A progress listener that ignores everything; subclasses override what they show or log.

    Attributes:
        defers_stop: whether training will soon raise what `stop` is set to, once it has saved its
            state. Elsewhere whoever wants it to end raises the exception at once.
        stop: what training raises at its next safe point; None = it goes on.
    """

    defers_stop: bool = False
    stop: BaseException | None = None

    @contextmanager
    def deferring_stop(self) -> Iterator[None]:
        """Defer a stop while training can save its state after each step."""
        self.defers_stop = True
        try:
            yield
        finally:
            self.defers_stop = False
        if self.stop is not None:  # it came after the last safe point
            raise self.stop

    def begin(self, folder: Path, recipe: Recipe) -> None:
        """A run begins or goes on in a folder; `fit` does so twice, for heads and for all."""

    def plan(self, jobs: Sequence[Job], images: Sequence[int]) -> None:
        """Receive the jobs to come, and how many images each will train on."""

    def job(self, job: Job, skipped: bool) -> None:
        """A job begins, or is skipped because it is done."""

    def focus(self, job: Job) -> None:
        """What follows is about this job, of several that run at the same time."""

    def ended(self, job: Job, done: bool = True) -> None:
        """A job is done, or waits again because its process died."""

    def batch(self, images: int) -> None:
        """Training has advanced by `images` images."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch has ended; `record` is its entry in history.json."""

    def features(self, done: int, total: int) -> None:
        """Frozen backbones have answered `done` of `total` images."""

    def scored(self, results: AnyResults) -> None:
        """The run, or a first part of it, has been scored."""

    def note(self, text: str) -> None:
        """Receive a message for the user."""
