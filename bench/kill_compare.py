"""What bench/kill.py compares: the files of a trial, but for what says when, where or how fast."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from threefold.files import sha256
from threefold.predictions.records import CHECKSUM

TIMES: Final = frozenset(
    ("seconds", "created", "images_per_second", "latency", "at", "path", CHECKSUM)
)
"""Keys of JSON files that say when, where or how fast, and the checksum of all keys."""
HASHES: Final = ("done.json", "manifest.json")
"""Files of hashes, among them those of files with times."""


def without_times(tree: Any) -> Any:
    """Leave out of plain values what says when, where or how fast."""
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in TIMES}
    if isinstance(tree, list):
        return [without_times(value) for value in tree]
    return tree


def hash_arrays(path: Path) -> str:
    """SHA-256 of the arrays of a file, with their names, types and shapes.

    A text may be JSON that says how long something took, as in the answers of a teacher.
    """
    digest = hashlib.sha256()
    with np.load(path) as arrays:
        for name in sorted(arrays.files):
            array = arrays[name]
            content = array.tobytes()
            if array.dtype.kind == "U" and array.ndim == 0:
                with suppress(ValueError):
                    tree = without_times(json.loads(str(array)))
                    content = json.dumps(tree, sort_keys=True).encode()
            digest.update(f"{name} {array.dtype.kind} {array.shape} ".encode() + content)
    return digest.hexdigest()


def hashes(trial: Path) -> dict[str, str]:
    """SHA-256 of what a trial has made, but for caches and what only says when."""
    found = {}
    for path in sorted(trial.rglob("*")):
        name = path.relative_to(trial).as_posix()
        if not path.is_file() or name.startswith("cache/") or path.name.endswith(".lock"):
            continue
        if path.suffix == ".npz":
            found[name] = hash_arrays(path)
        elif path.suffix in (".safetensors", ".onnx", ".csv", ".jsonl", ".parquet"):
            found[name] = sha256(path)
        elif path.suffix == ".json" and path.name not in HASHES:
            text = json.dumps(without_times(json.loads(path.read_text())), sort_keys=True)
            found[name] = hashlib.sha256(text.encode()).hexdigest()
        else:  # recipes, reports and hashes are there, or not
            found[name] = "there"
    return found


def leftovers(trial: Path) -> Iterator[str]:
    """Temporary files, and states to resume from that nothing needs any more."""
    for path in trial.rglob("*"):
        if path.suffix in (".tmp", ".part", ".parts") or path.name == ".resume":
            yield path.relative_to(trial).as_posix()
