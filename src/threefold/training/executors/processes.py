"""The executor of several devices: a worker process for each, and this process, which hands out.

This process computes no job. It decodes the images and computes the features that are needed once,
starts the workers, gives each the next job that can start, and passes their reports on. A worker
that dies is replaced, and its job is done again by the next one, from the state that it saved last.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from threefold.data.dataset import Sources
from threefold.data.sources.folder import EncodedImages
from threefold.errors import RecipeError, RunError, ThreefoldError, error_from
from threefold.machine import end_process
from threefold.recipe.recipe import Job
from threefold.training.executors.devices import Device, share_out
from threefold.training.executors.order import Schedule
from threefold.training.executors.relay import tell
from threefold.training.executors.worker import CLAIMS_FOLDER, WorkOrder
from threefold.training.executors.worker_process import GRACE
from threefold.training.left_out import JobMemoryError, shortage_of
from threefold.training.pixel_cache import PixelCache, select_rows
from threefold.training.progress.terminal_curves import label_of
from threefold.training.pseudo_labels import Caches
from threefold.training.run import Run

ATTEMPTS: Final = 3
"""How often the worker of a job may die before the run ends; and how often one may not start."""

REST: Final = 2.0
"""Seconds that a worker waits after it was given a job that another process has claimed."""

LOOK: Final = 0.25
"""Most seconds until this process sees that it is to stop."""


class ProcessExecutor:
    """Does the jobs of a run in several processes of this machine.

    Args:
        count: of processes.
        device: the recipe's `train.device`.

    Raises:
        RecipeError: the system is not POSIX.
    """

    computes_features = False

    def __init__(self, count: int, device: str) -> None:
        if os.name != "posix":
            raise RecipeError(
                "several devices need Linux or macOS",
                where="train.devices",
                got=sys.platform,
                fix="set train.devices = 1",
            )
        self.count, self.device = count, device

    def run(self, run: Run, jobs: Sequence[Job], caches: Caches) -> None:
        """See `base.Executor`."""
        schedule = Schedule(run, jobs, self.count)
        missing = set(schedule.waiting)
        for job in jobs:
            if job not in missing:
                run.watcher.job(job, skipped=True)
        if schedule.is_over:
            shutil.rmtree(run.dir / CLAIMS_FOLDER, ignore_errors=True)  # of an attempt before
            return
        prepare_pixels(run, caches.pixels, schedule.waiting)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # a worker may use the same GPU
        devices = share_out(self.count, self.device)[: schedule.width]
        with run.watcher.deferring_stop():
            crew = _Crew(run, schedule, devices)
            try:
                crew.work()
                crew.stop()
            except BaseException:
                if run.watcher.stop is None:  # else they have had their time
                    crew.stop()
                raise
            finally:
                crew.kill()
        shutil.rmtree(run.dir / CLAIMS_FOLDER, ignore_errors=True)


def prepare_pixels(run: Run, cache: PixelCache, jobs: Sequence[Job]) -> None:
    """Decode the images of stages that train on pixels, with all cores, once."""
    nothing = np.arange(0)
    for job in jobs:
        spec, stage = run.recipe.member(job.member), run.recipe.stage(job.stage)
        if stage.reads_images:
            cache.rows("train", spec, nothing, side=stage.img_size)
            split, _ = select_rows(run.sources, run.roles[job.fold])
            cache.rows(split, spec, nothing)


class _Member:
    """A worker process, as its parent sees it."""

    def __init__(self, number: int, device: Device, log: Path, order: bytes) -> None:
        self.number, self.device, self.log = number, device, log
        self.job: Job | None = None
        self.is_ready = False
        self.rests_until = 0.0
        self.connection, far_end = Pipe()
        descriptor = str(far_end.fileno())
        words = ["-m", "threefold.training.executors.worker_process", descriptor]
        variables = {"OMP_NUM_THREADS": str(device.threads), **device.variables}
        with far_end, open(log, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words, str(device.threads), *map(str, device.cores)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                pass_fds=[far_end.fileno()],
                env={**os.environ, **variables},
            )
        self.send(order)

    def send(self, message: bytes | memoryview) -> None:
        """Send a message, if the process is alive; that it is not will be seen elsewhere."""
        with suppress(OSError):
            self.connection.send_bytes(message)

    def end(self) -> str:
        """Wait for a process that has closed its connection; returns how it ended, in words."""
        self.connection.close()
        return end_process(self.process, GRACE)

    def last_words(self) -> str:
        """The last line that it printed."""
        with suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((line for line in reversed(lines) if line.strip()), "")
        return ""


class _Crew:
    """The workers of a run."""

    def __init__(self, run: Run, schedule: Schedule, devices: Sequence[Device]) -> None:
        self.run, self.schedule = run, schedule
        self.folder = run.dir / CLAIMS_FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.order = _pack(WorkOrder.of(run), run.all_sources)
        self.failures = 0
        self.shortage: JobMemoryError | None = None
        self.members: list[_Member] = []
        for number, device in enumerate(devices):
            self._hire(number, device)

    def work(self) -> None:
        """Hand out jobs until all are done, or the watcher wants to stop.

        Raises:
            JobMemoryError: a job does not fit into memory; all that do not need it are done.
            ThreefoldError: a job cannot be done.
        """
        while not self.schedule.is_over and self.run.watcher.stop is None:
            self._hand_out()
            for connection in wait([member.connection for member in self.members], LOOK):
                self._receive(next(m for m in self.members if m.connection is connection))
        if self.shortage is not None and self.run.watcher.stop is None:
            raise self.shortage

    def stop(self) -> None:
        """Let the workers save the state of their jobs and end."""
        for member in self.members:
            member.send(ForkingPickler.dumps(None))
        deadline = time.monotonic() + GRACE
        open_ones: list[Any] = [member.connection for member in self.members]
        while open_ones and time.monotonic() < deadline:
            for connection in wait(open_ones, LOOK):
                assert isinstance(connection, Connection)
                try:
                    connection.recv()  # what it reports does not matter any more
                except (EOFError, OSError):
                    open_ones.remove(connection)

    def kill(self) -> None:
        """End the workers that are left, at once."""
        for member in self.members:
            member.process.kill()
        for member in self.members:
            member.process.wait()
            member.connection.close()

    def _hire(self, number: int, device: Device) -> None:
        log = self.folder / f"worker{number}.log"
        self.members.append(_Member(number, device, log, self.order))

    def _hand_out(self) -> None:
        now = time.monotonic()
        for member in self.members:
            if member.is_ready and member.job is None and member.rests_until <= now:
                member.job = job = self.schedule.start()
                if job is None:
                    return
                self.run.watcher.job(job, skipped=False)
                member.send(ForkingPickler.dumps((job, self.schedule.seconds(job))))

    def _receive(self, member: _Member) -> None:
        """Take a message of a worker, or notice its death."""
        try:
            kind, *values = member.connection.recv()
        except (EOFError, OSError):
            self._replace(member)
            return
        if kind == "ready":
            member.is_ready = True
        elif kind == "error":
            self._fail(member, _rebuild(member, values))
        elif member.job is not None and kind == "report":
            tell(self.run.watcher, member.job, values[0])
        elif member.job is not None and kind == "over":
            job, member.job = member.job, None
            if values[0] == "done":
                self.schedule.finish(job)
            else:
                self.schedule.put_back(job, lost=False)
                member.rests_until = time.monotonic() + REST
            self.run.watcher.ended(job, values[0] == "done")

    def _fail(self, member: _Member, error: ThreefoldError) -> None:
        """Raise the error of a worker; a job that does not fit into memory is given up instead."""
        shortage = None if member.job is None else shortage_of(member.job, error)
        if member.job is None or shortage is None:
            raise error
        self.shortage = self.shortage or shortage
        job, member.job = member.job, None
        self.schedule.give_up(job)
        self.run.watcher.ended(job, done=False)

    def _replace(self, member: _Member) -> None:
        """Start another worker in the place of one that has died, and give its job back."""
        how = member.end()
        self.members.remove(member)
        if member.job is not None:
            losses = self.schedule.put_back(member.job, lost=True)
            self.run.watcher.ended(member.job, done=False)
            name = label_of(member.job)
            if losses >= ATTEMPTS:
                raise RunError(
                    f"the worker of a job died {losses} times",
                    where=name,
                    got=f"it {how}",
                    fix="run the same command again, with fewer devices if memory was short; "
                    "finished work is kept",
                )
            self.run.watcher.note(f"the worker of {name} {how}; another one does the job")
        elif not member.is_ready:
            self.failures += 1
            if self.failures >= ATTEMPTS:
                raise RunError(
                    "a worker does not start",
                    where=member.log,
                    got=f"it {how}: {member.last_words()}",
                    fix="set train.devices = 1",
                )
        self._hire(member.number, member.device)


def _pack(order: WorkOrder, sources: Sources) -> bytes:
    """Write what a worker receives first; images inside a table are read by each worker itself."""
    parts = (sources.train, sources.test, sources.unlabelled)
    inside = any(part is not None and isinstance(part.images, EncodedImages) for part in parts)
    return bytes(ForkingPickler.dumps((order, None if inside else sources)))


def _rebuild(member: _Member, texts: Sequence[str]) -> ThreefoldError:
    """The error of a worker, as this process raises it."""
    error = error_from(texts)
    job = f" ({label_of(member.job)})" if member.job is not None else ""
    return error.at(f"{error.where or member.log}{job}")
