"""Pseudo labels: what a fold's own networks say about unlabelled images, for members to learn from.

Lee 2013, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural
Networks"; with probabilities as targets Xie et al. 2020, "Self-training with Noisy Student improves
ImageNet classification", arXiv:1911.04252.

An ensemble that is fitted on out-of-fold rows has seen the labels of the rows that a fold scores,
and so have the networks of other folds. So in each fold the plain mean of that fold's networks
answers. A linear head on a frozen backbone answers with the weights that it has from the fit rows
alone, so that select rows, too, are new to what learns from it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from threefold.errors import RunError, shorten
from threefold.files import one_at_a_time
from threefold.models.pipeline import Predictor, pick_device
from threefold.predictions.ledger import Ledger
from threefold.predictions.results_schema import LedgerLine, PseudoLabelCounts
from threefold.recipe.recipe import fold_name
from threefold.recipe.schema import PseudoLabelSpec
from threefold.training.features.cache import FeatureCache
from threefold.training.features.heads import START_FILE, HeadNetwork, head_probs
from threefold.training.pixel_cache import PixelCache
from threefold.training.predict import predict_images
from threefold.training.run import Run

CHUNK: Final = 1024
"""Unlabelled images whose pixels are in memory at a time."""


class Caches(NamedTuple):
    """What a run has computed of its images."""

    pixels: PixelCache
    features: FeatureCache


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """The unlabelled images that a fold learns from.

    Attributes:
        rows: (u,) numbers of the images, ascending.
        probs: (u, k) float32, what the fold's networks say about them.
        spec: the `pseudo_labels` table.
    """

    rows: np.ndarray
    probs: np.ndarray
    spec: PseudoLabelSpec

    @property
    def labels(self) -> np.ndarray:
        """The most likely class of each image, (u,) int64."""
        return np.asarray(self.probs.argmax(1))

    @property
    def targets(self) -> np.ndarray:
        """What is learned of each image, (u, k) float32: its probabilities, or its class."""
        if self.spec.targets == "soft":
            return self.probs
        return np.asarray(np.eye(self.probs.shape[1], dtype=np.float32)[self.labels])

    def targets_after(self, labels: np.ndarray, copies: int = 0) -> np.ndarray:
        """Return the targets of labelled rows and of these images, weighted, for a stage.

        Args:
            labels: (n,) class numbers of the labelled rows.
            copies: how often the images are repeated after themselves.

        Returns:
            (n + u * (copies + 1), k) float32; a row sums to its weight.
        """
        weighted = np.tile(self.spec.weight * self.targets, (copies + 1, 1))
        one_hot = np.eye(self.probs.shape[1], dtype=np.float32)[labels]
        return np.concatenate([one_hot, weighted]).astype(np.float32)


def find_pseudo_labels(run: Run, member: str, fold: int, caches: Caches) -> PseudoLabels | None:
    """Return the pseudo labels of a fold, which its networks give when they are first needed.

    Args:
        run: the members before the first that learns from them are trained.
        member: the member that is to learn from them.
        fold: the fold, or -1 for the refit.
        caches: of the run's images.

    Returns:
        None for a member that learns from labels only, or if no network is sure of any image.

    Raises:
        RunError: they come from other networks or images than the run has now.
    """
    if not run.recipe.uses_pseudo_labels(member):
        return None
    spec = run.recipe.pseudo_labels
    assert spec is not None
    lock = _path(run, fold).with_name(f".{fold_name(fold)}.lock")
    with one_at_a_time(lock):  # of two members of the fold
        return _find(run, fold, spec, caches)


def _find(run: Run, fold: int, spec: PseudoLabelSpec, caches: Caches) -> PseudoLabels | None:
    """Read the pseudo labels of a fold, or let its networks give them."""
    path, key = _path(run, fold), _key(run, fold)
    if path.exists():
        arrays = _load(run, fold)
        if json.loads(str(arrays["summary"]))["key"] != key:
            raise RunError(
                "the pseudo labels come from other networks, or the unlabelled images have changed",
                where=path,
                fix="restore the images, or choose another --out",
            )
        return _chosen(arrays["rows"], arrays["probs"], spec)
    names = _teachers(run, fold)
    answers = np.stack([_answer(run, name, fold, caches) for name in names])
    probs: np.ndarray = answers.mean(0, dtype=np.float32)
    rows = np.flatnonzero(probs.max(1) >= spec.threshold)
    classes = run.sources.train.classes
    counts = np.bincount(probs[rows].argmax(1), minlength=len(classes))
    summary = {
        "fold": fold,
        "teachers": names,
        "images": len(probs),
        "used": len(rows),
        "classes": dict(zip(classes, counts.tolist(), strict=True)),
        "key": key,
    }
    run.folder.write_arrays(
        _file(fold), rows=rows, probs=probs, summary=np.array(json.dumps(summary))
    )
    run.watcher.note(_describe(_counts(summary)))
    return _chosen(rows, probs, spec)


def pseudo_label_counts(run: Run) -> tuple[PseudoLabelCounts, ...]:
    """Count the pseudo labels of each fold of a trained run; none where it has no such table."""
    if run.recipe.pseudo_labels is None:
        return ()
    folds = [fold for fold in run.roles if run.folder.has(_file(fold))]
    arrays = [_load(run, fold) for fold in folds]
    return tuple(_counts(json.loads(str(array["summary"]))) for array in arrays)


def pseudo_label_ledger(run: Run) -> list[LedgerLine]:
    """Declare what the networks that gave pseudo labels have seen, and what their fold scores.

    Raises:
        DataError: they have seen a row that is scored.
    """
    ledger = Ledger(len(run.sources.train), "oof")
    for counts in pseudo_label_counts(run):
        roles = run.roles[counts.fold]
        rows = np.arange(len(run.sources.train))
        seen = np.isin(rows, np.concatenate([roles.fit, roles.select]))
        ledger.declare(_describe(counts), seen, np.isin(rows, roles.score))
    return ledger.table()


def _describe(counts: PseudoLabelCounts) -> str:
    """Say how many images a fold learns from, and their classes."""
    classes = ", ".join(f"{name} {count:,}" for name, count in counts.classes.items())
    return (
        f"pseudo labels of {fold_name(counts.fold)} by {shorten(counts.teachers)}: "
        f"{counts.used:,} of {counts.images:,} unlabelled images ({classes})"
    )


def _counts(summary: dict[str, Any]) -> PseudoLabelCounts:
    return PseudoLabelCounts(**{name: v for name, v in summary.items() if name != "key"})


def _path(run: Run, fold: int) -> Path:
    return run.dir / _file(fold)


def _file(fold: int) -> str:
    """Name of a fold's file in the run folder."""
    return f"pseudo_labels/{fold_name(fold)}.npz"


def _load(run: Run, fold: int) -> dict[str, np.ndarray]:
    """Read a fold's file; where it is damaged, those who learned from it are trained again."""
    names = [m.name for m in run.recipe.members if run.recipe.uses_pseudo_labels(m.name)]
    jobs = [str(run.dir / "jobs" / name / fold_name(fold)) for name in names]
    deletions = " and ".join([str(_path(run, fold)), *jobs])
    fix = f"delete {deletions} and run `{run.folder.train_command()}`"
    return run.folder.read_arrays(_file(fold), fix)


def _chosen(rows: np.ndarray, probs: np.ndarray, spec: PseudoLabelSpec) -> PseudoLabels | None:
    """The images `rows` (u,) with their answers among those of all images, probs (n, k)."""
    return PseudoLabels(rows, probs[rows], spec) if len(rows) else None


def _teachers(run: Run, fold: int) -> list[str]:
    """The members that answer unlabelled images in a fold."""
    members = map(run.recipe.member, run.recipe.teachers)
    return [m.name for m in members if not m.folds or fold in m.folds]


def _key(run: Run, fold: int) -> dict[str, Any]:
    """What the pseudo labels of a fold depend on: weights and images."""
    weights = {}
    for name in _teachers(run, fold):
        files = run.folder.job_record(run.last_job(name, fold)).files
        weights[name] = files.get(START_FILE, files["weights.safetensors"])
    return {"images": run.unlabelled_digest, "weights": weights}


def _answer(run: Run, name: str, fold: int, caches: Caches) -> np.ndarray:
    """What a member's network of a fold says about all unlabelled images, (n, k) float32."""
    spec, job = run.recipe.member(name), run.last_job(name, fold)
    rows, num_classes = np.arange(len(run.unlabelled)), len(run.sources.train.classes)
    if run.recipe.is_frozen(name):
        backbone = caches.features.backbone(spec)
        network = HeadNetwork(run.load_job(job, num_classes, START_FILE, backbone).head)
        return head_probs(network, caches.features.rows("unlabelled", spec, rows).features)
    member = run.load_member(spec, fold, num_classes)
    member.to(device=pick_device(run.recipe.train.device))
    predictor = Predictor(member.to(memory_format=torch.channels_last))
    parts = np.array_split(rows, max(1, len(rows) // CHUNK))
    answers = [
        predict_images(predictor, caches.pixels.rows("unlabelled", spec, part).pixels)
        for part in parts
    ]
    return np.concatenate(answers)
