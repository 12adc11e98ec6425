"""Grey of more than 8 bits to 8 bits, by rules that no single pixel can tip.

White depends on the type of an image alone, so it is the same for every image of a folder and for
one that is predicted later:

- integers: 65535, unless a TIFF file declares fewer bits (12: 4095) by BitsPerSample, or by a
  MaxSampleValue of 2^b - 1;
- floating point: 1.

Values outside of black to white are clipped. Where more than one pixel in a hundred is clearly
outside, the image has another scale and is refused. A TIFF file whose PhotometricInterpretation is
WhiteIsZero is inverted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_MAX_SAMPLE_VALUE = 281

_MARGIN = 0.01
"""Distance from black or white, as a share of the range, that counts as clearly outside."""

_OUTSIDE = 0.01
"""Share of pixels clearly outside above which an image is refused."""


class GreyScale(NamedTuple):
    """What the numbers of a deep grey image mean."""

    white: float
    is_inverted: bool = False
    """Whether 0 is white."""


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey of more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def read_scale(image: Image.Image) -> GreyScale:
    """Return the scale of a deep grey image, from its type and the tags of a TIFF file."""
    tags: Any = getattr(image, "tag_v2", {})
    is_inverted = tags.get(_PHOTOMETRIC) == 0
    if image.mode.startswith("F"):
        return GreyScale(1.0, is_inverted)
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    bits = bits[0] if isinstance(bits, tuple) else bits
    declared = tags.get(_MAX_SAMPLE_VALUE, 0)
    declared = declared[0] if isinstance(declared, tuple) else declared
    if bits == 16 and declared in {2**b - 1 for b in range(9, 16)}:
        return GreyScale(declared, is_inverted)
    return GreyScale(2**bits - 1 if 8 < bits < 16 else 65535, is_inverted)


def to_eight_bits(image: Image.Image, scale: GreyScale) -> NDArray[np.uint8]:
    """Return grey (h, w) of a deep grey image.

    Raises:
        ValueError: a value is not a number, or the image has another scale.
    """
    values = np.asarray(image)
    shares = values / np.float64(scale.white)
    if not np.isfinite(shares).all():
        raise ValueError("a grey value is NaN or infinite")
    outside = (shares < -_MARGIN) | (shares > 1 + _MARGIN)
    if outside.mean() > _OUTSIDE:
        kind = "floating-point" if image.mode.startswith("F") else "integer"
        raise ValueError(
            f"{kind} grey from {values.min():g} to {values.max():g}, expected 0 to "
            f"{scale.white:g}; scale it to that range, or save it with 8 bits"
        )
    shares = np.clip(shares, 0, 1)
    grey = np.rint(255 * (1 - shares if scale.is_inverted else shares)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return grey
