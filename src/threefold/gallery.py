"""The pictures of a run's report, small, in thumbs.npz: confident mistakes with heat maps, confused pairs, suspects."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image

from threefold.audit import Suspect
from threefold.evaluate import Evaluation
from threefold.gradcam import NoMap, ensemble_cam
from threefold.recipe_schema import MemberSpec
from threefold.run import Run
from threefold.stats import confusion_matrix

SIDE: Final = 96
"""Pixels of a small picture's side."""

MISTAKES: Final = 24
"""Most confident mistakes that are shown."""

PAIRS: Final = 6
"""Confused pairs of classes that are shown, each with up to PER_PAIR images."""

PER_PAIR: Final = 4

SUSPECTS: Final = 24
"""Suspect labels that are shown."""


def pictures(run: Run, found: Evaluation, suspects: Sequence[Suspect]) -> dict[str, np.ndarray]:
    """Arrays for thumbs.npz: images uint8 (r, 96, 96, 3) and what they show."""
    wrong = np.flatnonzero(found.probs.argmax(1) != found.rows.labels)
    worst = wrong[np.argsort(-found.probs[wrong].max(1), kind="stable")]
    rows = worst[:MISTAKES]
    arrays = {
        "ids": _names([found.rows.ids[row] for row in rows]),
        "images": _small(run, found.rows.kind, rows),
        "cams": _cams(run, found, rows),
    }
    at = {name: row for row, name in enumerate(run.sources.train.ids)}
    shown = [suspect.id for suspect in suspects[:SUSPECTS] if suspect.id in at]
    arrays["suspect_ids"] = _names(shown)
    arrays["suspect_images"] = _small(run, "oof", np.array([at[name] for name in shown], int))
    return {**arrays, **_pairs(run, found, worst)}


def _pairs(run: Run, found: Evaluation, worst: np.ndarray) -> dict[str, np.ndarray]:
    """Images of the most confused pairs (true class, answer), the most confident mistakes of each."""
    counts = confusion_matrix(found.probs, found.rows.labels)
    np.fill_diagonal(counts, 0)
    answers, rows = found.probs.argmax(1), []
    for cell in np.argsort(-counts, axis=None, kind="stable")[:PAIRS]:
        true, answer = divmod(int(cell), len(counts))
        rows += [row for row in worst if found.rows.labels[row] == true and answers[row] == answer][
            :PER_PAIR
        ]
    index = np.array(rows, int)
    return {
        "pair_ids": _names([found.rows.ids[row] for row in index]),
        "pair_images": _small(run, found.rows.kind, index),
        "pair_true": found.rows.labels[index],
        "pair_answer": answers[index],
    }


def _cams(run: Run, found: Evaluation, rows: np.ndarray) -> np.ndarray:
    """Grad-CAM (r, 96, 96) uint8 of the wrong answers, averaged over the combined members.

    A row is explained by networks that have not seen it: those of its fold, or for test rows those of the first fold.
    """
    heat = np.zeros((len(rows), SIDE, SIDE), np.uint8)
    folds = (
        found.rows.folds
        if found.rows.folds is not None
        else np.full(len(found.rows), run.final_folds[0])
    )
    answers = found.probs.argmax(1)
    for fold in np.unique(folds[rows]):
        mine = np.flatnonzero(folds[rows] == fold)
        images = _small(run, found.rows.kind, rows[mine])
        specs = _specs(run, found, int(fold))
        nets = [run.load_member(spec, int(fold), len(found.rows.classes)) for spec in specs]
        sizes, resizes = [spec.img_size for spec in specs], [spec.resize for spec in specs]
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", NoMap
            )  # a backbone without a map leaves the picture without heat
            maps = ensemble_cam(nets, images, answers[rows[mine]], sizes=sizes, resizes=resizes)
        heat[mine] = np.round(255 * maps).astype(np.uint8)
    return heat


def _specs(run: Run, found: Evaluation, fold: int) -> list[MemberSpec]:
    """The combined members that have a network in the fold."""
    here = (m for m in run.recipe.members if fold < 0 or not m.folds or fold in m.folds)
    return [spec for spec in here if spec.name in found.combined]


def _small(run: Run, kind: str, rows: np.ndarray) -> np.ndarray:
    """Pictures uint8 (r, 96, 96, 3) of rows of the training or test images."""
    dataset = run.sources.test if kind == "test" else run.sources.train
    assert dataset is not None
    images = [
        Image.fromarray(dataset.pixels(int(row))).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        for row in rows
    ]
    return (
        np.stack([np.asarray(image) for image in images])
        if images
        else np.zeros((0, SIDE, SIDE, 3), np.uint8)
    )


def _names(names: Sequence[str]) -> np.ndarray:
    return np.array(names, dtype=np.str_)
