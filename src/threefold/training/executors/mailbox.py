"""The mailbox of a Ray cluster's jobs; without torch, so that its process is there at once."""

from __future__ import annotations

from typing import Any

from threefold.recipe.recipe import Job

Letter = tuple[Job, str, tuple[Any, ...]]
"""A job, the node that does it, and its report (`relay.Report`)."""


class Mailbox:
    """Reports of all jobs on their way to the process that waits for them; a Ray actor.

    It also tells the jobs that they are to stop.
    """

    def __init__(self) -> None:
        self._reports: list[Letter] = []
        self._stopped = False

    def put(self, job: Job, node: str, report: tuple[Any, ...]) -> bool:
        """Take a report of a job on a node; returns whether the job is to stop."""
        self._reports.append((job, node, report))
        return self._stopped

    def take(self) -> list[Letter]:
        """Return the reports since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def stop(self) -> None:
        """Let all jobs stop at their next safe point, once they have saved their state."""
        self._stopped = True
