"""What a worker reports of its job, on its way to the watcher of the process that waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from threefold.recipe.recipe import Job
from threefold.training.progress.watcher import Watcher

INTERVAL: Final = 0.2
"""Least seconds between two reports of the same kind of progress."""

Report = tuple[Any, ...]
"""Name of a watcher's method, then its arguments: plain values only."""


class RelayWatcher(Watcher):
    """Sends what a job reports to another process.

    Args:
        send: takes a report; what it raises ends the job.
    """

    def __init__(self, send: Callable[[Report], None]) -> None:
        self._send = send
        self._images = 0
        self._sent: dict[str, float] = {}

    def batch(self, images: int) -> None:
        """Send how many images were trained on, now and then."""
        self._images += images
        if self._is_due("batch"):
            self.flush()

    def epoch(self, record: dict[str, Any]) -> None:
        """Send the numbers of an epoch."""
        self.flush()
        self._send(("epoch", record))

    def features(self, done: int, total: int) -> None:
        """Send how far the frozen backbones are, now and then, and at their end."""
        if self._is_due("features") or done >= total:
            self._send(("features", done, total))

    def note(self, text: str) -> None:
        """Send a note."""
        self._send(("note", text))

    def flush(self) -> None:
        """Send the images that were not reported yet."""
        if self._images:
            self._send(("batch", self._images))
            self._images = 0

    def _is_due(self, what: str) -> bool:
        now = time.monotonic()
        due = now - self._sent.get(what, -INTERVAL) >= INTERVAL
        if due:
            self._sent[what] = now
        return due


def tell(watcher: Watcher, job: Job, report: Report) -> None:
    """Tell a watcher what a job reports, which may be one of several that run.

    Args:
        watcher: of the run.
        job: the job, which the watcher knows.
        report: what `RelayWatcher` sent.
    """
    name, *values = report
    if name not in ("batch", "epoch", "features", "note"):
        raise ValueError(f"not a report: {name}")
    watcher.focus(job)
    getattr(watcher, name)(*values)
