"""Find images that stand out from their data set: blurred, dark, bright, empty, oddly sized.

Nothing is edited, removed or moved. Each image is measured once, on a small grey version, so that
the numbers of large photographs and of thumbnails can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from threefold.errors import DataError

Fault = Literal["one colour", "dark", "bright", "blurred", "size", "shape"]
"""What can be wrong with an image; `FAULTS` has the meanings."""

FAULTS: Final[dict[Fault, str]] = {
    "one colour": "nearly one colour",
    "dark": "dark even in the brightest parts",
    "bright": "bright even in the darkest parts",
    "blurred": "blurred",
    "size": "much smaller or larger than the others",
    "shape": "much longer or wider than the others",
}

OUTLIER: Final = 3.5
"""Robust standard deviations from the median at which an image stands out (Iglewicz and Hoaglin,
How to Detect and Handle Outliers, 1993)."""

FEWEST: Final = 20
"""Number of images below which none can stand out from the others."""

_SIDE: Final = 256
"""Longest side on which an image is measured, pixels; larger ones are shrunk to it."""

_TAIL: Final = 2
"""Percentage of the pixels that may be brighter than a dark image, or darker than a bright one."""

_MAX_SPREAD: Final = 8.0
"""Largest standard deviation (of 0 to 255) in each channel of an image of nearly one colour."""

_MAX_DARK: Final = 80.0
"""Largest grey value, but for a tail, of a dark image."""

_MIN_BRIGHT: Final = 190.0
"""Smallest grey value, but for a tail, of a bright image."""

_MAX_SHARPNESS: Final = 0.15
"""Largest sharpness of a blurred image."""

_LEAST_SPREAD: Final = {"grey": 10.0, "log": 0.1}
"""Smallest robust standard deviation that is assumed: of grey values, and of logarithms."""

_SIZE_FACTOR: Final = 3.0
"""Smallest ratio of the sides of an image of odd size to the usual ones."""

_SHAPE_FACTOR: Final = 2.0
"""Smallest ratio of the elongation of an image of odd shape to the usual one."""


class Measures(NamedTuple):
    """What is measured of one image."""

    width: int
    height: int
    dark_end: float
    """Grey value (0 to 255) that 2 % of the pixels are below."""
    bright_end: float
    """Grey value (0 to 255) that 2 % of the pixels are above."""
    spread: float
    """Largest standard deviation of a channel."""
    sharpness: float
    """Standard deviation of the Laplacian over that of the grey values; 0 for a flat image."""


class QualityFinding(NamedTuple):
    """An image that stands out, and how."""

    id: str
    fault: Fault
    score: float
    """Robust standard deviations from the median of the data set; larger = more unusual."""
    value: str
    """What was measured, in words."""


class QualityMeter:
    """Measures images while something else reads them, so that they are read once."""

    def __init__(self) -> None:
        self._rows: list[Measures] = []

    def watch(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Measure each image, and pass it on."""
        for image in images:
            self._rows.append(measure_quality(image))
            yield image

    def findings(self, ids: Sequence[str]) -> list[QualityFinding]:
        """Return what stands out among the images that were watched; see `find_outliers`."""
        return find_outliers(self._rows, ids)


def measure_quality(image: NDArray[np.uint8]) -> Measures:
    """Measure one image.

    Args:
        image: uint8 (h, w) or (h, w, 3).
    """
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    longest = max(width, height)
    if longest > _SIDE:
        sides = (max(1, width * _SIDE // longest), max(1, height * _SIDE // longest))
        picture = picture.resize(sides, Image.Resampling.BOX)
    channels = np.asarray(picture, np.float32)
    grey = np.asarray(picture.convert("L"), np.float32)
    dark_end, bright_end = np.percentile(grey, [_TAIL, 100 - _TAIL])
    deviation = float(grey.std())
    sharpness = 0.0
    if deviation and min(grey.shape) > 2:
        inner = grey[1:-1, 1:-1]
        neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
        sharpness = float((4 * inner - neighbours).std()) / deviation
    return Measures(
        width=width,
        height=height,
        dark_end=float(dark_end),
        bright_end=float(bright_end),
        spread=float(channels.std((0, 1)).max()),
        sharpness=sharpness,
    )


def find_outliers(rows: Sequence[Measures], ids: Sequence[str]) -> list[QualityFinding]:
    """Find images that stand out from the others and are unusual by themselves, too.

    Both are required: a data set of X-rays is dark as a whole, and one of icons has flat images. An
    image stands out at `OUTLIER` robust standard deviations (1.4826 times the median absolute
    deviation) from the median. An image of nearly one colour is not reported as dark, bright or
    blurred as well.

    Args:
        rows: what was measured.
        ids: name of each image.

    Returns:
        The findings by fault, the most unusual image first. None for fewer than `FEWEST` images.

    Raises:
        DataError: the lengths differ.
    """
    if len(rows) != len(ids):
        raise DataError("images do not match the ids", expected=len(ids), got=len(rows))
    if len(rows) < FEWEST:
        return []
    table = {name: np.array([getattr(row, name) for row in rows]) for name in Measures._fields}
    sides = np.sqrt(table["width"] * table["height"])
    shapes = np.maximum(table["width"], table["height"]) / np.minimum(
        table["width"], table["height"]
    )
    spread, sharpness = table["spread"], table["sharpness"]
    flat = spread <= _MAX_SPREAD
    scores: dict[Fault, NDArray[np.float64]] = {
        "one colour": np.where(flat, -_log_deviation(spread), 0),
        "dark": np.where(
            table["bright_end"] <= _MAX_DARK, -_deviation(table["bright_end"], "grey"), 0
        ),
        "bright": np.where(
            table["dark_end"] >= _MIN_BRIGHT, _deviation(table["dark_end"], "grey"), 0
        ),
        "blurred": np.where(sharpness <= _MAX_SHARPNESS, -_log_deviation(sharpness), 0),
        "size": _far_from_usual(sides, _SIZE_FACTOR),
        "shape": _far_from_usual(shapes, _SHAPE_FACTOR),
    }
    is_empty = scores["one colour"] >= OUTLIER
    for fault in ("dark", "bright", "blurred"):
        scores[fault] = np.where(is_empty, 0, scores[fault])
    findings = []
    for fault in get_args(Fault):
        found = np.flatnonzero(scores[fault] >= OUTLIER)
        for row in found[np.argsort(-scores[fault][found], kind="stable")]:
            value = _describe(fault, rows[row])
            findings.append(QualityFinding(ids[row], fault, float(scores[fault][row]), value))
    return findings


def _deviation(values: NDArray[np.float64], unit: str) -> NDArray[np.float64]:
    """Return the robust standard deviations of each value from the median."""
    offsets = values - np.median(values)
    scale = 1.4826 * float(np.median(np.abs(offsets)))
    return np.asarray(offsets / max(scale, _LEAST_SPREAD[unit]), np.float64)


def _log_deviation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Do the same for the logarithms of values of 0 or more."""
    return _deviation(np.log(np.maximum(values, 1e-3)), "log")


def _far_from_usual(values: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    """Return the deviation in either direction; 0 within a factor of the median."""
    ratio = values / np.median(values)
    is_far = (ratio >= factor) | (ratio <= 1 / factor)
    return np.where(is_far, np.abs(_log_deviation(values)), 0)


def _describe(fault: Fault, row: Measures) -> str:
    """Say what was measured."""
    if fault in ("size", "shape"):
        return f"{row.width} x {row.height}"
    if fault == "dark":
        return f"98 % of the pixels are below {row.bright_end:.0f} of 255"
    if fault == "bright":
        return f"98 % of the pixels are above {row.dark_end:.0f} of 255"
    if fault == "blurred":
        return f"sharpness {row.sharpness:.3f}"
    return f"standard deviation {row.spread:.1f} of 255"
