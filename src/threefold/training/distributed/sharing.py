"""How the images of a batch, and the rows of an array, are divided among ranks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Share(NamedTuple):
    """A rank's part of a micro-batch."""

    positions: np.ndarray
    """(b,) ascending positions of its images."""
    images: int
    """Images of the whole micro-batch."""
    idle: bool = False
    """Whether these are the images of another rank, repeated so that this one has some: they must
    not count."""


def share_batch(images: int, rank: int, world_size: int) -> Share:
    """Return a rank's part of a micro-batch.

    Mixup and cutmix mix image i with image n - 1 - i. Both are on one rank, so that a rank mixes
    what it has with the same result as one process. Every rank has two images or more, as batch
    norm needs; the last image of an odd batch is a third. Where there are fewer pairs than ranks,
    the others repeat the first pair and are idle.

    Args:
        images: of the micro-batch, at least 2.
        rank: number of the rank.
        world_size: number of ranks.
    """
    pairs = images // 2
    last = 2 * pairs - 1
    own = np.array_split(np.arange(pairs), world_size)[rank]
    idle = not len(own)
    if idle:
        own = np.zeros(1, np.int64)
    positions = np.concatenate([own, last - own[::-1]])
    if images % 2 and rank == min(world_size, pairs) - 1:
        positions = np.append(positions, images - 1)
    return Share(positions, images, idle)


def share_rows(rows: int, rank: int, world_size: int) -> slice:
    """Return a rank's part of some rows in order: as many as the others have, or one fewer."""
    size, more = divmod(rows, world_size)
    begin = rank * size + min(rank, more)
    return slice(begin, begin + size + (rank < more))
