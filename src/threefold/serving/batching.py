"""Batch the images of many requests.

The images that arrive while the model works form its next batch. No request waits for others to
arrive: an idle server answers one image at once. The graph takes images of one height and width, so
each image is resized to the size of the model's members, as the graph itself would. Where members
have several sizes only images of equal size share a batch. Each gets the same answer as alone. The
workers also decode, so that at most one batch per worker is in memory as pixels.

Tasks are other work with the model, in steps: a worker takes one only where no image is ready, and
only one of them runs at a time, so that a worker is always left to the images.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import numpy as np

from threefold.data.images import decode
from threefold.errors import ExportError, ThreefoldError
from threefold.names import count_of
from threefold.runtime.model import FULL, CascadePolicy
from threefold.runtime.model_output import ModelOutput

BATCH_PIXELS = 4_000_000
"""Largest number of pixels in a batch of several images. A larger image runs alone, and no two such
images run at the same time."""
INTERRUPT_SECONDS = 5
"""How long an interrupted model may take to stop; then its thread is left to the process's end."""
WORKERS = 2
"""Number of threads: one decodes while the model works for the other."""

T = TypeVar("T")

Inference = Callable[[np.ndarray, CascadePolicy], ModelOutput]
"""Runs the model: a batch uint8 (b, h, w, 3) and a policy to the output for b images."""


class _Job(NamedTuple):
    content: bytes
    size: tuple[int, int]
    policy: CascadePolicy
    future: Future[ModelOutput]

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def is_large(self) -> bool:
        return self.pixels > BATCH_PIXELS


class _Task(NamedTuple):
    work: Callable[[], Any]
    is_large: bool
    future: Future[Any]


class _DecodedJob(NamedTuple):
    job: _Job
    image: np.ndarray


class Batcher:
    """Answer images in threads, in the order of arrival; equal sizes and policies share a batch.

    Args:
        infer: runs the model; several threads may call it at the same time.
        batch: largest number of images in a batch.
        resize: resizes each image uint8 (h, w, 3), so that images of any sizes can share a batch;
            None = images of equal size share one.
        observe: called with the size of each batch.
        observe_waiting: called with the number of images that wait, whenever it changes.
    """

    def __init__(
        self,
        infer: Inference,
        batch: int = 8,
        resize: Callable[[np.ndarray], np.ndarray] | None = None,
        observe: Callable[[int], object] = lambda _: None,
        observe_waiting: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._infer, self._batch, self._resize = infer, batch, resize
        self._observe, self._observe_waiting = observe, observe_waiting
        self._jobs: list[_Job] = []
        self._tasks: list[_Task] = []
        self._changed = threading.Condition()
        self._large_running, self._task_running, self._closed = False, False, False
        self._threads = [
            threading.Thread(target=self._work, name=f"batch{i}", daemon=True)
            for i in range(WORKERS)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, images: Iterable[tuple[bytes, tuple[int, int]]], policy: CascadePolicy = FULL
    ) -> list[Future[ModelOutput]]:
        """Queue images, all at once: one by one, the first would get a batch of its own.

        Args:
            images: the bytes of each file, and width and height, from `images.measure`.
            policy: how many members answer.

        Returns:
            A future of the output for each image. It fails with DataError if the image cannot be
            decoded, and with ExportError if the model fails.

        Raises:
            RuntimeError: the batcher is closed.
        """
        jobs = [_Job(content, size, policy, Future()) for content, size in images]
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._jobs += jobs
            self._observe_waiting(len(self._jobs))
            self._changed.notify(len(jobs))
        return [job.future for job in jobs]

    def submit_task(self, work: Callable[[], T], is_large: bool = False) -> Future[T]:
        """Queue work that is done where no image is ready, one piece at a time.

        Args:
            work: called in a worker; no image is answered by it meanwhile, so it should be short.
            is_large: whether it handles an image of more than `BATCH_PIXELS`.

        Returns:
            A future of what the work returns or raises; cancelled if the batcher is closed first.

        Raises:
            RuntimeError: the batcher is closed.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._tasks.append(_Task(work, is_large, future))
            self._changed.notify()
        return future

    def submit_pixels(self, images: np.ndarray) -> Future[ModelOutput]:
        """Queue a batch uint8 (b, h, w, 3) as a task; the future fails as that of `submit`."""
        is_large = images.shape[1] * images.shape[2] > BATCH_PIXELS
        return self.submit_task(lambda: self._infer(images, FULL), is_large)

    def count_waiting(self) -> int:
        """Number of images that no worker has taken yet."""
        return len(self._jobs)

    def close(self, seconds: float = 60, interrupt: Callable[[], object] = lambda: None) -> None:
        """Answer the waiting images, drop the waiting tasks, then stop the threads.

        Args:
            seconds: how long to wait for the answers.
            interrupt: called after that, to stop the model; images without an answer are given up.
        """
        with self._changed:
            self._closed = True
            for task in self._tasks:
                task.future.cancel()
            self._tasks = []
            self._changed.notify_all()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            with self._changed:
                for job in self._jobs:
                    job.future.cancel()
                self._jobs = []
            interrupt()
            for thread in self._threads:
                thread.join(INTERRUPT_SECONDS)

    def _work(self) -> None:
        while True:
            jobs: list[_Job] = []
            task: _Task | None = None
            with self._changed:
                while not (jobs := self._take_batch()) and (task := self._take_task()) is None:
                    if self._closed and not self._jobs:
                        return
                    self._changed.wait()
            is_large = jobs[0].is_large if task is None else task.is_large
            try:
                if task is None:
                    self._answer(jobs)
                else:
                    _run_task(task)
            finally:
                with self._changed:
                    if is_large:
                        self._large_running = False
                    if task is not None:
                        self._task_running = False
                    self._changed.notify_all()
            del jobs, task  # frees the batch while the thread waits

    def _take_task(self) -> _Task | None:
        """Take the oldest task, unless one runs or must wait; the caller holds the lock."""
        self._tasks = [task for task in self._tasks if not task.future.cancelled()]
        if self._task_running or not self._tasks:
            return None
        if self._tasks[0].is_large and self._large_running:
            return None
        task = self._tasks.pop(0)
        self._task_running = True
        self._large_running |= task.is_large
        return task

    def _take_batch(self) -> list[_Job]:
        """Take the oldest job that may start and the jobs like it; the caller holds the lock."""
        num_before = len(self._jobs)
        self._jobs = [job for job in self._jobs if not job.future.cancelled()]
        if len(self._jobs) < num_before:
            self._observe_waiting(len(self._jobs))
        ready = (job for job in self._jobs if not (self._large_running and job.is_large))
        first = next(ready, None)
        if first is None:
            return []
        room = self._batch
        if self._resize is None:
            room = max(1, min(room, BATCH_PIXELS // max(first.pixels, 1)))
        batch: list[_Job] = []
        rest: list[_Job] = []
        for job in self._jobs:
            if len(batch) < room and job.policy == first.policy and self._are_alike(job, first):
                batch.append(job)
            else:
                rest.append(job)
        self._jobs = rest
        self._observe_waiting(len(rest))
        if first.is_large:
            self._large_running = True
        return batch

    def _are_alike(self, job: _Job, first: _Job) -> bool:
        """Whether a job can share the batch of the first one; a large image can share none."""
        if self._resize is None:
            return job.size == first.size
        return job is first or not (job.is_large or first.is_large)

    def _answer(self, jobs: list[_Job]) -> None:
        """Decode and run jobs; every future gets a result or an exception, whatever happens."""
        # EXIF may have turned some images, and some are too long to be resized.
        groups: dict[tuple[int, ...], list[_DecodedJob]] = {}
        for job in jobs:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                image = decode(job.content)
                if self._resize is not None:
                    image = self._resize(image)
            except BaseException as error:
                job.future.set_exception(error)
                continue
            groups.setdefault(image.shape, []).append(_DecodedJob(job, image))
        for group in groups.values():
            self._run_group(group)

    def _run_group(self, group: list[_DecodedJob]) -> None:
        """Run images of one shape and policy."""
        try:
            # A single image is not copied: it may be large.
            if len(group) == 1:
                images = group[0].image[None]
            else:
                images = np.stack([decoded.image for decoded in group])
            output = self._infer(images, group[0].job.policy)
            if len(output.probs) != len(group):
                raise ExportError(
                    "the model cannot answer",
                    expected=f"answers for {count_of(len(group), 'image')}",
                    got=f"answers for {len(output.probs)}",
                )
        except BaseException as error:
            if len(group) > 1 and isinstance(error, ThreefoldError):
                # A batch may need more memory than there is where each image alone does not.
                for decoded in group:
                    self._run_group([decoded])
                return
            for decoded in group:
                decoded.job.future.set_exception(error)
            return
        self._observe(len(group))
        for i, decoded in enumerate(group):
            decoded.job.future.set_result(output.row(i))


def _run_task(task: _Task) -> None:
    """Do the work of a task; its future gets the result or the exception, whatever happens."""
    if not task.future.set_running_or_notify_cancel():
        return
    try:
        result = task.work()
    except BaseException as error:
        task.future.set_exception(error)
        return
    task.future.set_result(result)
