"""An exported file, loaded: images in, probabilities and sets of classes out, with numpy, pillow and onnxruntime only."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from threefold.cascade import MODES, Cascade
from threefold.conformal import ConformalSets, UnknownThreshold
from threefold.errors import DataError, ExportError
from threefold.images import decode
from threefold.modelfile import MEMORY, bytes_beside, open_session, read_card

FORMAT = 1
"""Version of the model card inside a file."""
KEY = "threefold"
"""Where the model card stands in the file's metadata."""


Picture = str | Path | bytes | np.ndarray
"""A file, encoded bytes, or a uint8 array (h, w, 3)."""


class Asked(NamedTuple):
    """Answers of a model.

    Attributes:
        probs: (n, k) float32.
        members: (n, m, k) float32, each member's; zeros for those that were not asked.
        asked: (n,) int64, how many stages of the cascade each image took; None in a file without a cascade.
    """

    probs: np.ndarray
    members: np.ndarray
    asked: np.ndarray | None


class Model:
    """An exported file: images in, probabilities out. Needs numpy, pillow and onnxruntime only.

    Attributes:
        card: the stored model card (score, protocol, parity, ...). Files that have them: "conformal", a list of
            {"state": of a `ConformalSets`, "coverage", ...}, and "unknown", {"state": of an `UnknownThreshold`, ...}.
        classes: class names, in the order of the probabilities.
        members: names of the members, in the order of `explain`'s second axis.
        sets: prediction sets by whether each class has a threshold of its own; empty in a file without.
        unknown: the threshold for images of no class; None in a file without.
        cascade: which members are asked in which order in the mode "fast"; None in a file without.
        caps: for each number of stages but all: accuracy with at most so many, of the full ensemble, and on which rows.
    """

    caps: Sequence[tuple[float, float, str]] = ()

    def __init__(
        self, path: str | Path, threads: int = 0, *, memory: int = MEMORY, spin: bool = True
    ) -> None:
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
        self.cascade = self._cascade()
        beside = bytes_beside(self.path, self.card)
        self.session = open_session(self.path, threads, memory + 2 * beside, spin)

    def _uncertainty(self) -> tuple[dict[bool, ConformalSets], UnknownThreshold | None]:
        """What the card says of sets and of unknown images, as far as it does."""
        with self._reading("conformal or unknown"):
            found = [
                ConformalSets.from_state(entry["state"])
                for entry in self.card.get("conformal") or ()
            ]
            if any(sets.k_ != len(self.classes) for sets in found):
                raise DataError(
                    "sets of other classes",
                    expected=len(self.classes),
                    got=[sets.k_ for sets in found],
                )
            told = self.card.get("unknown")
            unknown = None if not told else UnknownThreshold.from_state(told["state"])
        return {sets.by_class: sets for sets in found}, unknown

    def _cascade(self) -> Cascade | None:
        """What the card says of a cascade, if it does; `modelfile` has checked the graph's inputs against it."""
        if self.card.get("cascade") is None:
            return None
        with self._reading("cascade"):
            told = self.card["cascade"]
            found = Cascade.from_state(told["state"])
            self.caps = [
                (float(c["accuracy"]), float(c["full"]), str(c["rows"]))
                for c in told.get("caps", ())
            ]
            if sum(map(len, found.stages)) != len(self.members):
                raise DataError(
                    "a cascade of other members", expected=len(self.members), got=found.stages
                )
        return found

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Whatever is wrong with a part of the card is one line that names it."""
        try:
            yield
        except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
            fix = "export it again from the run"
            raise ExportError(
                "the model card is damaged", where=self.path, got=f"{what}: {error}", fix=fix
            ) from None

    def run(
        self, images: np.ndarray, mode: str = "full", most: int = 0, options: Any = None
    ) -> Asked:
        """The model on a batch: uint8 (b, h, w, 3); every image gets the same answer as alone.

        Args:
            images: of one height and width.
            mode: "full" asks every member. "fast" stops at an image as soon as the members so far are sure; where they never
                are, the answer is that of "full".
            most: with so many stages an image gets the answer of the members so far, sure or not; 0 = no such bound.
            options: of onnxruntime.

        Raises:
            ExportError: the mode is unknown, or the file has no cascade and one is asked for.
        """
        names, fed = ["probs", "member_probs"], {"images": images}
        if self.cascade is None:
            self.stops(mode, most)
            probs, members = self.session.run(names, fed, options)
            return Asked(probs, members, None)
        return Asked(
            *self.session.run([*names, "asked"], {**fed, "stop": self.stops(mode, most)}, options)
        )

    def stops(self, mode: str = "full", most: int = 0) -> np.ndarray:
        """What the graph's input `stop` takes for a mode, see `run`; empty in a file without a cascade.

        Raises:
            ExportError: the mode is unknown, or the file has no cascade and one is asked for.
        """
        if mode not in MODES:
            raise ExportError("unknown mode", expected=" or ".join(MODES), got=mode)
        if self.cascade is not None:
            return self.cascade.stops(mode, most)
        if mode != "full" or most:
            raise self._lacks("cascade")
        return np.zeros(0, np.float32)

    def ask(self, images: Iterable[Picture], mode: str = "full", most: int = 0) -> Asked:
        """Answers of files, encoded bytes or uint8 arrays (h, w, 3), one at a time; `mode` and `most` as of `run`.

        Raises:
            DataError: an image cannot be read (its path and the reason).
            ExportError: the mode is unknown, or the file has no cascade and one is asked for.
        """
        self.stops(mode, most)
        answers = [self.run(as_image(image)[None], mode, most) for image in images]
        k, m = len(self.classes), len(self.members)
        probs = np.concatenate([np.zeros((0, k), np.float32), *(a.probs for a in answers)])
        members = np.concatenate([np.zeros((0, m, k), np.float32), *(a.members for a in answers)])
        asked = np.array([int(a.asked[0]) for a in answers if a.asked is not None], np.int64)
        return Asked(probs, members, None if self.cascade is None else asked)

    def explain(
        self, images: Iterable[Picture], mode: str = "full", most: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities float32 (n, k) and each member's (n, m, k); as `ask`."""
        return self.ask(images, mode, most)[:2]

    def predict_proba(
        self, images: Iterable[Picture], mode: str = "full", most: int = 0
    ) -> np.ndarray:
        """Probabilities float32 (n, k); as `ask`."""
        return self.ask(images, mode, most).probs

    def predict(self, images: Iterable[Picture], mode: str = "full", most: int = 0) -> list[str]:
        """The most probable class name of each image; as `ask`."""
        return [self.classes[i] for i in self.predict_proba(images, mode, most).argmax(1)]

    def asked_members(self, stages: int | None) -> list[int]:
        """Numbers of the members that were asked in so many stages, in the file's order; all where there is no cascade."""
        if self.cascade is None or stages is None:
            return list(range(len(self.members)))
        return sorted(i for stage in self.cascade.stages[:stages] for i in stage)

    def latency(self, images: Sequence[np.ndarray], repeats: int = 3) -> dict[str, Any]:
        """Milliseconds of an image on this machine, one at a time, decoding not counted.

        Args:
            images: uint8 (h, w, 3); the sizes count, since the resize is in the graph.
            repeats: of each; the settings take turns, so that other work on the machine meets all of them alike.

        Returns:
            "full": median. With a cascade also "fast", the mean, and "stages": for each number of stages the median of
            stopping there whatever the image, the last as full. "n": images, "threads": onnxruntime's, 0 = one per core.
        """
        settings: dict[Any, tuple[str, int]] = {"full": ("full", 0)}
        if self.cascade is not None:
            settings |= {s: ("full", s) for s in range(1, len(self.cascade.stages))}
            settings["fast"] = "fast", 0
        taken: dict[Any, list[float]] = {name: [] for name in settings}
        for turn in range(repeats + 1):
            for image in images:
                for name, (mode, most) in settings.items():
                    began = time.perf_counter()
                    self.run(image[None], mode, most)
                    if turn:  # the first warms up
                        taken[name].append(1000 * (time.perf_counter() - began))
        told: dict[str, Any] = {
            "full": float(np.median(taken["full"])),
            "n": len(images),
            "threads": self.threads,
        }
        if self.cascade is not None:
            stages = [float(np.median(taken[s])) for s in range(1, len(self.cascade.stages))]
            told |= {"fast": float(np.mean(taken["fast"])), "stages": [*stages, told["full"]]}
        return told

    def afford(self, milliseconds: float, image: np.ndarray) -> tuple[str, int]:
        """The mode and the most stages whose time on this machine is within a budget, for any image of this size.

        Everything is asked where the time for that is within the budget. Else images stop as in "fast", and the latest after
        as many stages as the budget has time for: what those cost is measured now, on this image.

        Args:
            milliseconds: of the model for one image, decoding not counted.
            image: uint8 (h, w, 3).

        Returns:
            `mode` and `most`, as `run` takes them.

        Raises:
            ExportError: not even the first stage is within the budget, or the file has no cascade and the whole is not.
        """
        found = self.latency([image], repeats=5)
        times = found.get("stages", [found["full"]])
        fit = [s for s, time in enumerate(times, 1) if time <= milliseconds]
        if not fit:
            what = (
                "no answer within the budget"
                if self.cascade
                else "the model file has no cascade to save time with"
            )
            got = f"{times[0]:.1f} ms for {'the first stage' if self.cascade else 'the whole'}"
            raise ExportError(
                what, where=self.path, expected=f"at most {milliseconds:g} ms", got=got
            )
        return ("full", 0) if fit[-1] == len(times) else ("fast", fit[-1])

    def predict_sets(self, images: Iterable[Picture], by_class: bool = False) -> list[list[str]]:
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

    def is_unknown(self, images: Iterable[Picture]) -> np.ndarray:
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


def as_image(image: Picture) -> np.ndarray:
    """uint8 (h, w, 3) of a file, encoded bytes, or an array that already is one.

    Raises:
        ExportError: an array of another shape or type.
        DataError: the file cannot be read.
    """
    if not isinstance(image, np.ndarray):
        return decode(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ExportError(
            "not an image array", expected="uint8 (h, w, 3)", got=f"{image.dtype} {image.shape}"
        )
    return image


def as_json(tree: Any) -> Any:
    """A model card as JSON can hold it everywhere: numbers that are not finite become null."""
    if isinstance(tree, dict):
        return {str(key): as_json(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [as_json(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def load(path: str | Path, threads: int = 0) -> Model:
    """Open an exported file; imports neither torch nor timm.

    Raises:
        ExportError: missing, damaged, or not a threefold model.
    """
    return Model(path, threads)
