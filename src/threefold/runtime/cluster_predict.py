"""Answer many images on the nodes of a Ray cluster, part by part, in the order of the images.

A part is a task with one processor. Its answers depend on nothing else, so a part whose process or
node dies is answered again elsewhere. The model and the images lie on a disk that all nodes see;
images that are no files of their own, such as those of shards, are read here and sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from threefold.data.image_rows import ImageRow
from threefold.errors import (
    DataError,
    ExportError,
    RunError,
    ThreefoldError,
    error_from,
    error_texts,
)
from threefold.files import sha256
from threefold.ray_cluster import (
    NodeWatch,
    cancel_unfinished,
    check_nodes,
    connected,
    task_error,
)
from threefold.runtime.batches import Answer, BatchSize, answer_images
from threefold.runtime.device_parity import compare_with_cpu
from threefold.runtime.model import CascadePolicy, Model
from threefold.runtime.model_output import ModelOutput
from threefold.runtime.predict import Engine, make_batch

PACKAGES: Final = ("threefold", "numpy", "onnxruntime", "pillow")
"""Those whose versions can change an answer."""

PART_IMAGES: Final = 128
"""Images of a part: seconds of work, which a death costs at most."""

PARTS_AHEAD: Final = 3
"""Parts that are given to the cluster at the same time, for each processor."""

RETRIES: Final = 3
"""How often a part is answered again whose process has died."""


class SentImage(NamedTuple):
    """An encoded image that is no file that a node could read."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Part:
    """Some images that a node is to answer; plain values, for they travel.

    Attributes:
        model: absolute path of the exported file.
        digest: its SHA-256.
        images: absolute paths, images, or in place of one that could not be read its error, as
            `errors.error_texts` has it.
        policy: how many members answer.
        engine: how.
    """

    model: str
    digest: str
    images: tuple[str | SentImage | tuple[str, ...], ...]
    policy: CascadePolicy
    engine: Engine


@dataclass(frozen=True)
class PartAnswers:
    """The answers to a part; plain values, for they travel.

    Attributes:
        answers: of each image, or its error as `errors.error_texts` has it.
        notes: of how far a device's answers are from those of the CPU, once for each process.
        batch: images at a time, at the end.
        error: why the whole part has no answers; empty if it has.
    """

    answers: tuple[ModelOutput | tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    batch: int = 0
    error: tuple[str, ...] = ()


# On the nodes


@dataclass
class _Process:
    """What this process of a node keeps between parts: they are often of one model."""

    key: tuple[str, str, Engine] | None = None
    model: Model | None = None
    batch: BatchSize = field(default_factory=BatchSize)
    is_compared: bool = False


_PROCESS: Final = _Process()


def answer_part(part: Part) -> PartAnswers:
    """Answer some images on this node."""
    try:
        return _answer(part)
    except ThreefoldError as error:
        return PartAnswers((), error=error_texts(error))


def _answer(part: Part) -> PartAnswers:
    model, notes = _find_model(part), list[str]()

    def start(images: np.ndarray) -> CascadePolicy:
        if model.device != "cpu" and not _PROCESS.is_compared:
            notes.append(compare_with_cpu(model, images).describe())
            _PROCESS.is_compared = True
        return part.policy

    entries = map(_entry, part.images)
    found = answer_images(model, entries, _PROCESS.batch, start, threads=1)
    answers = tuple(_as_plain(answer) for answer in found)
    return PartAnswers(answers, tuple(notes), _PROCESS.batch.size)


def _find_model(part: Part) -> Model:
    """Return the model of a part; it stays open until this process gets a part of another one.

    Raises:
        ExportError: the file here is another one than where the command was given.
    """
    key = (part.model, part.digest, part.engine)
    if _PROCESS.key != key or _PROCESS.model is None:
        _PROCESS.key = _PROCESS.model = None
        if sha256(Path(part.model)) != part.digest:
            raise ExportError(
                "a node of the cluster has another model file at this path",
                where=part.model,
                fix="put the file on a disk that all nodes share",
            )
        _PROCESS.model = Model(part.model, threads=1, spin=False, device=part.engine.device)
        _PROCESS.batch, _PROCESS.is_compared = make_batch(part.engine), False
        _PROCESS.key = key
    return _PROCESS.model


def _entry(image: str | SentImage | tuple[str, ...]) -> str | ImageRow | DataError:
    if isinstance(image, str):
        return image
    if isinstance(image, SentImage):
        return ImageRow(image.name, lambda: image.content)
    return _data_error(image)


def _data_error(texts: Sequence[str]) -> DataError:
    error = error_from(texts)
    assert isinstance(error, DataError)
    return error


def _as_plain(answer: Answer) -> ModelOutput | tuple[str, ...]:
    if answer.output is not None:
        return answer.output
    assert answer.error is not None
    return error_texts(answer.error)


# Where the command was given


def answer_on_cluster(
    address: str,
    engine: Engine,
    model: Model,
    images: Iterable[str | ImageRow],
    policy: CascadePolicy,
    paths: Sequence[str],
    batch: BatchSize,
    notify: Callable[[str], object],
) -> Iterator[Answer]:
    """Answer images in order on the nodes of a cluster.

    Args:
        address: of the cluster, see `ray_cluster.connected`.
        engine: the device of the nodes, and how many images at a time; with 0, each process finds
            the fastest.
        model: the exported file, opened here.
        images: paths and images.
        policy: how many members answer (`check_policy`).
        paths: files and folders that the images are from, which all nodes must see.
        batch: is given the number of images at a time.
        notify: called with notes.

    Yields:
        The answers, under the names that the images have here.

    Raises:
        RunError: there is no cluster, a node has another version or lacks a path, or the processes
            of a part die again and again.
        ExportError: the model fails.
    """
    with connected(address) as ray:
        nodes = NodeWatch(ray, _needs(engine))
        shared = [str(Path(path).absolute()) for path in (str(model.path), *paths)]
        able = [node for node in nodes.living if node.fits(_needs(engine))]
        check_nodes(ray, able, shared, PACKAGES)
        template = Part(shared[0], sha256(model.path), (), policy, engine)
        work = _Parts(ray, nodes, template)
        try:
            for names, part in work.in_order(images):
                batch.size = part.batch or batch.size
                for note in part.notes:
                    notify(note)
                for name, answer in zip(names, part.answers, strict=True):
                    if isinstance(answer, ModelOutput):
                        yield Answer(name, answer)
                    else:
                        yield Answer(name, None, _data_error(answer))
        finally:
            work.stop()


def check_policy(model: Model, policy: CascadePolicy) -> None:
    """Refuse what the nodes cannot do alike.

    Raises:
        ExportError: there is a budget of time for an image, which each node would keep in its own
            way, or the policy needs a cascade and the file has none.
    """
    if policy.budget_ms:
        raise ExportError(
            "a time for each image holds for one machine",
            where="--executor ray",
            got="--budget",
            fix="give --mode fast",
        )
    model.stop_thresholds(policy)


def _needs(engine: Engine) -> dict[str, float]:
    return {"CPU": 1.0, "GPU": 1.0 if engine.device == "cuda" else 0.0}


class _Sent(NamedTuple):
    """A part that was given to the cluster."""

    names: list[str]
    part: Part


class _Parts:
    """The parts of a list of images on a connected cluster."""

    def __init__(self, ray: Any, nodes: NodeWatch, template: Part) -> None:
        self.ray, self.nodes, self.template = ray, nodes, template
        needs = _needs(template.engine)
        if not nodes.slots:
            raise RunError(
                "no node of the cluster can answer images",
                expected=f"a node with a free {'GPU' if needs['GPU'] else 'CPU'}",
                got=f"{len(nodes.living)} nodes",
            )
        options = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"], "max_retries": 0}
        self.task = ray.remote(**options)(answer_part)
        self.waiting: list[tuple[Any, _Sent]] = []
        self.losses = 0

    def in_order(self, images: Iterable[str | ImageRow]) -> Iterator[tuple[list[str], PartAnswers]]:
        """Give the images to the cluster, and yield the parts in their order."""
        remaining = iter(images)
        while True:
            while len(self.waiting) < PARTS_AHEAD * max(1, self.nodes.slots):
                some = [*itertools.islice(remaining, PART_IMAGES)]
                if not some:
                    break
                self._send(some)
            if not self.waiting:
                return
            answers = self._first()
            if answers is None:
                continue
            if answers.error:
                raise error_from(answers.error)
            _, sent = self.waiting.pop(0)
            self.losses = 0
            yield sent.names, answers

    def stop(self) -> None:
        """End what is not answered yet."""
        with suppress(Exception):
            cancel_unfinished(self.ray, [reference for reference, _ in self.waiting])

    def _send(self, images: Sequence[str | ImageRow]) -> None:
        names = [image.name if isinstance(image, ImageRow) else image for image in images]
        part = replace(self.template, images=tuple(map(_prepare, images)))
        self.waiting.append((self.task.remote(part), _Sent(names, part)))

    def _first(self) -> PartAnswers | None:
        """Return the answers of the first part; None if they are not there yet."""
        reference, sent = self.waiting[0]
        ready, _ = self.ray.wait([reference], timeout=1.0)
        if not ready:
            self._count_nodes()
            return None
        try:
            answers: PartAnswers = self.ray.get(reference)
            return answers
        except self.ray.exceptions.RayTaskError as error:
            what = "images failed on a node of the cluster"
            raise task_error(what, sent.names[0], error) from None
        except self.ray.exceptions.RayError as error:
            self.losses += 1
            if self.losses > RETRIES:
                raise RunError(
                    "the process that answers these images died again and again",
                    where=f"{sent.names[0]} and {len(sent.names) - 1} more",
                    got=f"{self.losses} times, at last {type(error).__name__}",
                    fix="see the logs in /tmp/ray of the nodes; memory may be short there",
                ) from None
            self.waiting[0] = (self.task.remote(sent.part), sent)
            return None

    def _count_nodes(self) -> None:
        """Give all parts to the cluster again if a node is gone since the last count."""
        before = {node.id for node in self.nodes.living}
        if self.nodes.refresh() and not before <= {node.id for node in self.nodes.living}:
            self.stop()
            self.waiting = [(self.task.remote(sent.part), sent) for _, sent in self.waiting]


def _prepare(image: str | ImageRow) -> str | SentImage | tuple[str, ...]:
    """Return what travels of an image."""
    if isinstance(image, str):
        return str(Path(image).absolute())
    try:
        return SentImage(image.name, image.read())
    except DataError as error:
        return error_texts(DataError(error.what, where=image.name, got=error.got, fix=error.fix))
