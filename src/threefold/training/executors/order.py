"""The order of a run's jobs: which of them can start, and how much of the time budget each gets."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from threefold.recipe.recipe import Job
from threefold.training.head_jobs import EPOCHS
from threefold.training.run import Run


def jobs_before(run: Run, job: Job) -> list[Job]:
    """Return the jobs that a job goes on from, in order, all of its fold.

    These are its member's earlier stages, and all stages of the members that it joins, starts from
    or has pseudo labels from.
    """
    recipe, needed = run.recipe, [job.member]
    for name in needed:  # grows
        spec = recipe.member(name)
        others = [*spec.joins, *([spec.starts_from] if spec.starts_from else [])]
        if recipe.uses_pseudo_labels(name):
            others += recipe.teachers
        needed += [other for other in others if other not in needed]
    stages = [stage.name for stage in recipe.stages_of(job.member)]
    own = stages[: stages.index(job.stage)]
    return [
        other
        for other in run.jobs
        if other.fold == job.fold
        and other.member in needed
        and (other.member != job.member or other.stage in own)
    ]


def count_work(run: Run, job: Job) -> int:
    """Return the most images that a job trains on, over all its epochs; a linear head has one."""
    stage, head = run.recipe.stage(job.stage), run.recipe.member(job.member).head
    epochs = stage.epochs
    if stage.kind == "head":
        epochs = 1 if head.is_linear else epochs or EPOCHS
    unlabelled = len(run.unlabelled) if run.recipe.uses_pseudo_labels(job.member) else 0
    return epochs * (len(run.roles[job.fold].fit) + unlabelled)


class _Running(NamedTuple):
    """When a job began, and when it must stop; time.monotonic() values."""

    began: float
    deadline: float


class Schedule:
    """The jobs of a run that are not done: waiting, running, or lost and waiting again.

    Args:
        run: the run.
        jobs: in the order of the run's; those that are done are left out.
        slots: how many jobs run at the same time.

    Attributes:
        waiting: jobs that no one has started, in order.
        losses: how often the process of a job died.
    """

    def __init__(self, run: Run, jobs: Sequence[Job], slots: int = 1) -> None:
        self.slots = slots
        self.waiting = [job for job in jobs if not run.folder.is_done(job)]
        self.losses: dict[Job, int] = {}
        self._running: dict[Job, _Running] = {}
        missing = set(self.waiting)
        self._before = {job: missing.intersection(jobs_before(run, job)) for job in self.waiting}
        self._work = {job: max(1, count_work(run, job)) for job in self.waiting}
        self._path = self._longest_paths()
        self._end = self._find_end(run, jobs)

    @property
    def is_over(self) -> bool:
        """Whether all jobs are done."""
        return not self._work

    @property
    def running(self) -> tuple[Job, ...]:
        """The jobs that were started and have not ended."""
        return tuple(self._running)

    @property
    def width(self) -> int:
        """Most jobs that could run at the same time: those of different members or folds."""
        return len({(job.member, job.fold) for job in self._work})

    def start(self, may_start: Callable[[Job], bool] = lambda job: True) -> Job | None:
        """Take the first job whose predecessors are done; None if there is none.

        Args:
            may_start: whether a job may start now, for reasons of the executor.
        """
        for job in self.waiting:
            if not self._before[job] & self._work.keys() and may_start(job):
                self.take(job)
                return job
        return None

    def take(self, job: Job) -> None:
        """Take a waiting job whose predecessors are done."""
        self.waiting.remove(job)
        now = time.monotonic()
        self._running[job] = _Running(now, now + self._seconds(job, now))

    def deadline(self, job: Job) -> float:
        """The time.monotonic() value at which a running job must stop, or infinity."""
        return self._running[job].deadline

    def seconds(self, job: Job) -> float:
        """How many seconds a running job still has, for a process with a clock of its own."""
        return max(0.0, self.deadline(job) - time.monotonic())

    def finish(self, job: Job) -> None:
        """Note that a job is done."""
        self._running.pop(job, None)
        del self._work[job]

    def put_back(self, job: Job, *, lost: bool) -> int:
        """Let a job wait again, before all others.

        Args:
            job: a running job.
            lost: whether its process died, which is counted.

        Returns:
            How often its process has died.
        """
        del self._running[job]
        self.waiting.insert(0, job)
        self.losses[job] = self.losses.get(job, 0) + lost
        return self.losses[job]

    def give_up(self, job: Job) -> None:
        """Drop a running job whose network does not fit into memory.

        The waiting jobs of its member, and those that go on from these, are dropped, too.
        """
        del self._running[job]
        lost = {job}
        for other in self.waiting:
            before = self._before[other]
            if other.member == job.member or any(b.member == job.member for b in before):
                lost.add(other)
        self.waiting = [other for other in self.waiting if other not in lost]
        for other in lost:
            del self._work[other]

    def _longest_paths(self) -> Mapping[Job, int]:
        """The work of each job and of the longest chain of jobs that wait for it."""
        path: dict[Job, int] = {}
        for job in reversed(self.waiting):  # those that go on from a job come after it
            after = [path[other] for other in path if job in self._before[other]]
            path[job] = self._work[job] + max(after, default=0)
        return path

    def _find_end(self, run: Run, jobs: Sequence[Job]) -> float:
        """The time.monotonic() value at which all jobs must be over."""
        end = math.inf
        if run.recipe.budget_minutes:
            done = [run.folder.job_record(job) for job in jobs if run.folder.is_done(job)]
            spent = sum(record.seconds for record in done) / self.slots
            end = time.monotonic() + run.recipe.budget_minutes * 60 - spent
        return min(end, run.deadline)

    def _seconds(self, job: Job, now: float) -> float:
        """A job's part of the time that is left, by epochs times images.

        The jobs of other slots run beside it; those that go on from it have to wait.
        """
        if math.isinf(self._end):
            return math.inf
        left = float(self._work[job] + sum(self._work[other] for other in self.waiting))
        for other, (began, deadline) in self._running.items():
            length = max(deadline - began, 1e-9)
            left += self._work[other] * max(0.0, deadline - now) / length
        share = min(self.slots * self._work[job] / left, self._work[job] / self._path[job])
        return max(0.0, self._end - now) * share
