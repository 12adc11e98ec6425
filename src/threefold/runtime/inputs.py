"""Turn what people call images into pixels: files, bytes, Pillow images, arrays and tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from PIL import Image

from threefold.data.images import decode, rgb_pixels
from threefold.errors import ExportError, shorten


class ArrayLike(Protocol):
    """What numpy can read as an array, such as a torch tensor."""

    shape: Any

    def __array__(self) -> np.ndarray: ...


ImageInput = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | ArrayLike
"""An image: a path, the bytes of a file, a Pillow image, or an array or a tensor of pixels."""

_ENCODED = (str, os.PathLike, bytes, bytearray, memoryview)
_PIXELS = "uint8 in 0..255 or floats in 0..1, of shape (h, w, 3), or (3, h, w) for a tensor"


def iterate_images(images: ImageInput | Iterable[ImageInput]) -> Iterator[np.ndarray]:
    """Yield the pixels of one image, or of each of several, uint8 (h, w, 3).

    Args:
        images: an image, several in any iterable, or an array or tensor of four axes.

    Raises:
        DataError: a file cannot be read.
        ExportError: something is not an image, or the values are not pixels.
    """
    if hasattr(images, "columns"):  # a data frame, which numpy reads as an array of cells
        raise ExportError(
            "a table is not a list of images",
            expected="the column of their paths, such as table['image']",
            got=f"columns {shorten(map(str, images.columns))}",
        )
    is_array_of_one = len(getattr(images, "shape", ())) in (2, 3)
    is_file = isinstance(images, (*_ENCODED, Image.Image)) or hasattr(images, "read")
    if is_file or is_array_of_one:
        yield as_pixels(images)
    elif isinstance(images, Iterable) and not isinstance(images, dict):
        for image in images:
            yield as_pixels(image)
    else:
        raise _not_an_image(images)


def as_pixels(image: Any) -> np.ndarray:
    """Return the pixels of an image, uint8 (h, w, 3).

    Files are decoded and Pillow images converted as `images.decode` does. Floats are pixels divided
    by 255, as torchvision's ToTensor makes them; they must not be normalised.

    Raises:
        DataError: the file cannot be read.
        ExportError: it is not an image, or the values are not pixels.
    """
    if isinstance(image, Image.Image):
        return rgb_pixels(image)
    if isinstance(image, (bytearray, memoryview)):
        return decode(bytes(image))
    if isinstance(image, bytes | str) or hasattr(image, "read"):
        return decode(image)
    if isinstance(image, os.PathLike):
        return decode(os.fspath(image))
    if hasattr(image, "__array__"):
        return _array_pixels(image)
    raise _not_an_image(image)


def _array_pixels(image: Any) -> np.ndarray:
    """Return the pixels of an array or a tensor."""
    is_tensor = hasattr(image, "detach")  # of torch, on any device
    try:
        array: np.ndarray = np.asarray(image.detach().cpu() if is_tensor else image)
    except Exception as error:  # each library has its own errors
        raise ExportError(
            "cannot read the tensor as an array", got=f"{type(error).__name__}: {error}"
        ) from None
    if is_tensor and array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = np.ascontiguousarray(array.transpose(1, 2, 0))
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise _not_pixels(f"{array.dtype} {array.shape}")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise _not_pixels(f"{array.dtype} values from {low:.4g} to {high:.4g}")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise _not_pixels(f"{array.dtype} {array.shape}")
    return array


def _not_pixels(got: str) -> ExportError:
    return ExportError("not an image array", expected=_PIXELS, got=got)


def _not_an_image(thing: object) -> ExportError:
    return ExportError(
        "not an image",
        expected="a path, the bytes of a file, a Pillow image, an array or a tensor, or several",
        got=type(thing).__name__,
    )
