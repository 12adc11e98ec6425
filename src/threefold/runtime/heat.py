"""Heat maps of an exported file, by occlusion, and their pictures; needs no torch.

An exported file has no gradients, so Grad-CAM (`models.gradcam`) is not possible. Occlusion
sensitivity (Zeiler and Fergus 2014, section 4.2) needs only answers: squares of the image are
hidden one after the other, and where that lowers the probability of the class, there is heat. A
square that hides nothing the model looks at leaves the map cold; so does evidence that is there
twice. It says what the answer depends on, not that the answer is right.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from threefold.errors import DataError
from threefold.files import write_bytes
from threefold.runtime.model import Model

CELLS: Final = 7
"""Cells of the map in each direction."""
SQUARE: Final = 2
"""Cells that are hidden at a time, in each direction; they move by one."""
POSITIONS: Final = CELLS + SQUARE - 1
"""The first and the last squares reach over the edge, so that each cell is hidden equally often."""
ROUNDING: Final = 1e-5
"""A mean drop of the probability up to this is none."""
BATCH: Final = 16
BATCH_PIXELS: Final = 4_000_000
"""Pixels that are answered at a time, if more than one image is."""
LARGEST: Final = 1024
"""Longest side of a picture."""
SMALLEST: Final = 448
"""Longest side of the picture of a small image, which is enlarged."""
MAX_LABEL: Final = 60
"""Characters of a label in the name of a picture."""
OPACITY: Final = 0.75
COLOURS: Final = (
    (43, 11, 87),
    (111, 25, 110),
    (176, 49, 91),
    (229, 92, 48),
    (252, 161, 8),
    (241, 239, 117),
)
"""Those of matplotlib's inferno from 0.15 to 0.95, evenly spaced; their brightness rises evenly."""


class Heat(NamedTuple):
    """Where the evidence for a class is."""

    map: np.ndarray
    """float32 (h, w) in 0..1, of the image's size; the maximum is 1, or 0 without any evidence."""
    probability: float
    """Of the class, of the whole image."""
    lowest: float
    """Of the class, with the square hidden that matters most."""


class Occlusion(NamedTuple):
    """What hiding parts of an image costs a class."""

    cells: np.ndarray
    """float32 (7, 7): the mean loss of probability of the squares that cover a cell, at least 0."""
    number: int
    """Of the class."""
    probability: float
    """Of the class, of the whole image."""
    lowest: float
    """Of the class, with the square hidden that matters most."""


def occlusion_heat(model: Model, pixels: np.ndarray, number: int) -> Heat:
    """Hide squares of an image, two sevenths of its side wide, in the image's mean colour.

    The model answers 65 images for it, with every member.

    Args:
        model: the exported file.
        pixels: uint8 (h, w, 3).
        number: of the class.

    Raises:
        ExportError: the model fails.
    """
    return occlusion_heats(model, pixels, [number])[0]


def occlusion_heats(model: Model, pixels: np.ndarray, numbers: Sequence[int]) -> list[Heat]:
    """As `occlusion_heat` for several classes, from the same 65 answers; none for no class."""
    if not numbers:
        return []
    image = model.fit_canvas(pixels)
    cropped = is_cropped(model, pixels, image)
    height, width = pixels.shape[:2]
    return [
        Heat(spread_cells(found.cells, height, width, cropped), found.probability, found.lowest)
        for found in occlude_each(model.answer, image, numbers)
    ]


def is_cropped(model: Model, pixels: np.ndarray, image: np.ndarray) -> bool:
    """Whether `Model.fit_canvas` has made an image of the largest centred square of pixels."""
    is_crop = model.canvas is not None and model.canvas.mode == "crop"
    return is_crop and image.shape != pixels.shape


def occlude(
    answer: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    number: int | None = None,
    batch: int = BATCH,
) -> Occlusion:
    """Answer an image, and it with each of 64 squares hidden; errors are those of `answer`.

    Args:
        answer: maps uint8 (b, h, w, 3) to probabilities (b, k).
        image: uint8 (h, w, 3).
        number: of the class; None = the most probable one.
        batch: the most images that are answered at a time.
    """
    return occlude_each(answer, image, None if number is None else [number], batch)[0]


def occlude_each(
    answer: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    numbers: Sequence[int] | None = None,
    batch: int = BATCH,
) -> list[Occlusion]:
    """As `occlude` for several classes, from the same answers; None = the most probable one."""
    height, width = image.shape[:2]
    rows = np.linspace(0, height, CELLS + 1).round().astype(int)
    columns = np.linspace(0, width, CELLS + 1).round().astype(int)
    colour = image.mean((0, 1)).round().astype(np.uint8)
    spans = [(max(0, i - SQUARE + 1), min(CELLS, i + 1)) for i in range(POSITIONS)]
    places = [(down, across) for down in spans for across in spans]
    size = max(1, min(batch, BATCH_PIXELS // (height * width)))
    whole = answer(image[None])[0]
    if numbers is None:
        numbers = [int(whole.argmax())]
    probs = np.zeros((len(places), len(numbers)), np.float32)
    for begin in range(0, len(places), size):
        part = places[begin : begin + size]
        hidden = np.repeat(image[None], len(part), axis=0)
        for one, ((top, bottom), (left, right)) in zip(hidden, part, strict=True):
            one[rows[top] : rows[bottom], columns[left] : columns[right]] = colour
        probs[begin : begin + len(part)] = answer(hidden)[:, numbers]
    found = []
    for number, column in zip(numbers, probs.T, strict=True):
        cells = np.zeros((CELLS, CELLS), np.float32)
        drops = float(whole[number]) - column
        for ((top, bottom), (left, right)), drop in zip(places, drops, strict=True):
            cells[top:bottom, left:right] += drop / SQUARE**2
        losses = np.maximum(cells, 0)
        found.append(Occlusion(losses, number, float(whole[number]), float(column.min())))
    return found


def spread_cells(cells: np.ndarray, height: int, width: int, cropped: bool) -> np.ndarray:
    """Enlarge the cells of an `Occlusion` to an image.

    Args:
        cells: float32 (7, 7).
        height: of the image.
        width: of the image.
        cropped: whether they are of the largest centred square only; the rest is then cold.

    Returns:
        float32 (height, width) in 0..1, with maximum 1, or zeros without any evidence.
    """
    side = min(height, width)
    down, across = (side, side) if cropped else (height, width)
    large = Image.fromarray(cells).resize((across, down), Image.Resampling.BILINEAR)
    spread = np.zeros((height, width), np.float32)
    top, left = (height - down) // 2, (width - across) // 2
    spread[top : top + down, left : left + across] = np.maximum(np.asarray(large), 0)
    # Rounding of the answers alone is no evidence.
    return spread / spread.max() if spread.max() > ROUNDING else np.zeros_like(spread)


def overlay(pixels: np.ndarray, heat: np.ndarray) -> Image.Image:
    """Lay heat over an image: clear where it is cold, yellow where it is hot.

    Args:
        pixels: uint8 (h, w, 3).
        heat: (h, w) in 0..1.

    Returns:
        A picture whose longest side has 448 to 1024 pixels; a small image is enlarged.
    """
    image, layer = Image.fromarray(pixels), Image.fromarray(np.asarray(heat, np.float32))
    image.thumbnail((LARGEST, LARGEST))
    factor = SMALLEST / max(image.size)
    if factor > 1:
        enlarged = [max(1, round(side * factor)) for side in image.size]
        image = image.resize((enlarged[0], enlarged[1]), Image.Resampling.BICUBIC)
    warm = np.asarray(layer.resize(image.size, Image.Resampling.BILINEAR))
    stops = np.array(COLOURS, np.float32)
    places = np.linspace(0, 1, len(stops))
    colours = np.stack([np.interp(warm, places, channel) for channel in stops.T], axis=-1)
    opacity = OPACITY * warm[..., None]
    blended = (1 - opacity) * np.asarray(image) + opacity * colours
    return Image.fromarray(blended.round().clip(0, 255).astype(np.uint8))


def check_picture(path: Path) -> None:
    """Refuse the name of a picture that is no PNG file, before any work.

    Raises:
        DataError: it does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise DataError("a heat map is a PNG file", where=path, expected="a name ending in .png")


def overlay_png(pixels: np.ndarray, heat: np.ndarray) -> bytes:
    """Return `overlay` as the bytes of a PNG file."""
    buffer = io.BytesIO()
    overlay(pixels, heat).save(buffer, "PNG")
    return buffer.getvalue()


def save_overlay(path: Path, pixels: np.ndarray, heat: np.ndarray) -> None:
    """Write `overlay` as a PNG file.

    Raises:
        RunError: the file cannot be written.
    """
    write_bytes(path, overlay_png(pixels, heat))


class HeatFolder:
    """A folder of pictures, one for each image, named after it.

    Args:
        folder: where the pictures go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._taken: dict[str, int] = {}

    def save(self, image: str, pixels: np.ndarray, heat: np.ndarray, label: str = "") -> Path:
        """Write the picture of an image; a name that was taken by another one gets a number.

        Args:
            image: its path.
            pixels: uint8 (h, w, 3).
            heat: (h, w) in 0..1.
            label: what the heat is of, as a part of the name.
        """
        stem = _labelled_stem(Path(image).stem, label)
        count = self._taken[stem] = self._taken.get(stem, 0) + 1
        path = self.folder / (f"{stem}.png" if count == 1 else f"{stem}-{count}.png")
        save_overlay(path, pixels, heat)
        return path


def _labelled_stem(stem: str, label: str) -> str:
    """Return a file name's stem with a label, of which only letters, digits, - and _ are kept."""
    plain = re.sub(r"[^\w-]+", "-", label).strip("-")[:MAX_LABEL]
    return f"{stem}-{plain}" if plain else stem
