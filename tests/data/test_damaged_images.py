"""Damaged image files: pixels or one error, whatever is damaged, and the same from `check`."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from threefold.data.images import check, decode
from threefold.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
DEEP_GREY = np.array([[0, 128, 129, 257], [25700, 32768, 65278, 65535]], dtype=np.uint16)


def encode(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, format, **options)
    return stream.getvalue()


DAMAGED_BASES = [encode(PIXELS, name) for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF")] + [
    encode(DEEP_GREY, "PNG")
]
JPEGS = [
    encode(Image.fromarray(shades).resize((420, 310)), "JPEG", **options)
    for shades in (PIXELS, PIXELS[..., 0])
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 2})
]


@settings(deadline=None)
@given(st.data())
def test_any_damage_gives_pixels_or_a_data_error(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(DAMAGED_BASES)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))

    with contextlib.suppress(DataError):
        assert decode(bytes(content)).shape[2] == 3


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_check_refuses_what_decode_refuses(data: st.DataObject) -> None:
    """A JPEG image is checked at an eighth of its size, where all of its bytes are read, too."""
    content = bytearray(data.draw(st.sampled_from(JPEGS)))
    del content[data.draw(st.integers(4, 4 * len(content))) :]
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))

    found = check("x.jpg", bytes(content))

    if found is None or found.readable:
        assert decode(bytes(content)).shape[2] == 3
    else:
        with pytest.raises(DataError, match="cannot read the image") as raised:
            decode(bytes(content))
        assert found.reason in str(raised.value)
