"""Which test images a classifier answers correctly, as text in a line of JSON."""

from __future__ import annotations

import numpy as np


def pack_hits(correct: np.ndarray) -> str:
    """Pack booleans (n,) as hexadecimal."""
    return np.packbits(correct).tobytes().hex()


def unpack_hits(hits: str, images: int) -> np.ndarray:
    """Return the booleans (images,) that `pack_hits` has packed."""
    packed = np.frombuffer(bytes.fromhex(hits), np.uint8)
    return np.unpackbits(packed, count=images).astype(bool)
