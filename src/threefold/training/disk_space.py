"""The disk space that a run's decoded images take, known before any image is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from threefold.data.dataset import Sources
from threefold.errors import RunError
from threefold.machine import free_disk
from threefold.models.views import Views
from threefold.recipe.recipe import Recipe
from threefold.training.pixel_cache import file_name
from threefold.training.run import Run

WORTH_A_NOTE: Final = 10**9
"""Bytes of decoded images from which a run says how much space it takes."""


def image_cache_bytes(recipe: Recipe, sources: Sources) -> dict[str, int]:
    """Return the bytes of each file of decoded images that training writes, by its name.

    Every image of a split is there once for each side in use, as 3 bytes for a pixel. Members whose
    stages all read cached features or activations are not counted, nor is the search for copies.
    """
    rows = {"train": len(sources.train)}
    if sources.test is not None:
        rows["test"] = len(sources.test)
    if sources.unlabelled is not None and recipe.pseudo_labels is not None:
        rows["unlabelled"] = len(sources.unlabelled)
    files: dict[str, int] = {}
    for member in recipe.members:
        stages = [stage for stage in recipe.stages_of(member.name) if stage.reads_images]
        if not stages:
            continue
        canvas = Views(recipe.views, member.img_size, recipe.seed).canvas
        training = {stage.img_size or member.img_size for stage in stages}
        sides = {
            "train": {member.img_size, canvas, *training},
            "test": {canvas},
            "unlabelled": {member.img_size, *training},
        }
        for split, count in rows.items():
            for side in sides[split]:
                files[file_name(split, member, side)] = 3 * side * side * count
    return files


def check_space(run: Run) -> None:
    """Say how much space the decoded images take, and refuse to begin if there is less.

    Raises:
        RunError: the disk of the run folder is too small.
    """
    needed = _missing_bytes(run, image_cache_bytes(run.recipe, run.all_sources))
    free = free_disk(run.dir)
    if needed > free:
        raise RunError(
            "the decoded images do not fit on the disk",
            where=run.dir,
            expected=f"{needed / 1e9:.1f} GB free while it trains",
            got=f"{free / 1e9:.1f} GB",
            fix="free disk space, choose another --out, or set a smaller img_size",
        )
    if needed >= WORTH_A_NOTE:
        run.watcher.note(
            f"decoded images take {needed / 1e9:.1f} GB in {run.pixel_folder} while it trains; "
            f"{free / 1e9:.0f} GB are free"
        )


def _missing_bytes(run: Run, files: Mapping[str, int]) -> int:
    """Return the bytes of the files that an earlier process has not written."""
    return sum(size for name, size in files.items() if not (run.pixel_folder / name).exists())
