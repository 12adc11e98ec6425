"""Images inside the page: thumbnails as data URIs, and heat maps to lay over them."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from PIL import Image

from threefold.errors import RunError
from threefold.npz_files import read_arrays

SIDE: Final = 160
"""Longest side of a picture on the page, in pixels; larger ones are reduced."""

HEAT_SIDE: Final = 32
"""Longest side of a heat map, which comes from a grid of about seven by seven cells."""

OPACITY: Final = 0.75
"""Opacity of the hottest place, so that the image shows through."""

_Array = np.ndarray[Any, Any]
_TABLES = (("ids", ("images", "cams")), ("suspect_ids", ("suspect_images",)))
_PAIRS = ("pair_ids", "pair_images", "pair_true", "pair_answer")


@dataclass(frozen=True)
class Thumbs:
    """The thumbnails (uint8) of a run; each table is empty where it has none.

    Attributes:
        images: images of mistakes, (h, w, 3), by id.
        cams: heat (h, w), 0 to 255, by id; ids without heat are left out.
        suspects: images of suspect labels by id.
        pairs: ids and images of mistakes by (true class number, answer's number).
        preview: (r, h, w, 3) augmented training images, or None.
    """

    images: Mapping[str, _Array] = field(default_factory=dict)
    cams: Mapping[str, _Array] = field(default_factory=dict)
    suspects: Mapping[str, _Array] = field(default_factory=dict)
    pairs: Mapping[tuple[int, int], list[tuple[str, _Array]]] = field(default_factory=dict)
    preview: _Array | None = None

    @classmethod
    def read(cls, path: Path) -> Thumbs:
        """Read a thumbs.npz; without the file there are no pictures.

        Raises:
            RunError: the file is damaged, or arrays that belong together differ in length.
        """
        arrays = read_arrays(path) if path.is_file() else {}
        for names in (*((key, *values) for key, values in _TABLES), _PAIRS):
            lengths = {name: len(arrays[name]) for name in names if name in arrays}
            if len(set(lengths.values())) > 1:
                raise RunError(
                    "arrays do not belong together",
                    where=path,
                    expected="equal lengths",
                    got=lengths,
                )
        tables = [_by_id(arrays, key, value) for key, values in _TABLES for value in values]
        cams = {name: heat for name, heat in tables[1].items() if heat.any()}
        pairs: dict[tuple[int, int], list[tuple[str, _Array]]] = {}
        if all(name in arrays for name in _PAIRS):
            for name, image, true, answer in zip(*(arrays[n] for n in _PAIRS), strict=True):
                pairs.setdefault((int(true), int(answer)), []).append((str(name), image))
        return cls(tables[0], cams, tables[2], pairs, arrays.get("preview"))


def _by_id(arrays: Mapping[str, _Array], key: str, value: str) -> dict[str, _Array]:
    if key not in arrays or value not in arrays:
        return {}
    return dict(zip(map(str, arrays[key]), arrays[value], strict=True))


def data_uri(pixels: _Array) -> str:
    """Return an image (h, w, 3) uint8 as a data URI: exact up to 64 pixels, else reduced."""
    image = Image.fromarray(pixels)
    if max(image.size) <= 64:
        return _encode(image, "PNG", optimize=True)
    image.thumbnail((SIDE, SIDE))
    return _encode(image, "JPEG", quality=85)


def heat_uri(heat: _Array) -> str:
    """Return heat (h, w), 0 to 255, as a layer over the image: clear where cold, yellow where hot.

    The colours (matplotlib's inferno) rise evenly in brightness, so that readers who cannot see
    red or green can tell them apart.
    """
    small = Image.fromarray(np.asarray(heat, np.uint8))
    small.thumbnail((HEAT_SIDE, HEAT_SIDE))
    return _encode(Image.fromarray(_palette()[np.asarray(small)]), "PNG", optimize=True)


def _encode(image: Image.Image, format: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{format.lower()};base64,{encoded}"


@functools.cache
def _palette() -> _Array:
    """Return the color (RGBA) of every heat, (256, 4)."""
    heat = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps["inferno"](0.15 + 0.8 * heat)
    colours[:, 3] = OPACITY * heat
    return np.asarray((255 * colours).round(), np.uint8)
