"""Predictions of an exported file on files, folders and lists, as text, JSON or CSV. Imports no torch."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from threefold.errors import DataError, RecipeError
from threefold.images import IMAGE_SUFFIXES, decode
from threefold.runtime import Model, load


def find_images(sources: Iterable[str], listing: IO[str] | None = None) -> Iterator[Path]:
    """Files as given, every image below folders, and the lines of `listing` for `-`.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    for source in sources:
        path = Path(source)
        if source == "-":
            yield from (
                Path(line) for text in listing or sys.stdin if (line := text.rstrip("\r\n"))
            )
        elif path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()
            )
            if not found:
                raise DataError(
                    "no images in the folder",
                    where=path,
                    expected=f"files ending in {', '.join(sorted(IMAGE_SUFFIXES))}",
                )
            yield from found
        elif path.exists():
            yield path
        else:
            raise DataError("no such file or folder", where=path)


def answer(
    model: Model, image: Path, top: int, mode: str = "full", most: int = 0
) -> dict[str, Any]:
    """One image's answer: label, probability, the `top` classes, all probabilities; set and unknown where the file has them.

    With a cascade also "asked", the number of members that were, and only those in "members"; `mode` and `most` as of
    `Model.run`.

    Raises:
        DataError: the image cannot be read.
        ExportError: the file has no cascade and one is asked for.
    """
    probs, members, asked = model.ask([image], mode, most)
    present = model.asked_members(None if asked is None else int(asked[0]))
    order = np.argsort(-probs[0], kind="stable")[:top]
    return {
        "image": str(image),
        "label": model.classes[order[0]],
        "probability": float(probs[0][order[0]]),
        "top": [{"label": model.classes[i], "probability": float(probs[0][i])} for i in order],
        "members": {model.members[i]: model.classes[int(members[0][i].argmax())] for i in present},
        "probs": [float(p) for p in probs[0]],
        **({"set": model.sets_of(probs)[0]} if False in model.sets else {}),
        **({"unknown": bool(model.unknown_of(probs)[0])} if model.unknown else {}),
        **({"asked": len(present)} if model.cascade else {}),
    }


def as_text(found: dict[str, Any], model: Model) -> str:
    """An answer in one line: the likeliest classes, the set where the file has sets, and "unknown?" where it is."""
    parts = [
        f"{found['image']}: "
        + ", ".join(f"{t['label']} {t['probability']:.1%}" for t in found["top"])
    ]
    if "set" in found:
        parts.append(
            f"{100 * (1 - model.sets[False].alpha_):.4g}% set {{{', '.join(found['set'])}}}"
        )
    if found.get("unknown"):
        parts.append("unknown?")
    return "; ".join(parts)


def write(
    stream: IO[str],
    tell: Callable[[DataError | str], object],
    model_path: Path,
    sources: Sequence[str],
    top: int,
    form: str,
    mode: str = "full",
    budget: float = 0.0,
) -> int:
    """Answer every image in its order; unreadable ones are counted in the result.

    Args:
        stream: where answers go.
        tell: is told of unreadable images, and of what a budget affords.
        model_path: the exported file.
        sources: files, folders, or - for a list.
        top: how many classes to name.
        form: text, json or csv.
        mode: as of `Model.run`.
        budget: milliseconds for an image, see `Model.afford`; measured on the first image that can be read. 0 = none.

    Raises:
        ExportError: the file cannot be loaded, has no cascade where one is asked for, or the budget is too small.
        DataError: a source is not there.
    """
    model, failed, most = load(model_path), 0, 0
    model.stops(mode)
    rows = csv.writer(stream) if form == "csv" else None
    if rows:
        rows.writerow(["image", "label", "probability", *model.classes])
    for path in find_images(sources):
        try:
            if budget:
                mode, most = model.afford(budget, decode(path))
                tell(f"budget {budget:g} ms: {afforded(model, mode, most)}")
                budget = 0.0
            found = answer(model, path, top, mode, most)
        except DataError as error:
            failed += 1
            tell(error)
            continue
        if rows:
            rows.writerow(
                [
                    found["image"],
                    found["label"],
                    f"{found['probability']:.6f}",
                    *(f"{p:.6f}" for p in found["probs"]),
                ]
            )
        elif form == "json":
            del found["probs"]
            stream.write(json.dumps(found, ensure_ascii=False) + "\n")
        else:
            stream.write(as_text(found, model) + "\n")
    return failed


def parse_budget(text: str) -> float:
    """Parse a time such as 15ms or 0.5s into milliseconds.

    Raises:
        DataError: the text is not a positive number followed by ms or s.
    """
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s)\s*", text)
    value = float(match[1]) * (1000 if match[2] == "s" else 1) if match else 0.0
    if not value > 0:
        raise DataError(
            "not a time for an image", expected="a number with ms or s, such as 15ms", got=text[:40]
        )
    return value


def milliseconds(budget: str, mode: str) -> float:
    """The budget of an image in milliseconds, 0 without one.

    Raises:
        RecipeError: it cannot be read, or there is a mode beside it, which it chooses itself.
    """
    if budget and mode != "full":
        raise RecipeError(
            "a budget chooses the mode", where="--mode", got=mode, fix="give --mode or --budget"
        )
    return parse_budget(budget) if budget else 0.0


def afforded(model: Model, mode: str, most: int) -> str:
    """What `Model.afford` chose, in words, with what the card says of its accuracy."""
    if mode == "full" or model.cascade is None:
        return "every member for every image"
    told = f"at most {len(model.asked_members(most))} of {len(model.members)} members for an image"
    if len(model.caps) < most:
        return told
    accuracy, full, rows = model.caps[most - 1]
    return f"{told}; so {accuracy:.1%} are right in place of {full:.1%} ({rows} rows)"
