"""Images that are equal byte for byte, found by the SHA-256 of their files."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from threefold.errors import DataError


def same_content(paths: Sequence[Path], contents: Sequence[bytes] | None = None) -> list[list[int]]:
    """Return the positions of files that are equal byte for byte, one list per repeated content.

    Only files of equal size are read. `contents` has the bytes if they are not in files.

    Raises:
        DataError: a file cannot be read.
    """
    if contents is not None:
        return _positions([hashlib.sha256(content).digest() for content in contents])
    try:
        sizes = _positions([path.stat().st_size for path in paths])
        rows = sorted(row for positions in sizes for row in positions)
        digests = [_digest(paths[row]) for row in rows]
    except OSError as error:
        raise DataError("cannot read the file", where=error.filename, got=error) from None
    return [[rows[i] for i in positions] for positions in _positions(digests)]


def same_digests(digests: NDArray[np.bytes_]) -> list[list[int]]:
    """Return the positions of equal digests (n,), one list for each that repeats; empty = unknown.

    As `same_content`, of images that were read before.
    """
    order = np.argsort(digests, kind="stable")
    order = order[digests[order] != b""]
    if not len(order):
        return []
    is_first = np.append(True, digests[order[1:]] != digests[order[:-1]])
    begins = np.append(np.flatnonzero(is_first), len(order))
    repeated = np.flatnonzero(np.diff(begins) > 1)
    return sorted(order[begins[i] : begins[i + 1]].tolist() for i in repeated)


def content_hash(source: Path | bytes) -> str:
    """Return the SHA-256 of an image file's bytes, in hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    try:
        return _digest(source).hex()
    except OSError as error:
        raise DataError("cannot read the file", where=source, got=error) from None


def _positions(keys: Sequence[object]) -> list[list[int]]:
    """Return the positions of every key that occurs more than once."""
    where: dict[object, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        where[key].append(position)
    return [positions for positions in where.values() if len(positions) > 1]


def _digest(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
