"""Predict files, folders and lists with an exported file, as text, JSON or CSV; needs no torch."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from threefold.data.image_rows import ImageRow, list_rows, names_images
from threefold.data.images import IMAGE_SUFFIXES, decode
from threefold.data.walk import LeftOut, describe_left_out, iterate_images
from threefold.errors import DataError, RecipeError
from threefold.names import printable
from threefold.runtime.batches import (
    CPU_SIZES,
    DEVICE_SIZES,
    MAX_BATCH,
    Answer,
    BatchSize,
    answer_images,
)
from threefold.runtime.describe import AnswerTable, as_text, describe_answer
from threefold.runtime.device_parity import compare_with_cpu
from threefold.runtime.heat import HeatFolder, occlusion_heats
from threefold.runtime.json_text import json_line
from threefold.runtime.model import FULL, CascadePolicy, Model
from threefold.runtime.model_output import ModelOutput
from threefold.suffixes import is_archive


def find_images(
    sources: Iterable[str],
    listing: IO[str] | None = None,
    notify: Callable[[str], object] | None = None,
) -> Iterator[Path | ImageRow]:
    """Yield files, every image in folders, and for `-` the paths on `listing`, one per line.

    Of a table, of shards and of a streamed data set the images are yielded (`data.image_rows`).

    A path that does not exist is yielded, too: reading it fails, like any other bad image.

    Args:
        sources: files, folders, tables, shards, addresses of data sets, or -.
        listing: what - reads; None = standard input.
        notify: called with what is left out of a folder.

    Raises:
        DataError: a folder holds no image, or a file is an archive.
    """
    for source in sources:
        path = Path(source)
        if source == "-":
            for line in listing or sys.stdin:
                name = line.rstrip("\r\n")
                if name:
                    yield Path(name)
        elif names_images(source):
            yield from list_rows(source)
        elif path.is_dir():
            left_out: list[LeftOut] = []
            is_empty = True
            for image in iterate_images(path, left_out):
                is_empty = False
                yield image
            if notify is not None:
                for note in describe_left_out(left_out):
                    notify(f"{path}: {note}")
            if is_empty:
                raise DataError(
                    "no images in the folder",
                    where=path,
                    expected=f"files ending in {', '.join(sorted(IMAGE_SUFFIXES))}",
                )
        elif is_archive(path):
            raise DataError(
                "an archive is not an image",
                where=path,
                fix="unpack it, and give the folder of its images",
            )
        else:
            yield path


def each_image(
    sources: Iterable[str], notify: Callable[[str], object]
) -> Iterator[Path | ImageRow | DataError]:
    """Yield what `find_images` finds, and in place of a source that fails its error."""
    for source in sources:
        try:
            yield from find_images([source], notify=notify)
        except DataError as error:
            yield error
        except OSError as error:  # such as a path that is too long
            yield DataError("cannot read", where=source[:200], got=error)


@dataclass(frozen=True)
class Engine:
    """How the images are answered; the answers are the same, up to rounding.

    Attributes:
        device: a name of `devices.DEVICES`.
        batch: images that are answered at a time; 0 = the fastest of a few sizes, which are tried
            on the first images. With 1, an image is read when the one before is answered.
    """

    device: str = "cpu"
    batch: int = 1


def write_predictions(
    stream: IO[str],
    notify: Callable[[DataError | str], object],
    model_path: Path,
    sources: Sequence[str],
    top: int,
    form: str,
    policy: CascadePolicy = FULL,
    engine: Engine | None = None,
    heat: Path | None = None,
) -> int:
    """Predict every image in order and write the answers.

    Args:
        stream: where the answers go.
        notify: called with the error of an unreadable image, with the policy of a budget, and with
            how far a device's answers are from those of the CPU.
        model_path: the exported file.
        sources: files, folders, or - for a list on standard input.
        top: how many classes to name.
        form: text, json or csv.
        policy: how many members answer; a budget is measured on the first readable image.
        engine: where, and how many at a time; None = one by one on the CPU.
        heat: a folder for a heat map of each answer (`heat.occlusion_heats`), of a multilabel file
            of each label, which takes 65 times as long; None = no heat.

    Returns:
        The number of images and sources that could not be read.

    Raises:
        ExportError: the file cannot be loaded, the policy needs a cascade and the file has none,
            the budget is too small, or the device is missing or answers differently.
    """
    engine = engine or Engine()
    model, failed = open_model(model_path, engine), 0
    rows = csv.writer(stream) if form == "csv" else None
    table = AnswerTable(model.classes, model.task)
    if rows:
        rows.writerow(table.csv_head())
    pictures = None if heat is None else HeatFolder(heat)
    rows_of: dict[str, ImageRow] = {}

    def entries() -> Iterator[str | ImageRow | DataError]:
        for found in each_image(sources, notify):
            if isinstance(found, ImageRow) and pictures is not None:
                rows_of[found.name] = found
            yield str(found) if isinstance(found, Path) else found

    for path, output, error in answer_all(model, entries(), policy, engine, notify):
        if output is None or error is not None:
            failed += 1
            notify(error or path)
            continue
        answer = describe_answer(model, path, output, top)
        if pictures is not None:
            row = rows_of.get(path)
            pixels = decode(path if row is None else row.read())
            answer["heat"] = _draw_heat(model, path, pixels, output, pictures)
        if rows:
            cells = table.csv_cells(answer)
            if stream.isatty():
                cells = [printable(cell) for cell in cells]
            rows.writerow(cells)
        elif form == "json":
            del answer["probs"]
            stream.write(json_line(answer, stream) + "\n")
        else:
            stream.write(printable(as_text(answer, model), keep="") + "\n")
    return failed


def _draw_heat(
    model: Model, path: str, pixels: np.ndarray, output: ModelOutput, pictures: HeatFolder
) -> str | dict[str, str]:
    """Write a picture for the class of an image, or for each of its labels; return the paths."""
    numbers = model.label_numbers(output.probs[0])
    heats = occlusion_heats(model, pixels, numbers)
    if model.thresholds is None:
        return str(pictures.save(path, pixels, heats[0].map))
    return {
        model.classes[number]: str(pictures.save(path, pixels, heat.map, model.classes[number]))
        for number, heat in zip(numbers, heats, strict=True)
    }


def answer_all(
    model: Model,
    paths: Iterable[str | ImageRow | DataError],
    policy: CascadePolicy,
    engine: Engine,
    notify: Callable[[str], object],
    batch: BatchSize | None = None,
    on_policy: Callable[[CascadePolicy], object] = lambda policy: None,
) -> Iterator[Answer]:
    """Answer images in order, after the checks that need the first of them.

    Args:
        model: opened on the engine's device.
        paths: of the images, or errors.
        policy: how many members answer.
        engine: how the images are answered.
        notify: called with the policy of a budget, and with the difference from the CPU.
        batch: how many images at a time; None = as the engine says.
        on_policy: called with what a budget has become.

    Raises:
        ExportError: as `write_predictions`.
    """
    if not policy.budget_ms:
        model.stop_thresholds(policy)

    def start(images: np.ndarray) -> CascadePolicy:
        if model.device != "cpu":
            notify(compare_with_cpu(model, images).describe())
        if not policy.budget_ms:
            return policy
        resolved = model.resolve_budget(policy, images[0])
        notify(f"budget {policy.budget_ms:g} ms: {describe_policy(model, resolved)}")
        on_policy(resolved)
        return resolved

    threads = -1 if engine.batch == 1 else 0
    return answer_images(model, paths, batch or make_batch(engine), start, threads)


def open_model(path: Path, engine: Engine) -> Model:
    """Open a file for an engine.

    Where threads decode, those of onnxruntime do not wait in a loop, which would take their cores.

    Raises:
        ExportError: as `model.load`.
    """
    return Model(path, spin=engine.batch == 1, device=engine.device)


def make_batch(engine: Engine) -> BatchSize:
    """The number of images at a time that an engine stands for."""
    return BatchSize(engine.batch, CPU_SIZES if engine.device == "cpu" else DEVICE_SIZES)


def parse_batch(text: str) -> int:
    """Parse the number of images at a time; auto is 0.

    Raises:
        DataError: the text is neither.
    """
    number = int(text) if re.fullmatch("[0-9]{1,6}", text) else 0
    if text == "auto" or 1 <= number <= MAX_BATCH:
        return number
    raise DataError("not a batch of images", expected=f"auto, or 1 to {MAX_BATCH}", got=text[:40])


def parse_policy(mode: str, budget: str) -> CascadePolicy:
    """Make the policy of the flags --mode and --budget; an empty budget means none.

    Raises:
        RecipeError: both are given, but a budget chooses the mode itself.
        DataError: the budget cannot be read.
        ExportError: the mode is unknown.
    """
    if budget and mode != "full":
        raise RecipeError(
            "a budget chooses the mode", where="--mode", got=mode, fix="give --mode or --budget"
        )
    return CascadePolicy(mode, budget_ms=parse_budget(budget) if budget else 0.0)


def parse_budget(text: str) -> float:
    """Parse a time such as 15ms or 0.5s; returns milliseconds.

    Raises:
        DataError: the text is not a positive time.
    """
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s)\s*", text)
    milliseconds = 0.0
    if match:
        milliseconds = float(match[1]) * (1000 if match[2] == "s" else 1)
    if milliseconds <= 0:
        raise DataError(
            "not a time for an image", expected="a number with ms or s, such as 15ms", got=text[:40]
        )
    return milliseconds


def describe_policy(model: Model, policy: CascadePolicy) -> str:
    """Describe a policy in words, with its accuracy from the model card."""
    if policy.mode == "full" or model.cascade is None:
        return "every member for every image"
    members = len(model.members_in_stages(policy.max_stages))
    text = f"at most {members} of {len(model.members)} members for an image"
    if len(model.caps) < policy.max_stages:
        return text
    cap = model.caps[policy.max_stages - 1]
    return (
        f"{text}; accuracy {cap.accuracy:.1%} instead of {cap.full_accuracy:.1%} ({cap.rows} rows)"
    )
