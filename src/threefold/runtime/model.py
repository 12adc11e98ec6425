"""Load an exported file and predict with numpy, pillow and onnxruntime only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from threefold.ensembles.cascade import MODES, Cascade
from threefold.ensembles.conformal import ConformalSets, UnknownThreshold
from threefold.errors import DataError, ExportError, shorten
from threefold.names import count_of
from threefold.runtime import fixed_size
from threefold.runtime.canvas import Canvas, common_canvas, fit_canvas
from threefold.runtime.card_parts import StageCap, read_parts
from threefold.runtime.hub import local_path
from threefold.runtime.inputs import ImageInput, iterate_images
from threefold.runtime.model_file import (
    MEMORY,
    bytes_beside,
    check_manifest,
    open_session,
    read_card,
)
from threefold.runtime.model_output import ModelOutput, find_fault
from threefold.tasks import Task

FORMAT: Final = 1
"""Version of the model card inside a file."""
KEY: Final = "threefold"
"""Key of the model card in the file's metadata."""


Labels = str | tuple[str, ...]
"""An answer: the class of an image, or its labels, the most probable first."""


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


class Model:
    """An exported file: images in, probabilities out.

    Attributes:
        device: where it answers, a name of `devices.DEVICES`.
        card: the stored model card (score, protocol, parity, ...). Optional keys: "conformal", a
            list of {"state": of a `ConformalSets`, "coverage", ...}, and "unknown", {"state": of
            an `UnknownThreshold`, ...}.
        task: multiclass = an image has one class; multilabel = any number of labels.
        classes: class names, in the order of the probabilities.
        thresholds: (k,) float64, the probability from which on an image has each label; None of a
            multiclass model.
        members: names of the members, in the order of `ModelOutput.member_probs`.
        sets: prediction sets; the key says whether each class has its own threshold. Empty in a
            file without prediction sets.
        unknown: the threshold for images that belong to no class; None in a file without one.
        cascade: the order in which members run in mode "fast"; None in a file without a cascade.
        canvas: what all members resize images to; None if they have several sizes.
        is_fixed_size: whether the graph takes images on the canvas only.
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
        check_manifest(self.path)
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
        parts = read_parts(self.card, self.path)
        self.task: Task = parts.task
        self.thresholds: np.ndarray | None = parts.thresholds
        self.sets: dict[bool, ConformalSets] = parts.sets
        self.unknown: UnknownThreshold | None = parts.unknown
        self.cascade: Cascade | None = parts.cascade
        self.caps: list[StageCap] = parts.caps
        self.canvas: Canvas | None = common_canvas(self.card)
        self.is_fixed_size = fixed_size.is_fixed_size(self.card, self.canvas, path)
        data_bytes = bytes_beside(self.path, self.card)
        self.session = open_session(self.path, threads, memory + 2 * data_bytes, spin, device)

    def __repr__(self) -> str:
        kind = "labels" if self.task == "multilabel" else "classes"
        return (
            f"<Model {self.path}: {len(self.classes)} {kind}, "
            f"{count_of(len(self.members), 'member')}, on {self.device}>"
        )

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
        if self.is_fixed_size:
            fixed_size.check_batch(images, self.card["fixed_size"], self.path)
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
        self,
        images: Iterable[ImageInput],
        labels: Iterable[Any],
        policy: CascadePolicy = FULL,
    ) -> float:
        """Accuracy on labelled images, as scikit-learn's classifiers have it.

        Of a multilabel model it is the share of images with exactly the right labels.

        Args:
            images: as `infer`.
            labels: the right class of each image, as `fit` reads labels: a name, a whole number, or
                zeros and ones (n, k); for a multilabel model a list of names, also an empty one.
            policy: how many members answer.

        Raises:
            DataError: images and labels differ in number, a label is no class of the file, or an
                image cannot be read.
            ExportError: as `infer`.
        """
        from threefold.runtime.true_labels import true_labels  # answers need no reader of labels

        right = true_labels(labels, self.task)
        unknown = sorted(frozenset().union(*right) - set(self.classes))
        if unknown:
            raise DataError(
                "labels that the model does not know",
                expected=shorten(self.classes),
                got=shorten(unknown),
                fix="give the names of the model's classes",
            )
        answers = self.predict(images, policy)
        if len(answers) != len(right) or not answers:
            raise DataError(
                "a score needs one label for each image",
                expected=f"{len(answers)} labels" if answers else "images",
                got=len(right),
            )
        given = [frozenset([row] if isinstance(row, str) else row) for row in answers]
        return sum(map(frozenset.__eq__, given, right)) / len(answers)

    def _check_output(self, output: ModelOutput, n: int) -> None:
        """Refuse answers that are not probabilities of n images, as of a damaged file."""
        stages = 0 if self.cascade is None else len(self.cascade.stages)
        got = find_fault(output, (n, len(self.members), len(self.classes)), stages, self.task)
        if got:
            raise ExportError(
                "the model cannot answer",
                where=self.path,
                expected="probabilities",
                got=got,
                fix="export the run again; the file is damaged or not from threefold",
            )

    def fit_canvas(self, pixels: np.ndarray) -> np.ndarray:
        """Resize an image as the graph would, in less time and a tenth of the memory.

        Args:
            pixels: uint8 (h, w, 3).

        Returns:
            The image as `run` takes it, with the same answer. Images of any sizes can then share a
            batch. Where members have several sizes, and where an image is too large for exact sums,
            it is returned as it is.

        Raises:
            DataError: the model takes images of one size, and this one is too large to be resized.
        """
        if self.canvas is None:
            return pixels
        if self.is_fixed_size:
            return fixed_size.resize(pixels, self.canvas)
        return fit_canvas(pixels, self.canvas)

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
        outputs = [self.run(self.fit_canvas(p)[None], policy) for p in iterate_images(images)]
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
    ) -> list[Labels]:
        """The most probable class of each image, or the labels of each image.

        A multilabel model answers a tuple of labels for each image, those whose probabilities reach
        their thresholds, the most probable first; it can be empty. Arguments and errors as `infer`.
        """
        return [self.labels_of(row) for row in self.predict_proba(images, policy)]

    def labels_of(self, probs: np.ndarray) -> Labels:
        """The answer that the probabilities (k,) of an image stand for, as `predict` gives it."""
        names = [self.classes[i] for i in self.label_numbers(probs)]
        return tuple(names) if self.thresholds is not None else names[0]

    def label_numbers(self, probs: np.ndarray) -> list[int]:
        """The numbers of the classes that the probabilities (k,) of an image stand for.

        Args:
            probs: of one image.

        Returns:
            That of the most probable class; of a multilabel model those of all labels whose
            probabilities reach their thresholds, the most probable first.
        """
        if self.thresholds is None:
            return [int(probs.argmax())]
        order = np.argsort(-probs, kind="stable")
        return [int(i) for i in order if probs[i] >= self.thresholds[i]]

    def members_in_stages(self, stages: int | None) -> list[int]:
        """Indices of the members in the first stages; all members in a file without a cascade."""
        if self.cascade is None or stages is None:
            return list(range(len(self.members)))
        return sorted(i for stage in self.cascade.stages[:stages] for i in stage)

    def measure_latency(self, images: Sequence[np.ndarray], repeats: int = 3) -> dict[str, Any]:
        """Milliseconds per image on this machine, one image at a time, without decoding.

        Args:
            images: uint8 (h, w, 3); their size matters, since the resize is part of the time.
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
                    self.run(self.fit_canvas(image)[None], policy)
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
        fix = "export it again with this version from a run that has them"
        if self.task == "multilabel":
            fix = "leave it out: a model that gives any number of labels cannot have one"
        return ExportError(f"the model file has no {what}", where=self.path, fix=fix)


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
