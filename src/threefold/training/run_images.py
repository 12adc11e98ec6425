"""The images that a run began with: their names, labels and contents, so that a change is found.

`images.npz` has them by part (train, test, unlabelled); `run.json` has a digest of each kind. So a
resumed run names the images that were changed, added or removed since, and mixes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

import numpy as np

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.group_file import GROUP_FILE
from threefold.errors import DamagedFileError, RunError, shorten
from threefold.names import count_of
from threefold.training.provenance import data_digest
from threefold.training.run import Run

IMAGES_FILE: Final = "images.npz"
"""Name of the record in the run folder."""

_NAMED: Final = 5
"""Images that a message names of each kind of change."""


def contents_digest(sources: Sources) -> str:
    """SHA-256 of the contents of the training and test images."""
    digest = hashlib.sha256()
    for part in (sources.train, sources.test):
        if part is not None:
            digest.update(part.all_digests().tobytes())
    return digest.hexdigest()


def check_images(run: Run) -> None:
    """Compare the images with those that the run began with, and record them.

    Raises:
        RunError: there are others, or other contents, labels, groups or folds.
    """
    changes = image_changes(run, run.all_sources)
    if changes:
        raise RunError(
            "the images have changed since the run began",
            where=run.dir,
            got="; ".join(changes),
            fix="restore them, or choose another --out",
        )
    arrays = dict(_arrays(run.all_sources))
    if _read(run).keys() != arrays.keys():
        run.folder.write_arrays(IMAGES_FILE, **arrays)
    run.folder.record_new([GROUP_FILE])


def image_changes(run: Run, sources: Sources) -> list[str]:
    """Say in words how images differ from those that a run began with; empty if they do not."""
    before, changes = _read(run), []
    for name, part in _parts(sources):
        if f"{name}_names" in before:
            changes += _differences(name, before, part)
    if changes or not (run.dir / "run.json").exists():
        return changes
    info = run.folder.info
    if info.data != data_digest(sources):
        return [f"{len(sources.train)} training images, other names or labels than before"]
    if info.contents and info.contents != contents_digest(sources):
        return ["images with the same names and other contents"]
    return []


def _parts(sources: Sources) -> Iterator[tuple[str, ImageDataset]]:
    for name in ("train", "test", "unlabelled"):
        part = getattr(sources, name)
        if part is not None:
            yield name, part


def _arrays(sources: Sources) -> Iterator[tuple[str, np.ndarray]]:
    for name, part in _parts(sources):
        yield f"{name}_names", _packed(part.ids)
        yield f"{name}_labels", part.truth
        yield f"{name}_classes", _packed(part.classes)
        yield f"{name}_others", _packed([part.groups, part.folds])
        yield f"{name}_digests", part.all_digests()


def _packed(tree: Any) -> np.ndarray:
    """Return plain values as the bytes of their JSON, which any text survives."""
    return np.frombuffer(json.dumps(tree).encode(), np.uint8)


def _unpacked(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())


def _read(run: Run) -> Mapping[str, np.ndarray]:
    """The record; empty if there is none, or none that can be used, so that it is written anew."""
    if run.folder.has(IMAGES_FILE):
        with suppress(DamagedFileError):
            return run.folder.read_arrays(IMAGES_FILE)
    return {}


def _differences(name: str, before: Mapping[str, np.ndarray], part: ImageDataset) -> list[str]:
    """Say how a part differs from its record."""
    names, classes = _unpacked(before[f"{name}_names"]), _unpacked(before[f"{name}_classes"])
    old = {image: row for row, image in enumerate(names)}
    rows = [(old[image], row) for row, image in enumerate(part.ids) if image in old]
    then, now = np.array(rows, int).reshape(-1, 2).T
    where = {"train": "training", "test": "test", "unlabelled": "unlabelled"}[name]
    present = set(part.ids)
    contents, digests = part.all_digests(), before[f"{name}_digests"]
    labels = before[f"{name}_labels"]
    found = {
        "changed": now[(digests[then] != contents[now]).any(axis=1)],
        "with another label": [
            b
            for a, b in rows
            if _label_names(labels[a], classes) != _label_names(part.truth[b], part.classes)
        ],
    }
    others = _unpacked(before[f"{name}_others"])
    for what, then_values, values in zip(
        ("group", "fold"), others, (part.groups, part.folds), strict=True
    ):
        found[f"with another {what}"] = [
            b for a, b in rows if (then_values and then_values[a]) != (values and values[b])
        ]
    lists = {what: [part.ids[row] for row in numbers] for what, numbers in found.items()}
    lists["added"] = [image for image in part.ids if image not in old]
    lists["missing"] = [image for image in names if image not in present]
    return [
        f"{count_of(len(images), f'{where} image')} {what}: {shorten(images, _NAMED)}"
        for what, images in lists.items()
        if images
    ]


def _label_names(truth: Any, classes: Any) -> list[str]:
    """Return the names of the labels of one image."""
    if np.ndim(truth):
        return [classes[i] for i in np.flatnonzero(truth)]
    return [classes[int(truth)]] if truth >= 0 else []
