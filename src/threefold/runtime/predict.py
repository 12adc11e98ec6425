"""Predict files, folders and lists with an exported file, as text, JSON or CSV; needs no torch."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from threefold.data.images import IMAGE_SUFFIXES, decode
from threefold.data.walk import LeftOut, describe_left_out, walk_images
from threefold.errors import DataError, RecipeError
from threefold.names import escape_formula, printable
from threefold.runtime.json_text import json_line
from threefold.runtime.model import FULL, CascadePolicy, Model, load


def find_images(
    sources: Iterable[str],
    listing: IO[str] | None = None,
    notify: Callable[[str], object] | None = None,
) -> Iterator[Path]:
    """Yield files, every image in folders, and for `-` the paths on `listing`, one per line.

    A path that does not exist is yielded, too: reading it fails, like any other bad image.

    Args:
        sources: files, folders, or -.
        listing: what - reads; None = standard input.
        notify: called with what is left out of a folder.

    Raises:
        DataError: a folder holds no image.
    """
    for source in sources:
        path = Path(source)
        if source == "-":
            for line in listing or sys.stdin:
                name = line.rstrip("\r\n")
                if name:
                    yield Path(name)
        elif path.is_dir():
            left_out: list[LeftOut] = []
            images = sorted(walk_images(path, left_out))
            if notify is not None:
                for note in describe_left_out(left_out):
                    notify(f"{path}: {note}")
            if not images:
                raise DataError(
                    "no images in the folder",
                    where=path,
                    expected=f"files ending in {', '.join(sorted(IMAGE_SUFFIXES))}",
                )
            yield from images
        else:
            yield path


def _each_image(
    sources: Iterable[str], notify: Callable[[str], object]
) -> Iterator[Path | DataError]:
    """Yield what `find_images` finds, and in place of a source that fails its error."""
    for source in sources:
        try:
            yield from find_images([source], notify=notify)
        except DataError as error:
            yield error
        except OSError as error:  # such as a path that is too long
            yield DataError("cannot read", where=source[:200], got=error)


def predict_image(
    model: Model, image: Path, top: int, policy: CascadePolicy = FULL
) -> dict[str, Any]:
    """Predict one image as plain values for JSON.

    Returns:
        The keys image, label, probability, top (the most probable classes), members (the label of
        each member that ran) and probs; set and unknown if the file has them; members_used with a
        cascade.

    Raises:
        DataError: the image cannot be read.
        ExportError: the policy needs a cascade and the file has none.
    """
    output = model.infer([image], policy)
    probs, member_probs = output.probs[0], output.member_probs[0]
    stages = None if output.stages_used is None else int(output.stages_used[0])
    members = model.members_in_stages(stages)
    order = np.argsort(-probs, kind="stable")[:top]
    answer = {
        "image": str(image),
        "label": model.classes[order[0]],
        "probability": float(probs[order[0]]),
        "top": [{"label": model.classes[i], "probability": float(probs[i])} for i in order],
        "members": {model.members[i]: model.classes[member_probs[i].argmax()] for i in members},
        "probs": [float(p) for p in probs],
    }
    if False in model.sets:
        answer["set"] = model.sets_from_probs(output.probs)[0]
    if model.unknown is not None:
        answer["unknown"] = bool(model.unknown_from_probs(output.probs)[0])
    if model.cascade is not None:
        answer["members_used"] = len(members)
    return answer


def as_text(answer: dict[str, Any], model: Model) -> str:
    """Format an answer of `predict_image` as one line."""
    top = ", ".join(f"{entry['label']} {entry['probability']:.1%}" for entry in answer["top"])
    parts = [f"{answer['image']}: {top}"]
    if "set" in answer:
        coverage = 100 * (1 - model.sets[False].alpha)
        parts.append(f"{coverage:.4g}% set {{{', '.join(answer['set'])}}}")
    if answer.get("unknown"):
        parts.append("unknown?")
    return "; ".join(parts)


def write_predictions(
    stream: IO[str],
    notify: Callable[[DataError | str], object],
    model_path: Path,
    sources: Sequence[str],
    top: int,
    form: str,
    policy: CascadePolicy = FULL,
) -> int:
    """Predict every image in order and write the answers.

    Args:
        stream: where the answers go.
        notify: called with the error of an unreadable image, and with the policy of a budget.
        model_path: the exported file.
        sources: files, folders, or - for a list on standard input.
        top: how many classes to name.
        form: text, json or csv.
        policy: how many members answer; a budget is measured on the first readable image.

    Returns:
        The number of images and sources that could not be read.

    Raises:
        ExportError: the file cannot be loaded, the policy needs a cascade and the file has none, or
            the budget is too small.
    """
    model, failed = load(model_path), 0
    if not policy.budget_ms:
        model.stop_thresholds(policy)
    rows = csv.writer(stream) if form == "csv" else None
    if rows:
        rows.writerow(["path", "prediction", "confidence", *map(escape_formula, model.classes)])
    for path in _each_image(sources, notify):
        if isinstance(path, DataError):
            failed += 1
            notify(path)
            continue
        try:
            if policy.budget_ms:
                resolved = model.resolve_budget(policy, decode(path))
                notify(f"budget {policy.budget_ms:g} ms: {describe_policy(model, resolved)}")
                policy = resolved
            answer = predict_image(model, path, top, policy)
        except DataError as error:
            failed += 1
            notify(error)
            continue
        probs = answer.pop("probs")
        if rows:
            numbers = [f"{p:.6f}" for p in (answer["probability"], *probs)]
            names = [escape_formula(name) for name in (answer["image"], answer["label"])]
            if stream.isatty():
                names = [printable(name) for name in names]
            rows.writerow([*names, *numbers])
        elif form == "json":
            stream.write(json_line(answer, stream) + "\n")
        else:
            stream.write(printable(as_text(answer, model), keep="") + "\n")
    return failed


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
