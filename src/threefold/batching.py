"""Images of many requests, answered together: what waits while the model works is its next batch.

No request waits for others to come: an idle server answers one image at once, a busy one answers as many as have come
meanwhile. The graph takes images of one height and width, so only those share a batch, and each gets the same answer as
alone. Decoding happens here too, so that at most one batch per worker is in memory as pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from threefold.errors import ThreefoldError
from threefold.images import decode
from threefold.runtime import FULL, CascadePolicy, ModelOutput

BATCH_PIXELS = 4_000_000
"""Pixels of a batch of several images; a larger image goes alone, and no two of those at a time."""
WORKERS = 2
"""Threads: one decodes while the model works for the other."""

Run = Callable[[np.ndarray, CascadePolicy], ModelOutput]
"""The model: a batch uint8 (b, h, w, 3) and a policy to the output for b images."""


class _Job(NamedTuple):
    content: bytes
    size: tuple[int, int]
    policy: CascadePolicy
    answer: Future[ModelOutput]

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]


class Batcher:
    """Answers images in threads of its own, in the order in which they come, those of one size and policy together.

    Args:
        run: the model; may be called by several threads.
        batch: images at once.
        watch: told how many images each batch has.
    """

    def __init__(
        self, run: Run, batch: int = 8, watch: Callable[[int], object] = lambda _: None
    ) -> None:
        self._run, self._batch, self._watch = run, batch, watch
        self._jobs: list[_Job] = []
        self._news = threading.Condition()
        self._large, self._open = False, True
        self._threads = [
            threading.Thread(target=self._work, name=f"batch{i}", daemon=True)
            for i in range(WORKERS)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, content: bytes, size: tuple[int, int], policy: CascadePolicy = FULL
    ) -> Future[ModelOutput]:
        """Ask for the answer of an image file of that width and height, as `images.measure` finds them.

        The future fails with DataError where the image cannot be decoded, with ExportError where the model fails.

        Raises:
            RuntimeError: the batcher is closed.
        """
        answer: Future[ModelOutput] = Future()
        with self._news:
            if not self._open:
                raise RuntimeError("closed")
            self._jobs.append(_Job(content, size, policy, answer))
            self._news.notify()
        return answer

    def waiting(self) -> int:
        """Images that no worker has taken yet."""
        return len(self._jobs)

    def close(self) -> None:
        """Answer what waits, then stop."""
        with self._news:
            self._open = False
            self._news.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._news:
                while not (jobs := self._take()):
                    if not self._open and not self._jobs:
                        return
                    self._news.wait()
            large = jobs[0].pixels > BATCH_PIXELS
            try:
                self._answer(jobs)
            finally:
                with self._news:
                    self._large &= not large
                    self._news.notify_all()
            del jobs  # nothing of the last batch is kept while the thread waits

    def _take(self) -> list[_Job]:
        """The next batch: the oldest job that may start and those of its size; called with the lock held."""
        self._jobs = [job for job in self._jobs if not job.answer.cancelled()]
        first = next(
            (job for job in self._jobs if not (self._large and job.pixels > BATCH_PIXELS)), None
        )
        if first is None:
            return []
        most = max(1, min(self._batch, BATCH_PIXELS // max(first.pixels, 1)))
        alike = [job for job in self._jobs if (job.size, job.policy) == (first.size, first.policy)][
            :most
        ]
        taken = {id(job) for job in alike}
        self._jobs = [job for job in self._jobs if id(job) not in taken]
        self._large |= first.pixels > BATCH_PIXELS
        return alike

    def _answer(self, jobs: list[_Job]) -> None:
        """Decode, run, hand out; whatever happens, every job gets an answer or an error."""
        groups: dict[tuple[int, ...], list[tuple[_Job, np.ndarray]]] = {}
        for job in jobs:
            if not job.answer.set_running_or_notify_cancel():
                continue
            try:
                pixels = decode(job.content)
            except BaseException as error:
                job.answer.set_exception(error)
                continue
            groups.setdefault(pixels.shape, []).append((job, pixels))  # EXIF may have turned some
        for group in groups.values():
            self._infer(group)

    def _infer(self, group: list[tuple[_Job, np.ndarray]]) -> None:
        try:
            images = [pixels for _, pixels in group]
            batch = images[0][None] if len(images) == 1 else np.stack(images)
            output = self._run(batch, group[0][0].policy)
        except BaseException as error:
            if len(group) > 1 and isinstance(error, ThreefoldError):
                for one in group:  # a batch may ask for more memory than its images do one by one
                    self._infer([one])
                return
            for job, _ in group:
                job.answer.set_exception(error)
            return
        self._watch(len(group))
        for i, (job, _) in enumerate(group):
            job.answer.set_result(output.row(i))
