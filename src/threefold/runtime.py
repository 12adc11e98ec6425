"""An exported file, loaded: images in, probabilities out, with numpy, pillow and onnxruntime only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from threefold.errors import ExportError
from threefold.images import decode
from threefold.modelfile import MEMORY, open_session, read_card

FORMAT = 1
"""Version of the model card inside a file."""
KEY = "threefold"
"""Where the model card stands in the file's metadata."""


class Model:
    """An exported file: images in, probabilities out. Needs numpy, pillow and onnxruntime only.

    Attributes:
        card: the stored model card (score, protocol, parity, ...).
        classes: class names, in the order of the probabilities.
        members: names of the members, in the order of `explain`'s second axis.
    """

    def __init__(self, path: str | Path, threads: int = 0, *, memory: int = MEMORY, spin: bool = True) -> None:
        self.path, self.threads = Path(path), threads
        self.card: dict[str, Any] = read_card(self.path, KEY)
        if self.card.get("format") != FORMAT:
            raise ExportError(
                "the model file has another format",
                where=path,
                expected=FORMAT,
                got=self.card.get("format"),
                fix="export it again with this version",
            )
        self.classes: tuple[str, ...] = tuple(self.card["classes"])
        self.members: tuple[str, ...] = tuple(self.card["members"])
        self.session = open_session(self.path, threads, memory, spin)

    def explain(self, images: Iterable[str | Path | bytes | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities float32 (n, k) and each member's (n, m, k) of files, encoded bytes or uint8 arrays (h, w, 3).

        Raises:
            DataError: an image cannot be read (its path and the reason).
        """
        answers = [self.session.run(["probs", "member_probs"], {"images": as_image(image)[None]}) for image in images]
        if not answers:
            return np.zeros((0, len(self.classes)), np.float32), np.zeros(
                (0, len(self.members), len(self.classes)), np.float32
            )
        return np.concatenate([a[0] for a in answers]), np.concatenate([a[1] for a in answers])

    def predict_proba(self, images: Iterable[str | Path | bytes | np.ndarray]) -> np.ndarray:
        """Probabilities float32 (n, k)."""
        return self.explain(images)[0]

    def predict(self, images: Iterable[str | Path | bytes | np.ndarray]) -> list[str]:
        """The most probable class name of each image."""
        return [self.classes[i] for i in self.predict_proba(images).argmax(1)]


def as_image(image: str | Path | bytes | np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) of a file, encoded bytes, or an array that already is one.

    Raises:
        ExportError: an array of another shape or type.
        DataError: the file cannot be read.
    """
    if not isinstance(image, np.ndarray):
        return decode(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ExportError("not an image array", expected="uint8 (h, w, 3)", got=f"{image.dtype} {image.shape}")
    return image


def load(path: str | Path, threads: int = 0) -> Model:
    """Open an exported file; imports neither torch nor timm.

    Raises:
        ExportError: missing, damaged, or not a threefold model.
    """
    return Model(path, threads)
