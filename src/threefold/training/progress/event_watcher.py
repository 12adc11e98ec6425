"""What a run reports, as lines of JSON in a file that another process reads meanwhile."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

from threefold.json_files import finite_json
from threefold.predictions.results_schema import Expected
from threefold.predictions.run_results import AnyResults
from threefold.recipe.recipe import Job, Recipe, fold_name
from threefold.training.progress.watcher import Watcher

INTERVAL: Final = 1.0
"""Least seconds between two lines about the same kind of progress."""


class EventLog:
    """Appends events to a file, each a line of JSON with `event` and `time` (seconds since 1970).

    An event that cannot be written, as on a full disk, stops nothing.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **values: Any) -> bool:
        """Append an event; it can be read at once.

        Returns:
            Whether it could be written.
        """
        tree = {"event": event, "time": round(time.time(), 2), **values}
        line = json.dumps(finite_json(tree), ensure_ascii=True, default=float, allow_nan=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                if file.tell() and not self._ends_line(file):
                    file.write(b"\n")  # an earlier line was cut short
                file.write(line.encode() + b"\n")
        except OSError:
            return False
        return True

    @staticmethod
    def _ends_line(file: IO[bytes]) -> bool:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


class EventWatcher(Watcher):
    """Writes progress, epochs, notes and scores to an event log.

    Args:
        log: where to.
    """

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self._written: dict[str, float] = {}
        self._images: dict[Job, int] = {}
        self._job: Job | None = None

    def begin(self, folder: Path, recipe: Recipe) -> None:
        """A run begins or goes on."""
        self.log.write("begin", name=recipe.name)

    def plan(self, jobs: Sequence[Job], images: Sequence[int]) -> None:
        """Write the jobs to come, and how many images each will train on."""
        self.log.write("jobs", jobs=[_words(job) for job in jobs], images=list(images))

    def job(self, job: Job, skipped: bool) -> None:
        """Write which job begins, or is skipped."""
        self.focus(job)
        self._images[job] = 0
        self.log.write("job", job=_words(job), skipped=skipped)

    def focus(self, job: Job) -> None:
        """What follows is about one of several jobs."""
        self._job = job

    def ended(self, job: Job, done: bool = True) -> None:
        """Write which job is done, or waits again."""
        self.log.write("ended", job=_words(job), done=done)

    def batch(self, images: int) -> None:
        """Write how many images the job has trained on, now and then."""
        if self._job is None:
            return
        self._images[self._job] += images
        if self._is_due(f"progress {self._job}"):
            self.log.write("progress", job=_words(self._job), images=self._images[self._job])

    def features(self, done: int, total: int) -> None:
        """Write how far the frozen backbones are, now and then, and at their end."""
        if self._is_due("features") or done >= total:
            self.log.write("features", done=done, total=total)

    def epoch(self, record: dict[str, Any]) -> None:
        """Write the numbers of an epoch."""
        names = ("epoch", "loss", "select_accuracy", "select_loss", "images_per_second")
        values = {name: record[name] for name in names if name in record}
        if self._job is not None:
            self.log.write("epoch", job=_words(self._job), **values, images=self._images[self._job])

    def scored(self, results: AnyResults) -> None:
        """Write the accuracy to expect; `pending` members are still to be trained.

        There is none where images have any number of labels.
        """
        expected = results.expected
        accuracy = expected.accuracy if isinstance(expected, Expected) else None
        self.log.write("scored", accuracy=accuracy, pending=len(results.pending))

    def note(self, text: str) -> None:
        """Write a note."""
        self.log.write("note", text=text)

    def _is_due(self, event: str) -> bool:
        now = time.monotonic()
        due = now - self._written.get(event, -INTERVAL) >= INTERVAL
        if due:
            self._written[event] = now
        return due


def _words(job: Job) -> list[str]:
    """Return member, fold and stage as texts."""
    return [job.member, fold_name(job.fold), job.stage]
