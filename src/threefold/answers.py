"""Predictions of an exported file on files, folders and lists, as text, JSON or CSV. Imports no torch."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from threefold.errors import DataError
from threefold.images import IMAGE_SUFFIXES
from threefold.runtime import Model, load


def find_images(sources: Iterable[str], listing: IO[str] | None = None) -> Iterator[Path]:
    """Files as given, every image below folders, and the lines of `listing` for `-`.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    for source in sources:
        path = Path(source)
        if source == "-":
            yield from (Path(line) for text in listing or sys.stdin if (line := text.rstrip("\r\n")))
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
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


def answer(model: Model, path: Path, top: int) -> dict[str, Any]:
    """One image's answer: label, probability, the `top` classes, all probabilities; set and unknown where the file has them.

    Raises:
        DataError: the image cannot be read.
    """
    probs, members = model.explain([path])
    order = np.argsort(-probs[0], kind="stable")[:top]
    return {
        "image": str(path), "label": model.classes[order[0]], "probability": float(probs[0][order[0]]),
        "top": [{"label": model.classes[i], "probability": float(probs[0][i])} for i in order],
        "members": {name: model.classes[int(p.argmax())] for name, p in zip(model.members, members[0], strict=True)},
        "probs": [float(p) for p in probs[0]],
        **({"set": model.sets_of(probs)[0]} if False in model.sets else {}),
        **({"unknown": bool(model.unknown_of(probs)[0])} if model.unknown else {}),
    }  # fmt: skip


def as_text(found: dict[str, Any], model: Model) -> str:
    """An answer in one line: the likeliest classes, the set where the file has sets, and "unknown?" where it is."""
    parts = [f"{found['image']}: " + ", ".join(f"{t['label']} {t['probability']:.1%}" for t in found["top"])]
    if "set" in found:
        parts.append(f"{100 * (1 - model.sets[False].alpha_):.4g}% set {{{', '.join(found['set'])}}}")
    if found.get("unknown"):
        parts.append("unknown?")
    return "; ".join(parts)


def write(
    stream: IO[str],
    tell: Callable[[DataError], object],
    model_path: Path,
    sources: Sequence[str],
    top: int,
    form: str,
) -> int:
    """Answer every image in its order; `tell` is told of unreadable ones, which are counted in the result."""
    model, failed = load(model_path), 0
    rows = csv.writer(stream) if form == "csv" else None
    if rows:
        rows.writerow(["image", "label", "probability", *model.classes])
    for path in find_images(sources):
        try:
            found = answer(model, path, top)
        except DataError as error:
            failed += 1
            tell(error)
            continue
        if rows:
            rows.writerow(
                [found["image"], found["label"], f"{found['probability']:.6f}", *(f"{p:.6f}" for p in found["probs"])]
            )
        elif form == "json":
            del found["probs"]
            stream.write(json.dumps(found, ensure_ascii=False) + "\n")
        else:
            stream.write(as_text(found, model) + "\n")
    return failed
