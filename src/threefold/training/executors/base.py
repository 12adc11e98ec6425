"""What every executor is: something that does the jobs of a run that are missing.

No result depends on the executor, but for what depends on the machine anyway: the number of threads
and the kind of processor that a job runs on (docs/scale.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from threefold.recipe.recipe import Job
from threefold.training.pseudo_labels import Caches
from threefold.training.run import Run


class Executor(Protocol):
    """Does the jobs of a run.

    Attributes:
        computes_features: whether features of frozen backbones are computed where the jobs run, and
            not by the caller before.
    """

    computes_features: bool

    def run(self, run: Run, jobs: Sequence[Job], caches: Caches) -> None:
        """Do those of some jobs that are missing; all are done when it returns.

        Features of frozen backbones, the record of the run (run.json) and the soft targets of a
        student are there before.

        Args:
            run: the run, whose lock this process holds. Its watcher knows the jobs, hears of their
                progress, and may stop them; what is finished then stays.
            jobs: in the order of the run's; a job comes after those that it goes on from.
            caches: of the run's images.

        Raises:
            JobMemoryError: a job does not fit into memory; those that do not need it are done, if
                several run at the same time.
            ThreefoldError: a job cannot be done; the message says which and what to do.
        """
