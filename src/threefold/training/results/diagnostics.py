"""What a run reports about its own data: suspect labels, copies of images, and pictures of errors.

Nothing is edited, moved or left out: suspects are listed in a CSV file and shown in the report,
and copies and groups only give warnings.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, NamedTuple

import numpy as np
import torch

from threefold.data.dataset import ImageDataset
from threefold.data.leakage import (
    NEAR,
    NEAR_COPIES,
    Duplicate,
    Duplicates,
    describe_guessed_groups,
    duplicate_warnings,
    find_duplicates,
    guess_group_pattern,
)
from threefold.errors import DamagedFileError
from threefold.evaluation.evaluate import Evaluation
from threefold.evaluation.label_errors import (
    LISTED,
    Suspect,
    list_suspects,
    summarize_audit,
    write_suspects,
)
from threefold.evaluation.multilabel import MultilabelEvaluation
from threefold.json_files import json_bytes, read_json
from threefold.machine import decoding_threads
from threefold.models.gradcam import NoMap, ensemble_cam
from threefold.models.pipeline import to_pixels
from threefold.predictions.predictions import Predictions
from threefold.predictions.records import DuplicatesRecord, seal
from threefold.predictions.results_schema import Audit, Copies, CopyPair
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import AugmentSpec, MemberSpec
from threefold.stats.scores import confusions
from threefold.training.pixel_cache import PixelCache
from threefold.training.results.out_of_fold import roles_by_fold
from threefold.training.run import Run
from threefold.training.squares import SquareForm, resize_images
from threefold.training.steps.augment import Augment
from threefold.training.truth import row_losses

SIDE: Final = 96
"""Width and height of a thumbnail in pixels."""

MAX_MISTAKES: Final = 24
"""Confident mistakes in the report."""

MAX_PAIRS: Final = 6
"""Confused pairs of classes in the report."""

MAX_PER_PAIR: Final = 4
"""Images of each confused pair."""

MAX_SUSPECTS: Final = 24
"""Suspect labels in the report."""


class CopySearch(NamedTuple):
    """Equal and near-equal images across all rows, and what was not searched for."""

    duplicates: Duplicates
    note: str = ""


class DataDiagnostics(NamedTuple):
    """What a run reports about its images before any is scored."""

    augmented: np.ndarray
    """uint8 (r, h, w, 3), a few training images as the first network sees them."""
    copies: CopySearch


def inspect_data(run: Run, cache: PixelCache) -> DataDiagnostics:
    """Draw augmented training images, and search for copies."""
    return DataDiagnostics(_augmented_images(run, cache), _find_copies(run, cache))


def _augments(recipe: Recipe) -> bool:
    """Whether any network or head learns from images that are changed at random."""
    learns = bool(recipe.features.copies) or not all(
        recipe.is_frozen(member.name) for member in recipe.members
    )
    return learns and recipe.augment != AugmentSpec()


def _augmented_images(run: Run, cache: PixelCache, count: int = 16) -> np.ndarray:
    """Return some training images after random changes; none if no network sees such images."""
    if not _augments(run.recipe):
        return np.zeros((0, 1, 1, 3), np.uint8)
    spec = next(m for m in run.recipe.members if not m.joins)
    rows = np.linspace(0, len(run.sources.train) - 1, count).astype(int)
    images = to_pixels(cache.rows("train", spec, rows).pixels[:], torch.device("cpu"))
    generator = torch.Generator().manual_seed(run.recipe.seed)
    images = Augment(run.recipe.augment)(images, generator).round().clamp(0, 255)
    return images.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def _find_copies(run: Run, cache: PixelCache) -> CopySearch:
    """Search for copies and write duplicates.json, or read the search of an interrupted run."""
    path = run.dir / "duplicates.json"
    if path.exists():
        with suppress(DamagedFileError):  # then they are searched for again
            run.folder.verify(path.name)
            record = DuplicatesRecord.parse(read_json(path), path)
            pairs = [Duplicate(**pair.model_dump()) for pair in record.pairs]
            return CopySearch(Duplicates(pairs, record.count), record.note)
    search = _search_copies(run, cache)
    tree = {
        "count": search.duplicates.total,
        "pairs": [pair._asdict() for pair in search.duplicates.pairs],
        "note": search.note,
    }
    run.folder.write_file(path.name, json_bytes(seal(tree)))
    return search


def _search_copies(run: Run, cache: PixelCache) -> CopySearch:
    train, test = run.sources.train, run.sources.test
    count = len(train) + (len(test) if test is not None else 0)
    note, distance = "", NEAR
    if count > NEAR_COPIES:
        note = f"near copies are not searched for among more than {NEAR_COPIES:,} images"
        distance = 0.0
    spec = next(m for m in run.recipe.members if not m.joins)
    parts = [f"fold {fold}" for fold in roles_by_fold(run).owner] + ["test"] * (count - len(train))
    ids, truth = list(train.ids), train.truth
    squares = [cache.rows("train", spec, np.arange(len(train))).pixels]
    if test is not None:
        ids, truth = [*ids, *test.ids], np.concatenate([truth, test.truth])
        squares.append(cache.rows("test", spec, np.arange(len(test))).pixels)
    images = (image for part in squares for image in part)
    # Equal sets of labels have one number.
    labels = np.unique(truth, axis=0, return_inverse=True)[1].reshape(len(ids))
    return CopySearch(find_duplicates(images, ids, labels, parts, distance=distance), note)


def audit_run(
    run: Run, rows: Predictions | None, probs: np.ndarray, copies: CopySearch
) -> tuple[Audit, list[Suspect]]:
    """Find suspect labels and write suspects.csv.

    Args:
        run: a run whose jobs are done.
        rows: its out-of-fold predictions, or None.
        probs: (n, k) the chosen ensemble's probabilities on them, cross-fitted.
        copies: the copies among its images.

    Returns:
        The `audit` key of results.json, and the suspects, the most suspect first.
    """
    suspects: list[Suspect] = []
    if rows is not None and rows.kind == "oof" and rows.protocol == "honest":
        suspects, missing = list_suspects(rows, probs)
    else:
        missing = "the audit needs out-of-fold rows of the honest protocol; this run has none"
    if not missing:
        with run.folder.recording("suspects.csv") as path:
            write_suspects(path, suspects)
    listed = tuple(CopyPair(**pair._asdict()) for pair in copies.duplicates.pairs[:LISTED])
    audit = summarize_audit(suspects, missing).replace(
        file="" if missing else "suspects.csv",
        warnings=tuple(data_warnings(run, copies)),
        duplicates=Copies(total=copies.duplicates.total, pairs=listed),
    )
    return audit, suspects


def data_warnings(run: Run, copies: CopySearch) -> list[str]:
    """Warn about copies of images, and about names that look like groups."""
    notes = _group_warnings(run)
    found = duplicate_warnings(copies.duplicates)
    notes += [f"{warning.message}; duplicates.json lists all" for warning in found]
    return [*notes, copies.note] if copies.note else notes


def _group_warnings(run: Run) -> list[str]:
    """Ask about groups if file names look like groups that the folds do not keep together."""
    if run.sources.train.groups is not None:
        return []
    ids = run.sources.train.ids
    pattern = guess_group_pattern(ids)
    return [describe_guessed_groups(ids, pattern)[0]] if pattern else []


def make_thumbnails(
    run: Run, evaluation: Evaluation, suspects: Sequence[Suspect]
) -> dict[str, np.ndarray]:
    """Make the pictures of a run's report.

    Args:
        run: a run whose jobs are done.
        evaluation: its chosen ensemble, with the rows and probabilities of the headline score.
        suspects: suspect labels, the most suspect first.

    Returns:
        Arrays for thumbs.npz: images uint8 (r, 96, 96, 3) with ids and classes, for confident
        mistakes (with Grad-CAM maps), confused pairs of classes, and suspects.
    """
    rows = evaluation.rows
    wrong = np.flatnonzero(evaluation.probs.argmax(1) != rows.labels)
    worst = wrong[np.argsort(-evaluation.probs[wrong].max(1), kind="stable")]
    mistakes = worst[:MAX_MISTAKES]
    row_of = {name: row for row, name in enumerate(run.sources.train.ids)}
    shown = [suspect.id for suspect in suspects[:MAX_SUSPECTS] if suspect.id in row_of]
    return {
        "ids": _names([rows.ids[row] for row in mistakes]),
        "images": _small(run, _dataset(run, rows.kind), mistakes),
        "cams": _cams(run, evaluation, mistakes),
        "suspect_ids": _names(shown),
        "suspect_images": _small(run, run.sources.train, [row_of[name] for name in shown]),
        **_confused_pairs(run, evaluation, worst),
    }


def make_label_thumbnails(run: Run, evaluation: MultilabelEvaluation) -> dict[str, np.ndarray]:
    """Make the pictures of the images that got a label too few or too many, the worst first.

    Args:
        run: a run whose jobs are done.
        evaluation: its chosen ensemble, with the answers on the rows of the headline score.

    Returns:
        Arrays for thumbs.npz: images uint8 (r, 96, 96, 3) with ids.
    """
    rows, targets = evaluation.rows, evaluation.rows.targets
    wrong = np.flatnonzero((evaluation.decided != targets).any(1))
    losses = row_losses(np.clip(evaluation.probs[wrong], 1e-7, 1 - 1e-7), targets[wrong])
    worst = wrong[np.argsort(-losses, kind="stable")][:MAX_MISTAKES]
    return {
        "ids": _names([rows.ids[row] for row in worst]),
        "images": _small(run, _dataset(run, rows.kind), worst),
    }


def _confused_pairs(run: Run, evaluation: Evaluation, worst: np.ndarray) -> dict[str, np.ndarray]:
    """Images of the most confused pairs of classes, the most confident mistakes of each."""
    labels, answers = evaluation.rows.labels, evaluation.probs.argmax(1)
    found = confusions(evaluation.probs, labels)
    rows: list[int] = []
    for true, answer in zip(found.labels[:MAX_PAIRS], found.answers[:MAX_PAIRS], strict=True):
        pair = [row for row in worst if labels[row] == true and answers[row] == answer]
        rows += pair[:MAX_PER_PAIR]
    index = np.array(rows, int)
    return {
        "pair_ids": _names([evaluation.rows.ids[row] for row in index]),
        "pair_images": _small(run, _dataset(run, evaluation.rows.kind), index),
        "pair_true": labels[index],
        "pair_answer": answers[index],
    }


def _cams(run: Run, evaluation: Evaluation, rows: np.ndarray) -> np.ndarray:
    """Grad-CAM (r, 96, 96) uint8 of the wrong answers, averaged over the combined members.

    The networks have not seen the rows: those of a row's fold, or of the first final fold for test
    rows.
    """
    maps = np.zeros((len(rows), SIDE, SIDE), np.uint8)
    folds = evaluation.rows.folds
    if folds is None:
        folds = np.full(len(evaluation.rows), run.final_folds[0])
    answers = evaluation.probs.argmax(1)
    for fold in np.unique(folds[rows]):
        mine = np.flatnonzero(folds[rows] == fold)
        images = _small(run, _dataset(run, evaluation.rows.kind), rows[mine])
        specs = _combined_members(run, evaluation, int(fold))
        classes = len(evaluation.rows.classes)
        networks = [run.load_member(spec, int(fold), classes) for spec in specs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoMap)  # such a backbone contributes no heat
            heat = ensemble_cam(
                networks,
                images,
                answers[rows[mine]],
                sizes=[spec.img_size for spec in specs],
                resizes=[spec.resize for spec in specs],
            )
        maps[mine] = np.round(255 * heat).astype(np.uint8)
    return maps


def _combined_members(run: Run, evaluation: Evaluation, fold: int) -> list[MemberSpec]:
    """The combined members that have a network in the fold."""
    return [
        spec
        for spec in run.recipe.members
        if spec.name in evaluation.combined and (fold < 0 or not spec.folds or fold in spec.folds)
    ]


def _dataset(run: Run, kind: str) -> ImageDataset:
    """The images of the rows of oof.npz or test.npz."""
    if kind != "test":
        return run.sources.train.subset(run.scored)
    assert run.sources.test is not None
    return run.sources.test


def _small(run: Run, dataset: ImageDataset, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Thumbnails uint8 (r, 96, 96, 3) of some images."""
    # Of large photographs there are squares that a network has read.
    form = SquareForm(max(SIDE, run.recipe.members[0].img_size), "squash")
    with ThreadPoolExecutor(decoding_threads()) as pool:
        squares = run.squares.read(dataset, [int(row) for row in rows], [form], pool)[form]
    return resize_images(list(squares), SIDE, "squash")


def _names(names: Sequence[str]) -> np.ndarray:
    return np.array(names, dtype=np.str_)
