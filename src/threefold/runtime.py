"""An exported file, loaded: images in, probabilities and sets of classes out, with numpy, pillow and onnxruntime only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from threefold.conformal import ConformalSets, UnknownThreshold
from threefold.errors import DataError, ExportError
from threefold.images import decode
from threefold.modelfile import MEMORY, bytes_beside, open_session, read_card

FORMAT = 1
"""Version of the model card inside a file."""
KEY = "threefold"
"""Where the model card stands in the file's metadata."""


class Model:
    """An exported file: images in, probabilities out. Needs numpy, pillow and onnxruntime only.

    Attributes:
        card: the stored model card (score, protocol, parity, ...). Files that have them: "conformal", a list of
            {"state": of a `ConformalSets`, "coverage", ...}, and "unknown", {"state": of an `UnknownThreshold`, ...}.
        classes: class names, in the order of the probabilities.
        members: names of the members, in the order of `explain`'s second axis.
        sets: prediction sets by whether each class has a threshold of its own; empty in a file without.
        unknown: the threshold for images of no class; None in a file without.
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
        self.sets, self.unknown = self._uncertainty()
        beside = bytes_beside(self.path, self.card)
        self.session = open_session(self.path, threads, memory + 2 * beside, spin)

    def _uncertainty(self) -> tuple[dict[bool, ConformalSets], UnknownThreshold | None]:
        """What the card says of sets and of unknown images, as far as it does."""
        try:
            found = [ConformalSets.from_state(entry["state"]) for entry in self.card.get("conformal") or ()]
            if any(sets.k_ != len(self.classes) for sets in found):
                raise DataError("sets of other classes", expected=len(self.classes), got=[sets.k_ for sets in found])
            told = self.card.get("unknown")
            unknown = None if not told else UnknownThreshold.from_state(told["state"])
        except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExportError(
                "the model card is damaged",
                where=self.path,
                got=f"conformal or unknown: {error}",
                fix="export it again from the run",
            ) from None
        return {sets.by_class: sets for sets in found}, unknown

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

    def predict_sets(
        self, images: Iterable[str | Path | bytes | np.ndarray], by_class: bool = False
    ) -> list[list[str]]:
        """Class names that together hold the right one as often as the card's alpha says, the likeliest first.

        Args:
            images: files, encoded bytes or uint8 arrays (h, w, 3).
            by_class: the sets with a threshold for each class, which aim at that share for every class by itself.

        Raises:
            ExportError: the file has no such sets.
            DataError: an image cannot be read.
        """
        self._sets(by_class)
        return self.sets_of(self.predict_proba(images), by_class)

    def is_unknown(self, images: Iterable[str | Path | bytes | np.ndarray]) -> np.ndarray:
        """Booleans (n,): the model is less sure than of nearly all images of a class; see `conformal.UnknownThreshold`.

        Raises:
            ExportError: the file has no threshold for unknown images.
            DataError: an image cannot be read.
        """
        self._threshold()
        return self.unknown_of(self.predict_proba(images))

    def sets_of(self, probs: np.ndarray, by_class: bool = False) -> list[list[str]]:
        """The sets that belong to probabilities (n, k) of this file, as `predict_sets`.

        Raises:
            ExportError: the file has no such sets.
        """
        sets = self._sets(by_class)
        if not len(probs):
            return []
        rows = zip(np.argsort(-probs, axis=1, kind="stable"), sets.predict_sets(probs), strict=True)
        return [[self.classes[i] for i in order if inside[i]] for order, inside in rows]

    def unknown_of(self, probs: np.ndarray) -> np.ndarray:
        """Which of the probabilities (n, k) of this file belong to unknown images, as `is_unknown`.

        Raises:
            ExportError: the file has no threshold for unknown images.
        """
        threshold = self._threshold()
        return threshold.is_unknown(probs) if len(probs) else np.zeros(0, bool)

    def _sets(self, by_class: bool) -> ConformalSets:
        if by_class not in self.sets:
            raise self._lacks("prediction sets by class" if by_class else "prediction sets")
        return self.sets[by_class]

    def _threshold(self) -> UnknownThreshold:
        if self.unknown is None:
            raise self._lacks("threshold for unknown images")
        return self.unknown

    def _lacks(self, what: str) -> ExportError:
        fix = "export it again with this version from a run that has them"
        return ExportError(f"the model file has no {what}", where=self.path, fix=fix)


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
