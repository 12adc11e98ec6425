"""Decode an image only if it is still the one that was verified."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from threefold.data.images import decode
from threefold.errors import DataError

DIGEST: Final = 16
"""Bytes of a SHA-256 that are kept of each image."""

LARGE_FILE: Final = 2**26
"""Bytes of a file from which on it is not held in memory beside its pixels."""


def decode_unchanged(source: Path | bytes, digest: bytes, where: object) -> NDArray[np.uint8]:
    """Decode an image as `images.decode` does, if it is still the one that was read before.

    A file is read once: what is hashed is what is decoded, even while another process writes to it.

    Args:
        source: a file, or its bytes.
        digest: the first `DIGEST` bytes of the SHA-256 of what was read before.
        where: names the image in errors.

    Raises:
        DataError: the image was changed, or can no longer be read.
    """
    try:
        content = _read(source) if isinstance(source, Path) else source
    except (OSError, ValueError) as error:
        raise DataError(
            "cannot read an image that could be read before",
            where=where,
            got=error,
            fix="restore it, and run the same command again",
        ) from None
    if isinstance(content, Path):
        with content.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").digest()[:DIGEST]
    else:
        found = hashlib.sha256(content).digest()[:DIGEST]
    if found != digest.ljust(DIGEST, b"\0"):  # numpy leaves out zeros at the end
        raise DataError(
            "an image was changed after it was read first",
            where=where,
            expected=f"SHA-256 {digest.hex()[:12]}",
            got=f"SHA-256 {found.hex()[:12]}",
            fix="restore it and run the same command again, or begin anew with the images as they "
            "are",
        )
    return decode(content)


def _read(path: Path) -> Path | bytes:
    """Return the content of a file, or the path of a large one."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    return path if status.st_size > LARGE_FILE else path.read_bytes()
