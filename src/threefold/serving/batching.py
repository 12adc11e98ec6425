"""Batch the images of many requests.

The images that arrive while the model works form its next batch. No request waits for others to
arrive: an idle server answers one image at once. The graph takes images of one height and width, so
only images of equal size share a batch, and each gets the same answer as alone. The workers also
decode, so that at most one batch per worker is in memory as pixels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from threefold.data.images import decode
from threefold.errors import ExportError, ThreefoldError
from threefold.runtime.model import FULL, CascadePolicy, ModelOutput

BATCH_PIXELS = 4_000_000
"""Largest number of pixels in a batch of several images. A larger image runs alone, and no two such
images run at the same time."""
INTERRUPT_SECONDS = 5
"""How long an interrupted model may take to stop; then its thread is left to the process's end."""
WORKERS = 2
"""Number of threads: one decodes while the model works for the other."""

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


class _DecodedJob(NamedTuple):
    job: _Job
    image: np.ndarray


class Batcher:
    """Answer images in threads, in the order of arrival; equal sizes and policies share a batch.

    Args:
        infer: runs the model; several threads may call it at the same time.
        batch: largest number of images in a batch.
        observe: called with the size of each batch.
    """

    def __init__(
        self, infer: Inference, batch: int = 8, observe: Callable[[int], object] = lambda _: None
    ) -> None:
        self._infer, self._batch, self._observe = infer, batch, observe
        self._jobs: list[_Job] = []
        self._changed = threading.Condition()
        self._large_running, self._closed = False, False
        self._threads = [
            threading.Thread(target=self._work, name=f"batch{i}", daemon=True)
            for i in range(WORKERS)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, content: bytes, size: tuple[int, int], policy: CascadePolicy = FULL
    ) -> Future[ModelOutput]:
        """Queue an image.

        Args:
            content: the bytes of the file.
            size: width and height, from `images.measure`.
            policy: how many members answer.

        Returns:
            A future of the output for the image. It fails with DataError if the image cannot be
            decoded, and with ExportError if the model fails.

        Raises:
            RuntimeError: the batcher is closed.
        """
        future: Future[ModelOutput] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._jobs.append(_Job(content, size, policy, future))
            self._changed.notify()
        return future

    def count_waiting(self) -> int:
        """Number of images that no worker has taken yet."""
        return len(self._jobs)

    def close(self, seconds: float = 60, interrupt: Callable[[], object] = lambda: None) -> None:
        """Answer the waiting images, then stop the threads.

        Args:
            seconds: how long to wait for the answers.
            interrupt: called after that, to stop the model; images without an answer are given up.
        """
        with self._changed:
            self._closed = True
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
            with self._changed:
                jobs = self._take_batch()
                while not jobs:
                    if self._closed and not self._jobs:
                        return
                    self._changed.wait()
                    jobs = self._take_batch()
            is_large = jobs[0].is_large
            try:
                self._answer(jobs)
            finally:
                with self._changed:
                    if is_large:
                        self._large_running = False
                    self._changed.notify_all()
            del jobs  # frees the batch while the thread waits

    def _take_batch(self) -> list[_Job]:
        """Take the oldest job that may start and the jobs like it; the caller holds the lock."""
        self._jobs = [job for job in self._jobs if not job.future.cancelled()]
        ready = (job for job in self._jobs if not (self._large_running and job.is_large))
        first = next(ready, None)
        if first is None:
            return []
        room = max(1, min(self._batch, BATCH_PIXELS // max(first.pixels, 1)))
        batch: list[_Job] = []
        rest: list[_Job] = []
        for job in self._jobs:
            is_alike = job.size == first.size and job.policy == first.policy
            if is_alike and len(batch) < room:
                batch.append(job)
            else:
                rest.append(job)
        self._jobs = rest
        if first.is_large:
            self._large_running = True
        return batch

    def _answer(self, jobs: list[_Job]) -> None:
        """Decode and run jobs; every future gets a result or an exception, whatever happens."""
        groups: dict[tuple[int, ...], list[_DecodedJob]] = {}  # EXIF may have turned some images
        for job in jobs:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                image = decode(job.content)
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
                    expected=f"answers for {len(group)} images",
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
