"""Answer many images in order: threads decode ahead of the model, which answers batches.

Memory is bounded: so many images are decoded ahead as fit into `AHEAD_PIXELS`. If the members have
a common canvas, each image is resized to it, exactly as the graph would, and any images share a
batch. If not, those of one size do, and the others go alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, NamedTuple

import numpy as np

from threefold.data.image_rows import ImageRow
from threefold.data.images import decode
from threefold.errors import DataError, ThreefoldError
from threefold.machine import decoding_threads, usable_cores
from threefold.runtime.model import CascadePolicy, Model
from threefold.runtime.model_output import ModelOutput

AHEAD_PIXELS: Final = 64_000_000
"""Pixels that are decoded and not answered yet; three bytes each."""
BATCH_PIXELS: Final = 4_000_000
"""Pixels of a batch of several images that have no common canvas."""
FEW_CORES: Final = 4
"""Cores up to which a model on the CPU and the threads that decode take turns. Side by side they
slow each other down: on two cores by a quarter to a half, and the more so if onnxruntime's threads
wait for work in a loop (`bench/predict_folder.py`)."""
ROUND: Final = 64
"""Images that are decoded before it is the model's turn, or two batches if these are more."""
MAX_BATCH: Final = 1024
CPU_SIZES: Final = (1, 4, 16, 64)
DEVICE_SIZES: Final = (16, 64, 256)
"""Sizes that `auto` tries; a single image leaves most of a device idle."""
TRIALS: Final = 2
"""Full batches of each size that are timed; the fastest counts, since a first one warms up."""
GAIN: Final = 1.05
"""A larger batch must be so much faster to be taken, and for the next one to be tried."""


class Answer(NamedTuple):
    """An image with its answer, or with the reason why there is none."""

    path: str
    output: ModelOutput | None
    """n = 1."""
    error: DataError | None = None


class BatchSize:
    """How many images are answered at a time: a number, or the fastest of a few that are tried.

    Args:
        fixed: the number; 0 = try `sizes` on the first images, from the smallest on.
        sizes: in ascending order.
    """

    def __init__(self, fixed: int = 0, sizes: tuple[int, ...] = CPU_SIZES) -> None:
        self.size = fixed or sizes[0]
        self._untried = [] if fixed else list(sizes[1:])
        self._is_trying = not fixed
        self._seconds: list[float] = []  # per image, of the size that is tried
        self._best = (self.size, float("inf"))

    def observe(self, images: int, seconds: float) -> None:
        """Take note of how long a batch took."""
        if not self._is_trying or images != self.size:
            return
        self._seconds.append(seconds / images)
        if len(self._seconds) < TRIALS:
            return
        fastest, self._seconds = min(self._seconds), []
        is_faster = fastest * GAIN < self._best[1]
        if is_faster:
            self._best = (self.size, fastest)
        if is_faster and self._untried:
            self.size = self._untried.pop(0)
        else:
            self.size, self._is_trying = self._best[0], False

    def limit(self, images: int) -> None:
        """Never make a batch of more images again: one was too much."""
        if self.size > images:
            self.size, self._is_trying = images, False


def answer_images(
    model: Model,
    paths: Iterable[str | ImageRow | DataError],
    batch: BatchSize,
    start: Callable[[np.ndarray], CascadePolicy],
    threads: int = 0,
) -> Iterator[Answer]:
    """Answer images in order; what cannot be read is in its place in the order.

    Args:
        model: the exported file.
        paths: of image files; an error takes the place of a path that could not be found.
        batch: how many images the model answers at a time.
        start: called once, with the first images, uint8 (b, h, w, 3), before the model answers
            them; says how many members answer.
        threads: that decode; 0 = one per core; -1 = none, an image is read when its turn has come.

    Raises:
        ExportError: the model fails on a single image.
    """
    policy: CascadePolicy | None = None
    window: list[_Read] = []
    reads = _read_ahead(model, paths, batch, threads)
    for read in reads:
        window.append(read)
        if not _is_full(window, batch.size, model.canvas is not None):
            continue
        policy = policy or _start(window, start)
        yield from _answer_window(model, window, batch, policy)
        window = []
    policy = policy or _start(window, start)
    yield from _answer_window(model, window, batch, policy)


class _Read(NamedTuple):
    path: str
    pixels: np.ndarray | None
    error: DataError | None = None


def _read_ahead(
    model: Model, paths: Iterable[str | ImageRow | DataError], batch: BatchSize, threads: int
) -> Iterator[_Read]:
    """Decode images in threads and yield them in order."""

    def read(path: str | ImageRow | DataError) -> _Read:
        if isinstance(path, DataError):
            return _Read("", None, path)
        name = path.name if isinstance(path, ImageRow) else path
        try:
            pixels = _decode(path)
            return _Read(name, model.fit_canvas(pixels))
        except DataError as error:
            return _Read(name, None, error)

    if threads < 0:
        yield from map(read, paths)
        return
    threads = threads or decoding_threads()
    takes_turns = model.device == "cpu" and usable_cores() <= FEW_CORES
    remaining = iter(paths)
    queue: deque[Future[_Read]] = deque()
    largest, is_exhausted = AHEAD_PIXELS, False  # of recent images: those to come are alike
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        while True:
            if not (queue and takes_turns):
                wanted = max(2 * batch.size + threads, ROUND if takes_turns else 0)
                room = min(wanted, max(threads, AHEAD_PIXELS // largest))
                while len(queue) < room and not is_exhausted:
                    path = next(remaining, None)
                    if path is None:
                        is_exhausted = True
                    else:
                        queue.append(pool.submit(read, path))
                if takes_turns:
                    wait(queue)
            if not queue:
                return
            done = queue.popleft().result()
            if done.pixels is not None:
                is_first = largest == AHEAD_PIXELS
                largest = max(done.pixels.size // 3, 1 if is_first else largest * 9 // 10)
            yield done
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _decode(path: str | ImageRow) -> np.ndarray:
    """Return the pixels of a file or of a row, whose errors name it."""
    if isinstance(path, str):
        return decode(path)
    try:
        return decode(path.read())
    except DataError as error:
        raise DataError(error.what, where=path.name, got=error.got, fix=error.fix) from None


def _is_full(window: list[_Read], size: int, is_on_canvas: bool) -> bool:
    if len(window) >= size:  # what cannot be read counts, so that it is not held back for long
        return True
    pixels = sum(read.pixels.size // 3 for read in window if read.pixels is not None)
    return not is_on_canvas and pixels >= BATCH_PIXELS


def _start(
    window: list[_Read], start: Callable[[np.ndarray], CascadePolicy]
) -> CascadePolicy | None:
    groups = _group(window)
    return start(_stack(window, groups[0])) if groups else None


def _group(window: list[_Read]) -> list[list[int]]:
    """Return the positions of readable images, those of one size together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, read in enumerate(window):
        if read.pixels is not None:
            groups.setdefault(read.pixels.shape, []).append(i)
    return [*groups.values()]


def _stack(window: list[_Read], group: list[int]) -> np.ndarray:
    return np.stack([pixels for i in group if (pixels := window[i].pixels) is not None])


def _answer_window(
    model: Model, window: list[_Read], batch: BatchSize, policy: CascadePolicy | None
) -> Iterator[Answer]:
    outputs: dict[int, ModelOutput] = {}
    for group in _group(window):
        assert policy is not None
        images = _stack(window, group)
        begin = time.perf_counter()
        rows = _run(model, images, batch, policy)
        batch.observe(len(group), time.perf_counter() - begin)
        outputs |= dict(zip(group, rows, strict=True))
    for i, read in enumerate(window):
        yield Answer(read.path, outputs.get(i), read.error)


def _run(
    model: Model, images: np.ndarray, batch: BatchSize, policy: CascadePolicy
) -> list[ModelOutput]:
    """Run a batch; one that fails, such as for lack of memory, is answered in halves."""
    try:
        output = model.run(images, policy)
    except ThreefoldError:
        if len(images) == 1:
            raise
        half = len(images) // 2
        batch.limit(half)
        first = _run(model, images[:half], batch, policy)
        return first + _run(model, images[half:], batch, policy)
    return [output.row(i) for i in range(len(images))]
