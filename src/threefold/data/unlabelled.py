"""Unlabelled images for pseudo labels: read, verified, and different from all labelled ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.images import check_hashed, map_in_threads
from threefold.data.leakage import NEAR, NEAR_COPIES, find_duplicates
from threefold.data.unchanged import DIGEST
from threefold.data.verified import note_misleading_names
from threefold.data.walk import LeftOut, describe_left_out, walk_images
from threefold.errors import DataError, shorten
from threefold.machine import decoding_threads
from threefold.names import count_of


def with_unlabelled(sources: Sources, root: str, bad_images: Literal["fail", "skip"]) -> Sources:
    """Add a folder of unlabelled images to the labelled ones.

    Folders and names in it mean nothing. An image with the pixels of a training or test image is
    refused, whatever its name and format: its label, or its score, would no longer be held out.
    Images that look nearly the same as a labelled one are noted, among at most 20,000 images.

    Args:
        sources: the labelled images.
        root: the folder of the others, which may have subfolders.
        bad_images: what to do with files that cannot be read: stop, or skip and record them.

    Raises:
        DataError: there is no such folder, it has no image that can be read, an image cannot be
            used, or one is also a labelled image.
    """
    folder = Path(root).expanduser()
    fix = "correct pseudo_labels.images"
    if not os.path.isdir(folder):
        raise DataError("there is no such folder of unlabelled images", where=root, fix=fix)
    left_out: list[LeftOut] = []
    files = walk_images(folder, left_out)
    checked = map_in_threads(lambda at: check_hashed(files[at]), len(files), decoding_threads())
    bad, digest_of = [], {}
    for path, (image, digest) in zip(files, checked, strict=True):
        digest_of[path] = digest[:DIGEST]
        if image is not None:
            bad.append(image)
    if bad and bad_images == "fail":
        raise DataError(
            f"{len(bad)} of {len(files)} unlabelled images cannot be used",
            got=shorten(f"{image.path} ({image.reason})" for image in bad),
            fix='repair, rename or remove them, or set data.bad_images = "skip"',
        )
    skipped = tuple(image for image in bad if not image.readable)
    unreadable = {image.path for image in skipped}
    files = [path for path in files if path not in unreadable]
    if not files:
        raise DataError("there are no unlabelled images that can be read", where=root, fix=fix)
    names = sorted((path.relative_to(folder).as_posix(), path) for path in files)
    unlabelled = ImageDataset(
        images=tuple(path for _, path in names),
        labels=np.full(len(names), -1),
        ids=tuple(name for name, _ in names),
        classes=sources.train.classes,
        digests=np.array([digest_of[path] for _, path in names], f"S{DIGEST}"),
    )
    notes = [f"{count_of(len(names), 'unlabelled image')} for pseudo labels"]
    notes += [f"beside them: {note}" for note in describe_left_out(left_out)]
    notes += note_misleading_names(bad)
    notes += _compare(sources, unlabelled, root)
    return replace(
        sources,
        unlabelled=unlabelled,
        notes=(*sources.notes, *notes),
        skipped=(*sources.skipped, *skipped),
    )


def _compare(sources: Sources, unlabelled: ImageDataset, root: str) -> list[str]:
    """Refuse unlabelled images that are labelled ones, too, and note those that look like one."""
    labelled = [part for part in (sources.train, sources.test) if part is not None]
    parts = [*labelled, unlabelled]
    names = [name for part in parts for name in part.ids]
    is_unlabelled = np.arange(len(names)) >= len(names) - len(unlabelled)
    found = find_duplicates(
        _pixels(parts),
        names,
        parts=is_unlabelled,
        distance=NEAR if len(names) <= NEAR_COPIES else 0.0,
        limit=len(names) + 10_000,  # all equal pairs, of which there are fewer than images
    )
    across = [pair for pair in found.pairs if not pair.same_part]
    equal = sorted({pair.b: pair.a for pair in across if pair.distance == 0}.items())
    if equal:
        raise DataError(
            "unlabelled images are training or test images, too",
            where=root,
            expected="none",
            got=f"{len(equal)} of {len(unlabelled)}: "
            f"{shorten(f'{name} = {other}' for name, other in equal)}",
            fix="remove them from this folder",
        )
    near = sorted({pair.b: pair.a for pair in across}.items())
    if not near:
        return []
    return [
        count_of(len(near), "unlabelled image looks", "unlabelled images look")
        + " nearly the same as a training or test image, which need not be copies; look at them: "
        + shorten(f"{a} = {b}" for a, b in near)
    ]


def _pixels(parts: list[ImageDataset]) -> Iterator[np.ndarray]:
    for part in parts:
        for row in range(len(part)):
            yield part.pixels(row)
