"""Load an exported file and predict with numpy, pillow and onnxruntime only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from threefold.ensembles.cascade import MODES, Cascade
from threefold.ensembles.conformal import ConformalSets, UnknownThreshold
from threefold.errors import DataError, ExportError, shorten
from threefold.runtime.hub import local_path
from threefold.runtime.inputs import ImageInput, iterate_images
from threefold.runtime.model_file import MEMORY, bytes_beside, open_session, read_card
from threefold.runtime.shrink import Canvas, common_canvas, shrink

FORMAT: Final = 1
"""Version of the model card inside a file."""
KEY: Final = "threefold"
"""Key of the model card in the file's metadata."""

LARGE_PIXELS: Final = 4_000_000
"""Pixels of an image above which `Model.prepare` resizes it before the graph does."""
TOLERANCE: Final = 0.01
"""How far the probabilities of an image may be from a sum of 1, and each from 0..1."""


@dataclass(frozen=True)
class CascadePolicy:
    """How many members of the cascade answer an image.

    Attributes:
        mode: "full" runs every member. "fast" stops as soon as the answer so far is sure; if it
            never is, the answer is that of "full".
        max_stages: stop after this many stages, sure or not; 0 = no limit.
        budget_ms: milliseconds of model time for an image; 0 = no limit. `Model.resolve_budget`
            turns it into a mode and a limit on the stages.

    Raises:
        ExportError: the mode is unknown.
    """

    mode: str = "full"
    max_stages: int = 0
    budget_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ExportError("unknown mode", expected=" or ".join(MODES), got=self.mode)


FULL: Final = CascadePolicy("full")
FAST: Final = CascadePolicy("fast")


@dataclass(frozen=True)
class ModelOutput:
    """The answers of a model for n images.

    Attributes:
        probs: (n, k) float32.
        member_probs: (n, m, k) float32; zeros for members that did not run.
        stages_used: (n,) int64, the stages of the cascade that ran; None without a cascade.
    """

    probs: np.ndarray
    member_probs: np.ndarray
    stages_used: np.ndarray | None = None

    def row(self, i: int) -> ModelOutput:
        """The output for image i, with n = 1."""
        stages = None if self.stages_used is None else self.stages_used[i : i + 1]
        return ModelOutput(self.probs[i : i + 1], self.member_probs[i : i + 1], stages)


class StageCap(NamedTuple):
    """Accuracy under a limit on the stages and without it, as the model card states it."""

    accuracy: float
    full_accuracy: float
    rows: str


class Model:
    """An exported file: images in, probabilities out.

    Attributes:
        device: where it answers, a name of `devices.DEVICES`.
        card: the stored model card (score, protocol, parity, ...). Optional keys: "conformal", a
            list of {"state": of a `ConformalSets`, "coverage", ...}, and "unknown", {"state": of
            an `UnknownThreshold`, ...}.
        classes: class names, in the order of the probabilities.
        members: names of the members, in the order of `ModelOutput.member_probs`.
        sets: prediction sets; the key says whether each class has its own threshold. Empty in a
            file without prediction sets.
        unknown: the threshold for images that belong to no class; None in a file without one.
        cascade: the order in which members run in mode "fast"; None in a file without a cascade.
        canvas: what all members resize images to; None if they have several sizes.
        caps: accuracy if images stop after 1, 2, ... stages at the latest, without the last stage.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int = 0,
        *,
        memory: int = MEMORY,
        spin: bool = True,
        device: str = "cpu",
    ) -> None:
        self.path, self.threads, self.device = local_path(path), threads, device
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
        self.sets: dict[bool, ConformalSets] = {}
        self.unknown: UnknownThreshold | None = None
        self.cascade: Cascade | None = None
        self.caps: list[StageCap] = []
        self.canvas: Canvas | None = common_canvas(self.card)
        with self._card_part("conformal or unknown"):
            self._read_uncertainty()
        if self.card.get("cascade") is not None:
            with self._card_part("cascade"):
                self._read_cascade(self.card["cascade"])
        data_bytes = bytes_beside(self.path, self.card)
        self.session = open_session(self.path, threads, memory + 2 * data_bytes, spin, device)

    def __repr__(self) -> str:
        classes, members = len(self.classes), len(self.members)
        return f"<Model {self.path}: {classes} classes, {members} members, on {self.device}>"

    def _read_uncertainty(self) -> None:
        for entry in self.card.get("conformal") or ():
            sets = ConformalSets.from_state(entry["state"])
            if sets.k_ != len(self.classes):
                raise DataError(
                    "prediction sets of other classes", expected=len(self.classes), got=sets.k_
                )
            self.sets[sets.by_class] = sets
        if self.card.get("unknown"):
            self.unknown = UnknownThreshold.from_state(self.card["unknown"]["state"])

    def _read_cascade(self, entry: Mapping[str, Any]) -> None:
        """Read the card's cascade; `read_card` has checked the graph's inputs against it."""
        self.cascade = Cascade.from_state(entry["state"])
        if sum(map(len, self.cascade.stages)) != len(self.members):
            raise DataError(
                "a cascade of other members", expected=len(self.members), got=self.cascade.stages
            )
        for cap in entry.get("caps", ()):
            self.caps.append(StageCap(float(cap["accuracy"]), float(cap["full"]), str(cap["rows"])))

    @contextmanager
    def _card_part(self, name: str) -> Iterator[None]:
        """Report any fault in a part of the card as one line that names the part."""
        try:
            yield
        except (
            DataError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise ExportError(
                "the model card is damaged",
                where=self.path,
                got=f"{name}: {error}",
                fix="export it again from the run",
            ) from None

    def run(
        self, images: np.ndarray, policy: CascadePolicy = FULL, options: Any = None
    ) -> ModelOutput:
        """Run the model on a batch uint8 (b, h, w, 3); each image gets the same answer as alone.

        Args:
            images: the batch.
            policy: how many members answer.
            options: onnxruntime's RunOptions.

        Raises:
            ExportError: the policy needs a cascade and the file has none, the model fails, or its
                answers are not probabilities.
        """
        thresholds = self.stop_thresholds(policy)
        outputs, inputs = ["probs", "member_probs"], {"images": images}
        if self.cascade is not None:
            outputs.append("stages_used")
            inputs["stop"] = thresholds
        output = ModelOutput(*self.session.run(outputs, inputs, options))
        self._check_output(output, len(images))
        return output

    def answer(self, images: np.ndarray) -> np.ndarray:
        """Map a batch of `run` to probabilities float32 (b, k); errors as `run`."""
        return self.run(images).probs

    def score(
        self, images: Iterable[ImageInput], labels: Sequence[str], policy: CascadePolicy = FULL
    ) -> float:
        """Accuracy on labelled images, as scikit-learn's classifiers have it.

        Args:
            images: as `infer`.
            labels: the right class name of each image.
            policy: how many members answer.

        Raises:
            DataError: images and labels differ in number, a label is no class of the file, or an
                image cannot be read.
            ExportError: as `infer`.
        """
        unknown = sorted({str(label) for label in labels} - set(self.classes))
        if unknown:
            raise DataError(
                "labels that the model does not know",
                expected=shorten(self.classes),
                got=shorten(unknown),
            )
        answers = self.predict(images, policy)
        if len(answers) != len(labels) or not answers:
            raise DataError(
                "a score needs one label for each image",
                expected=f"{len(answers)} labels" if answers else "images",
                got=len(labels),
            )
        return sum(map(str.__eq__, answers, map(str, labels))) / len(answers)

    def _check_output(self, output: ModelOutput, n: int) -> None:
        """Refuse answers that are not probabilities of n images, as of a damaged file."""
        k, m, got = len(self.classes), len(self.members), ""
        if output.probs.shape != (n, k) or output.member_probs.shape != (n, m, k):
            got = f"answers of shape {output.probs.shape} and {output.member_probs.shape}"
        elif self.cascade is not None:
            stages = np.asarray(output.stages_used)
            if stages.shape != (n,) or ((stages < 1) | (stages > len(self.cascade.stages))).any():
                got = "a number of stages that the cascade does not have"
        for probs in (output.probs, output.member_probs):
            inside = (probs >= -TOLERANCE) & (probs <= 1 + TOLERANCE)  # false for NaN
            if not got and not inside.all():
                got = f"a probability of {probs[~inside][0]:.4g}"
        sums = output.probs.sum(axis=-1)
        if not got and not (np.abs(sums - 1) <= TOLERANCE).all():
            got = f"probabilities with a sum of {sums[np.abs(sums - 1).argmax()]:.4g}"
        if got:
            raise ExportError(
                "the model cannot answer",
                where=self.path,
                expected="probabilities",
                got=got,
                fix="export the run again; the file is damaged or not from threefold",
            )

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Resize a large image as the graph would, in a tenth of the memory.

        Args:
            pixels: uint8 (h, w, 3).

        Returns:
            The image as `run` takes it, with the same answer; small images, and those of models
            whose members have several sizes, are returned as they are.
        """
        is_large = pixels.shape[0] * pixels.shape[1] > LARGE_PIXELS
        return shrink(pixels, self.canvas) if self.canvas is not None and is_large else pixels

    def fit_canvas(self, pixels: np.ndarray) -> np.ndarray:
        """As `prepare`, but for every image, so that images of any sizes can share a batch."""
        return pixels if self.canvas is None else shrink(pixels, self.canvas, enlarge=True)

    def stop_thresholds(self, policy: CascadePolicy) -> np.ndarray:
        """The value of the graph's input `stop` for a policy; empty in a file without a cascade.

        Raises:
            ExportError: the policy needs a cascade and the file has none, or its budget is not
                resolved.
        """
        if policy.budget_ms:
            raise ExportError("the time budget is not resolved", fix="call resolve_budget first")
        if self.cascade is not None:
            return self.cascade.stops(policy.mode, policy.max_stages)
        if policy != FULL:
            raise self._lacks("cascade")
        return np.zeros(0, np.float32)

    def infer(
        self, images: ImageInput | Iterable[ImageInput], policy: CascadePolicy = FULL
    ) -> ModelOutput:
        """Run the model on images, one at a time.

        Args:
            images: one image or several: paths, bytes of files, Pillow images, arrays uint8
                (h, w, 3), or tensors (3, h, w), uint8 or floats in 0..1 (`inputs.as_pixels`).
            policy: how many members answer.

        Returns:
            The answers for n images; n = 1 for a single image.

        Raises:
            DataError: an image cannot be read (names its path and the reason).
            ExportError: as `run`; or something is not an image.
        """
        self.stop_thresholds(policy)
        outputs = [self.run(self.prepare(p)[None], policy) for p in iterate_images(images)]
        k, m = len(self.classes), len(self.members)
        probs = [np.zeros((0, k), np.float32), *(output.probs for output in outputs)]
        members = [np.zeros((0, m, k), np.float32), *(output.member_probs for output in outputs)]
        stages = None
        if self.cascade is not None:
            counts = [np.asarray(output.stages_used, np.int64) for output in outputs]
            stages = np.concatenate([np.zeros(0, np.int64), *counts])
        return ModelOutput(np.concatenate(probs), np.concatenate(members), stages)

    def predict_proba(
        self, images: ImageInput | Iterable[ImageInput], policy: CascadePolicy = FULL
    ) -> np.ndarray:
        """Probabilities float32 (n, k); arguments and errors as `infer`."""
        return self.infer(images, policy).probs

    def predict(
        self, images: ImageInput | Iterable[ImageInput], policy: CascadePolicy = FULL
    ) -> list[str]:
        """The most probable class of each image; arguments and errors as `infer`."""
        return [self.classes[i] for i in self.predict_proba(images, policy).argmax(1)]

    def members_in_stages(self, stages: int | None) -> list[int]:
        """Indices of the members in the first stages; all members in a file without a cascade."""
        if self.cascade is None or stages is None:
            return list(range(len(self.members)))
        return sorted(i for stage in self.cascade.stages[:stages] for i in stage)

    def measure_latency(self, images: Sequence[np.ndarray], repeats: int = 3) -> dict[str, Any]:
        """Milliseconds per image on this machine, one image at a time, without decoding.

        Args:
            images: uint8 (h, w, 3); their size matters, since the resize is part of the graph.
            repeats: of each image. The policies take turns, so that other work on the machine
                affects all of them alike.

        Returns:
            "full": median. With a cascade also "fast", the mean, and "stages": the median when
            every image stops after 1, 2, ... stages; the last entry is that of "full".
            "n": number of images. "threads": of onnxruntime, 0 = one per core.
        """
        policies: dict[str | int, CascadePolicy] = {"full": FULL}
        num_stages = 0 if self.cascade is None else len(self.cascade.stages)
        for stages in range(1, num_stages):
            policies[stages] = CascadePolicy("full", stages)
        if num_stages:
            policies["fast"] = FAST
        times: dict[str | int, list[float]] = {name: [] for name in policies}
        for repeat in range(repeats + 1):
            for image in images:
                for name, policy in policies.items():
                    start = time.perf_counter()
                    self.run(image[None], policy)
                    if repeat > 0:  # the first round warms up
                        times[name].append(1000 * (time.perf_counter() - start))
        medians = {name: float(np.median(values)) for name, values in times.items()}
        latency: dict[str, Any] = {
            "full": medians["full"],
            "n": len(images),
            "threads": self.threads,
        }
        if num_stages:
            latency["fast"] = float(np.mean(times["fast"]))
            latency["stages"] = [*(medians[s] for s in range(1, num_stages)), medians["full"]]
        return latency

    def resolve_budget(self, policy: CascadePolicy, image: np.ndarray) -> CascadePolicy:
        """Turn a time budget into a mode and a limit on stages, for images of this size.

        Every member runs if there is time for all of them. Otherwise images stop as in mode
        "fast", at the latest after as many stages as the budget allows, measured on this image.

        Args:
            policy: with a `budget_ms`.
            image: uint8 (h, w, 3).

        Raises:
            ExportError: the budget is too small for the first stage, or for the whole model in a
                file without a cascade.
        """
        latency = self.measure_latency([image], repeats=5)
        times = latency.get("stages", [latency["full"]])
        affordable = [s for s, elapsed in enumerate(times, 1) if elapsed <= policy.budget_ms]
        if affordable:
            return FULL if affordable[-1] == len(times) else CascadePolicy("fast", affordable[-1])
        if self.cascade is None:
            what, part = "the model file has no cascade to save time with", "the whole model"
        else:
            what, part = "no answer within the budget", "the first stage"
        raise ExportError(
            what,
            where=self.path,
            expected=f"at most {policy.budget_ms:g} ms",
            got=f"{times[0]:.1f} ms for {part}",
        )

    def predict_sets(
        self, images: ImageInput | Iterable[ImageInput], by_class: bool = False
    ) -> list[list[str]]:
        """Prediction sets: class names, the most probable first.

        A set contains the true class with probability 1 - alpha, where alpha is in the model card.

        Args:
            images: as `infer`.
            by_class: use a threshold for each class, so that the coverage holds class by class.

        Raises:
            ExportError: the file has no such sets.
            DataError: an image cannot be read.
        """
        self._require_sets(by_class)
        return self.sets_from_probs(self.predict_proba(images), by_class)

    def is_unknown(self, images: ImageInput | Iterable[ImageInput]) -> np.ndarray:
        """Flag images, bool (n,), that look like no class; see `conformal.UnknownThreshold`.

        Raises:
            ExportError: the file has no threshold for unknown images.
            DataError: an image cannot be read.
        """
        self._require_unknown()
        return self.unknown_from_probs(self.predict_proba(images))

    def sets_from_probs(self, probs: np.ndarray, by_class: bool = False) -> list[list[str]]:
        """Prediction sets from probabilities (n, k) of this file, as `predict_sets`.

        Raises:
            ExportError: the file has no such sets.
        """
        sets = self._require_sets(by_class)
        if not len(probs):
            return []
        rows = zip(np.argsort(-probs, axis=1, kind="stable"), sets.predict_sets(probs), strict=True)
        return [[self.classes[i] for i in order if inside[i]] for order, inside in rows]

    def unknown_from_probs(self, probs: np.ndarray) -> np.ndarray:
        """Flag probabilities (n, k) of this file, as `is_unknown`.

        Raises:
            ExportError: the file has no threshold for unknown images.
        """
        threshold = self._require_unknown()
        return threshold.is_unknown(probs) if len(probs) else np.zeros(0, bool)

    def _require_sets(self, by_class: bool) -> ConformalSets:
        if by_class not in self.sets:
            raise self._lacks("prediction sets by class" if by_class else "prediction sets")
        return self.sets[by_class]

    def _require_unknown(self) -> UnknownThreshold:
        if self.unknown is None:
            raise self._lacks("threshold for unknown images")
        return self.unknown

    def _lacks(self, what: str) -> ExportError:
        return ExportError(
            f"the model file has no {what}",
            where=self.path,
            fix="export it again with this version from a run that has them",
        )


def load(path: str | Path, threads: int = 0, device: str = "cpu") -> Model:
    """Open an exported file; needs neither torch nor timm.

    Args:
        path: the file, or where it is on the Hugging Face hub: hf://USER/NAME[@REVISION].
        threads: of onnxruntime on the CPU; 0 = one per core.
        device: cpu, cuda, coreml or openvino; see `device_parity.compare_with_cpu`.

    Raises:
        ExportError: missing, damaged, or not a threefold model; or onnxruntime lacks the device.
    """
    return Model(path, threads, device=device)
