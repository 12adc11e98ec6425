"""ONNX classifiers of other programs, with a small card that says how they want their images."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from PIL import Image
from pydantic import Field, ValidationError

from threefold.errors import ExportError
from threefold.files import read_text
from threefold.recipe.schema import Section
from threefold.runtime.model_file import open_session

FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

Three = tuple[float, float, float]
Side = Annotated[int, Field(ge=1, le=4096)]


class ForeignCard(Section):
    """How a classifier wants its images, and what its outputs mean. timm's words where it has some.

    Attributes:
        classes: class names, in the order of the outputs.
        size: side in pixels, or height and width.
        resize: squash scales both sides; crop scales the shorter side and keeps the centre.
        crop_pct: with crop, share of the scaled shorter side that is kept.
        interpolation: Pillow's filter.
        mean, std: of each channel, of pixels in 0..1.
        channels: order of the channels.
        layout: order of the input's axes; auto = as the file's input says.
        outputs: whether the first output is logits or probabilities; auto = probabilities if they
            are not negative and sum to 1.
    """

    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    size: Side | tuple[Side, Side]
    resize: Literal["squash", "crop"] = "squash"
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    mean: Three = (0.0, 0.0, 0.0)
    std: tuple[
        Annotated[float, Field(gt=0.0)],
        Annotated[float, Field(gt=0.0)],
        Annotated[float, Field(gt=0.0)],
    ] = (1.0, 1.0, 1.0)
    channels: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["auto", "nchw", "nhwc"] = "auto"
    outputs: Literal["auto", "logits", "probs"] = "auto"

    @classmethod
    def load(cls, path: str | Path) -> ForeignCard:
        """Read a card in TOML.

        Raises:
            ExportError: it cannot be read, or a key or value is wrong.
        """
        try:
            return cls.model_validate(tomllib.loads(read_text(Path(path))))
        except ValidationError as error:
            first = error.errors()[0]
            problem = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                problem = f"unknown key, known are {', '.join(cls.model_fields)}"
            got = f"{'.'.join(map(str, first['loc']))}: {problem}"
        except (OSError, ValueError, RecursionError) as error:
            got = str(getattr(error, "strerror", None) or error)
        raise ExportError(
            "cannot read the card",
            where=path,
            expected='TOML such as size = 224, classes = ["cat", "dog"]',
            got=got,
        )


class ForeignModel:
    """An ONNX classifier of another program.

    Args:
        path: the file. Its first input takes images, its first output has a value per class.
        card: how it wants its images.
        threads: of onnxruntime; 0 = one per core.

    Attributes:
        classes: class names, in the order of the probabilities.

    Raises:
        ExportError: the file cannot be opened, or its input takes no images.
    """

    def __init__(self, path: str | Path, card: ForeignCard, threads: int = 0) -> None:
        self.path, self.card = Path(path), card
        self.classes = card.classes
        if not self.path.is_file():
            raise ExportError("no such model file", where=path)
        self.session: Any = open_session(self.path, threads)
        self.input = self.session.get_inputs()[0]
        shape = list(self.input.shape)
        if len(shape) != 4:
            raise self._error("an input of four axes", f"{self.input.name} {shape}")
        self.layout = card.layout
        if card.layout == "auto":
            self.layout = "nhwc" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "nchw"
        self.batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else 0
        """Images in each batch if the file fixes their number, or 0."""

    def fit_canvas(self, pixels: np.ndarray) -> np.ndarray:
        """Resize an image uint8 (h, w, 3) to the card's size."""
        height, width = self._size
        image = Image.fromarray(pixels)
        filter_ = FILTERS[self.card.interpolation]
        if self.card.resize == "squash":
            return np.asarray(image.resize((width, height), filter_))
        scale = max(height / image.height, width / image.width) / self.card.crop_pct
        scaled = (
            max(width, round(image.width * scale)),
            max(height, round(image.height * scale)),
        )
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
        whole = image.resize(scaled, filter_)
        return np.asarray(whole.crop((left, top, left + width, top + height)))

    def answer(self, images: np.ndarray) -> np.ndarray:
        """Map images of `fit_canvas`, uint8 (b, h, w, 3), to probabilities float32 (b, k).

        Raises:
            ExportError: the model fails, or does not answer with a value per class.
        """
        mean, std = (np.array(values, np.float32) for values in (self.card.mean, self.card.std))
        batch = (images.astype(np.float32) / 255 - mean) / std
        if self.card.channels == "bgr":
            batch = batch[..., ::-1]
        if self.layout == "nchw":
            batch = batch.transpose(0, 3, 1, 2)
        if "float16" in self.input.type:
            batch = batch.astype(np.float16)
        parts = (
            np.split(batch, range(self.batch, len(batch), self.batch)) if self.batch else [batch]
        )
        return np.concatenate([self._run(part) for part in parts])

    def _run(self, batch: np.ndarray) -> np.ndarray:
        """Answer a batch, padded to the number of images that the file wants."""
        missing = max(0, self.batch - len(batch))
        whole = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
        feed = {self.input.name: np.ascontiguousarray(whole)}
        outputs = np.asarray(self.session.run(None, feed)[0], np.float32)[: len(batch)]
        outputs = outputs.reshape(len(batch), -1)
        if outputs.shape[1] != len(self.classes):
            raise self._error(
                f"{len(self.classes)} outputs, as the card has classes", f"{outputs.shape[1]}"
            )
        if not np.isfinite(outputs).all():
            raise self._error("numbers", "NaN or infinity")
        sums = outputs.sum(1)
        are_probs = bool((outputs >= 0).all() and (np.abs(sums - 1) < 1e-2).all())
        if self.card.outputs == "probs" and not are_probs:
            raise self._error('probabilities, as outputs = "probs" says', f"a sum of {sums[0]:.4g}")
        if self.card.outputs == "probs" or (self.card.outputs == "auto" and are_probs):
            shares: np.ndarray = outputs / sums[:, None]
            return shares
        powers = np.exp(outputs - outputs.max(1, keepdims=True))
        probs: np.ndarray = powers / powers.sum(1, keepdims=True)
        return probs

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width."""
        size = self.card.size
        return size if isinstance(size, tuple) else (size, size)

    def _error(self, expected: object, got: object) -> ExportError:
        return ExportError(
            "the model does not fit its card", where=self.path, expected=expected, got=got
        )
