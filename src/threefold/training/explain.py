"""Why a run answers as it does: heat on the image, and training images that are like it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from threefold.models.gradcam import NoMap, ensemble_cam
from threefold.training.embedding import (
    images_to_embed,
    open_run_features,
    pooled_features,
    pooled_members,
)
from threefold.training.run import Run


class Neighbour(NamedTuple):
    """A training image that is like another image."""

    id: str
    label: str
    """Its class, or all its labels."""
    similarity: float
    """Cosine of the angle between the features, averaged over the backbones."""


def run_heat(run: Run, members: Sequence[str], pixels: np.ndarray, number: int) -> np.ndarray:
    """Compute Grad-CAM of an image, averaged over the networks that answer on new images.

    Args:
        run: a finished run.
        members: names of the members that the ensemble combines.
        pixels: uint8 (h, w, 3).
        number: of the class to explain.

    Returns:
        float32 (h, w) in 0..1; zeros if no backbone has a feature map.

    Raises:
        RunError: weights are missing or damaged.
    """
    num_classes, maps = len(run.folder.info.classes), []
    for fold in run.final_folds:
        specs = [
            spec
            for spec in run.recipe.members
            if spec.name in members and (fold < 0 or not spec.folds or fold in spec.folds)
        ]
        if not specs:
            continue
        networks = [run.load_member(spec, fold, num_classes) for spec in specs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoMap)  # such a backbone contributes no heat
            heat = ensemble_cam(
                networks,
                pixels[None],
                [number],
                sizes=[spec.img_size for spec in specs],
                resizes=[spec.resize for spec in specs],
            )
        maps.append(heat[0])
    mean = np.asarray(np.mean(maps, axis=0, dtype=np.float32))
    return mean / max(float(mean.max()), 1e-12)


def similar_images(
    run: Run, path: Path, count: int, members: Sequence[str] = ()
) -> list[Neighbour]:
    """Find the training images whose features are most like those of an image.

    The features are those of the members' backbones before any training on these images.

    Args:
        run: a run whose images are there.
        path: the image.
        count: how many to return, at most.
        members: names of members whose backbones count; empty = those that ensembles combine.

    Raises:
        DataError: an image cannot be read.
        RecipeError: pretrained weights are not available.
        RunError: the features do not fit into memory.
    """
    train = run.sources.train
    cache = open_run_features(run, replace(run.sources, unlabelled=images_to_embed([path])))
    specs = pooled_members(run.recipe, members)
    similarity = np.zeros(len(train))
    for known, one in zip(
        pooled_features(cache, specs), pooled_features(cache, specs, "unlabelled"), strict=True
    ):
        similarity += cosines(known, one[0]) / len(specs)
    order = np.argsort(-similarity, kind="stable")[:count]
    return [
        Neighbour(
            train.ids[i], ", ".join(train.label_names(int(i))) or "no label", float(similarity[i])
        )
        for i in order
    ]


def cosines(rows: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return the cosine of the angle between each of some rows (n, d) and a vector (d,)."""
    vector: np.ndarray = one.astype(np.float32)
    vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    similarity = np.zeros(len(rows), np.float32)
    for begin in range(0, len(rows), 4096):  # float32 takes twice the memory of what is cached
        part = rows[begin : begin + 4096].astype(np.float32)
        lengths = np.maximum(np.linalg.norm(part, axis=1), 1e-12)
        similarity[begin : begin + 4096] = part @ vector / lengths
    return similarity
