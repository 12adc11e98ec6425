"""The executor of one device: all jobs in this process, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from threefold.recipe.recipe import Job
from threefold.training.executors.order import Schedule
from threefold.training.job import run_job
from threefold.training.left_out import naming_job
from threefold.training.pseudo_labels import Caches
from threefold.training.run import Run


class LocalExecutor:
    """Runs the jobs in this process, in order."""

    computes_features = False

    def run(self, run: Run, jobs: Sequence[Job], caches: Caches) -> None:
        """See `base.Executor`."""
        schedule = Schedule(run, jobs)
        missing = set(schedule.waiting)
        for job in jobs:
            run.watcher.job(job, skipped=job not in missing)
            if job in missing:
                schedule.take(job)
                with naming_job(job):
                    run_job(run, job, caches, schedule.deadline(job))
                schedule.finish(job)
                run.watcher.ended(job)
