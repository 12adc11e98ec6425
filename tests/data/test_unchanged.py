"""An image is decoded only if it is the one that was verified."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threefold.data.unchanged import DIGEST, decode_unchanged
from threefold.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def test_a_change_after_the_first_reading_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(PIXELS).save(path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).digest()[:DIGEST]

    assert np.array_equal(decode_unchanged(path, digest, "it"), PIXELS)
    assert np.array_equal(decode_unchanged(content, digest, "it"), PIXELS)
    Image.fromarray(PIXELS[::-1]).save(path)
    with pytest.raises(DataError, match=r"changed after it was read first: it; .*fix: restore it"):
        decode_unchanged(path, digest, "it")
    path.unlink()
    with pytest.raises(DataError, match=r"could be read before: it; got No such file"):
        decode_unchanged(path, digest, "it")


def test_a_digest_that_ends_in_zeros_is_whole(tmp_path: Path) -> None:
    """numpy leaves the last zeros of a text of bytes out."""
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    number = next(n for n in range(9999) if _digest(content, n).endswith(b"\0"))
    stored = np.array([_digest(content, number)], f"S{DIGEST}")[0]

    assert len(stored) < DIGEST
    pixels = decode_unchanged(content + number.to_bytes(2, "big"), bytes(stored), "it")
    assert np.array_equal(pixels, PIXELS)


def _digest(content: bytes, number: int) -> bytes:
    """Of a PNG with two bytes after its end."""
    return hashlib.sha256(content + number.to_bytes(2, "big")).digest()[:DIGEST]
