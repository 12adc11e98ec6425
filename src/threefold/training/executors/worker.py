"""A worker: opens a run, wherever the process runs, and does the jobs that it is given."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from threefold.data.dataset import Sources
from threefold.errors import RunError, ThreefoldError
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Job, Recipe
from threefold.training.distillation import TEACHERS_FOLDER, Distillation
from threefold.training.executors.claims import BEAT, LEASE, Claims
from threefold.training.head_jobs import open_features, prepare_features
from threefold.training.job import run_job
from threefold.training.left_out import JobMemoryError, free_memory, naming_job
from threefold.training.progress.watcher import Watcher
from threefold.training.pseudo_labels import Caches
from threefold.training.run import Run
from threefold.training.run_images import image_changes

CLAIMS_FOLDER: Final = ".claims"
"""In the run folder, while its jobs run: who does which."""

Outcome = Literal["done", "claimed"]
"""Of a job: it is done, or it belongs to another worker that may be alive."""


@dataclass(frozen=True)
class WorkOrder:
    """What a worker needs to know of a run; plain values only.

    Attributes:
        folder: the run folder, as the worker sees it.
        recipe: the run's recipe as JSON; `fit` first trains a part of that in the folder.
        images: where the images are, if not at the recipe's data.root.
        lease: seconds without a sign of life after which the owner of a claim counts as dead.
        beat: seconds between two signs of life.
    """

    folder: str
    recipe: str
    images: str = ""
    lease: float = LEASE
    beat: float = BEAT

    @classmethod
    def of(cls, run: Run) -> WorkOrder:
        """Return the order of a run in this process."""
        return cls(str(run.dir.absolute()), run.recipe.model_dump_json(exclude_none=True))


class Worker:
    """A run that was opened to do some of its jobs; make one with `open_worker`.

    Args:
        run: the run.
        claims: of its jobs.
    """

    def __init__(self, run: Run, claims: Claims) -> None:
        self._run, self._claims = run, claims
        self._caches = Caches(run.open_pixels(), open_features(run))

    def prepare_features(self, jobs: Sequence[Job]) -> None:
        """Compute what those of some head jobs will read that are not done, where it is missing.

        Raises:
            ThreefoldError: it cannot be computed, or not kept.
        """
        prepare_features(self._run, self._caches.features, jobs)

    def run(self, job: Job, seconds: float = math.inf, *, takes_over: bool = False) -> Outcome:
        """Do a job, unless it is done or another worker does it.

        Args:
            job: those that it goes on from are done.
            seconds: after which it is cut short.
            takes_over: whether it is known that whoever had it before is dead.

        Raises:
            ThreefoldError: it cannot be done.
        """
        deadline = time.monotonic() + seconds
        if self._run.folder.is_done(job):
            return "done"
        claim = self._claims.claim(job, takes_over=takes_over)
        if claim is None:
            return "claimed"
        with claim:
            try:
                if not self._run.folder.is_done(job):
                    with naming_job(job):
                        run_job(self._run, job, self._caches, deadline, claim.check)
            except ThreefoldError as error:
                if isinstance(error, JobMemoryError):
                    free_memory()  # for the next job of this process
                if claim.is_mine:
                    raise
                return "claimed"  # files changed under this worker, because another one wrote them
        return "done"


def open_worker(
    order: WorkOrder, sources: Sources | None = None, watcher: Watcher | None = None
) -> Worker:
    """Open a run to do some of its jobs.

    Args:
        order: of the run.
        sources: all its images (`Run.all_sources`), where they are known; None = read and verify
            them.
        watcher: hears what the jobs report.

    Raises:
        ThreefoldError: the run or its images cannot be read, or are others than it began with.
    """
    recipe = Recipe.parse(json.loads(order.recipe), where="the order of a worker")
    run = Run(RunFolder(order.folder, recipe), watcher)
    if sources is None:
        sources = _read_sources(run, order.images)
    run.sources = run.all_sources = sources
    return Worker(run, Claims(run.dir / CLAIMS_FOLDER, order.lease, order.beat))


def _read_sources(run: Run, images: str) -> Sources:
    """Read the images of a run, or of the teachers of a student, and check what they are.

    Raises:
        ThreefoldError: they cannot be read, or are others than the run began with.
    """
    student = run.dir.parent.parent
    if run.dir.parent.name == TEACHERS_FOLDER and (student / "recipe.toml").exists():
        distillation = Distillation.from_run(Run.open(student))
        assert distillation is not None
        nested = distillation.nested_run(int(run.dir.name.removeprefix("fold")))
        assert nested is not None
        sources = nested.all_sources
    else:
        if images:
            run.sources = run.read_sources(images)
        sources = run.all_sources
    run.sources = run.all_sources = sources
    changes = image_changes(run, sources)
    if changes:
        raise RunError(
            "a worker finds other images than the run began with",
            where=images or run.recipe.data.root,
            got="; ".join(changes),
            fix="give all workers the same images",
        )
    return sources
