"""Out-of-fold and test predictions, assembled from the folds of a run.

Everything here is arithmetic on the jobs' saved probabilities (c, r, k), where c counts the numbers
of views to choose from (1 without a choice).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from threefold.data.dataset import ImageDataset
from threefold.evaluation.optimism import Counts, optimism_entry
from threefold.models.views import view_counts
from threefold.predictions.ledger import FIT, SCORE, SELECT, TEACH
from threefold.predictions.multilabel import AnyPredictions, MultilabelPredictions
from threefold.predictions.predictions import Predictions
from threefold.predictions.records import VERSION
from threefold.predictions.results_schema import ChosenViews, Optimism
from threefold.recipe.recipe import Job
from threefold.stats.one_standard_error import simplest
from threefold.training.distillation import Distillation
from threefold.training.run import Run, stand_ins

FoldProbs = Mapping[tuple[str, int], Mapping[str, np.ndarray]]
"""The arrays of probs.npz by member and fold."""


def assemble(run: Run) -> None:
    """Write oof.npz, test.npz, the mean of the folds, and views.json.

    oof.npz covers every training row once, or with `folds.scheme = "holdout"` the rows held out.

    Raises:
        RunError: a fold has no member.
    """
    fold_probs = _read(run)
    oof, test = _out_of_fold(run, fold_probs), _on_test(run, fold_probs)
    fold_roles = roles_by_fold(run)
    if run.recipe.views.choose:
        oof, test = _choose_views(run, oof, test, fold_roles.owner)  # there are several folds
    train = run.sources.train
    if oof is not None:
        run.folder.write_predictions(
            _record(
                run,
                oof[0],
                train.subset(run.scored),
                kind="oof",
                folds=fold_roles.owner[run.scored],
                roles=fold_roles.roles[:, run.scored],
                protocol="taught" if fold_roles.taught else run.recipe.protocol,
            )
        )
    if test is not None and run.sources.test is not None:
        protocol = run.recipe.protocol
        run.folder.write_predictions(
            _record(run, test[0], run.sources.test, kind="test", protocol=protocol)
        )
    # From now on a job folder of another run is noticed, too.
    run.folder.record_new(f"{job.path}/done.json" for job in run.jobs)
    backbones = sorted((run.dir / "backbones").glob("*.json"))
    run.folder.record_new(path.relative_to(run.dir).as_posix() for path in backbones)


def _record(run: Run, probs: np.ndarray, images: ImageDataset, **others: Any) -> AnyPredictions:
    """Return the members' probabilities (m, n, k) of some images, with what is true of them.

    Args:
        run: the run.
        probs: (m, n, k).
        images: whose they are.
        **others: further fields of the record.
    """
    shared = {
        "probs": probs,
        "ids": images.ids,
        "classes": images.classes,
        "members": tuple(m.name for m in run.recipe.members),
        "groups": images.groups,
        **others,
    }
    if images.targets is not None:
        return MultilabelPredictions(targets=images.targets, **shared)
    return Predictions(labels=images.labels, **shared)


@dataclass(frozen=True, eq=False)
class FoldRoles:
    """What each fold's networks do with each training row.

    Attributes:
        owner: (n,) the fold that scores the row, or -1.
        roles: (f, n) int8, sums of the ledger's FIT, SELECT, SCORE and TEACH.
    """

    owner: np.ndarray
    roles: np.ndarray

    @property
    def taught(self) -> bool:
        """Whether a student scores a row whose label its teachers learned from."""
        return any(
            bool((roles[self.owner == fold] & TEACH).any()) for fold, roles in enumerate(self.roles)
        )


def roles_by_fold(run: Run) -> FoldRoles:
    """The roles of all training rows in every fold, teachers included."""
    folds = {fold: roles for fold, roles in run.roles.items() if fold >= 0}
    owner = np.full(len(run.sources.train), -1)
    table = np.zeros((len(folds), len(owner)), np.int8)
    distillation = Distillation.from_run(run)
    # A linear head on a frozen backbone is fitted anew on both, once select rows chose its penalty.
    refitted = run.recipe.protocol == "honest" and any(
        run.recipe.is_frozen(member.name) and member.head.is_linear for member in run.recipe.members
    )
    for fold, roles in folds.items():
        owner[roles.score] = fold
        if refitted:
            table[fold, roles.select] += FIT
        for rows, bit in ((roles.fit, FIT), (roles.select, SELECT), (roles.score, SCORE)):
            table[fold, rows] += bit
        if distillation is not None:
            table[fold] += TEACH * distillation.targets(fold).seen
    return FoldRoles(owner, table)


def _read(run: Run) -> FoldProbs:
    """Saved probabilities of every member in each of its folds."""
    fold_probs = {}
    for member in run.recipe.members:
        for fold in run.roles:
            if not member.folds or fold in member.folds:
                job = run.last_job(member.name, fold)
                fold_probs[member.name, fold] = run.folder.job_probs(job, run.roles[fold].score)
    return fold_probs


def _members_of_fold(run: Run, fold: int, fold_probs: FoldProbs, kind: str) -> np.ndarray:
    """Every member's probabilities (c, m, r, k) in a fold; absent members get stand-ins."""
    names = [m.name for m in run.recipe.members]
    weights = stand_ins(run.recipe, fold)
    present = [j for j, name in enumerate(names) if (name, fold) in fold_probs]
    stacked = np.stack([fold_probs[names[j], fold][kind] for j in present])
    if len(present) == len(names):
        return stacked.swapaxes(0, 1)
    return np.asarray(np.einsum("ij,jcrk->cirk", weights[:, present], stacked), np.float32)


def _out_of_fold(run: Run, fold_probs: FoldProbs) -> np.ndarray | None:
    """Probabilities (c, m, r, k) of the scored rows by the fold that scores them, if there are any.

    The score rows of the folds are a partition of `run.scored`, which `assign_roles` checks.
    """
    probs = None
    for fold, roles in run.roles.items():
        if fold < 0 or not len(roles.score):
            continue
        part = _members_of_fold(run, fold, fold_probs, "score")
        if probs is None:
            c, m, _, k = part.shape
            probs = np.full((c, m, len(run.scored), k), np.nan, np.float32)
        probs[:, :, np.searchsorted(run.scored, roles.score)] = part
    return probs


def _on_test(run: Run, fold_probs: FoldProbs) -> np.ndarray | None:
    """Probabilities (c, m, n, k) of the test rows: the mean of the folds, or the refitted model."""
    if run.sources.test is None:
        return None
    parts = [_members_of_fold(run, fold, fold_probs, "test") for fold in run.final_folds]
    return np.asarray(np.mean(parts, axis=0, dtype=np.float32))


def _choose_views(
    run: Run, oof: np.ndarray | None, test: np.ndarray | None, owner: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Choose the fewest views within one standard error of the best; write views.json.

    Candidates are compared by the mean over the members. Each fold's rows are answered with the
    views that the other folds' rows choose, so that out-of-fold scores stay honest; new images get
    the views that all rows choose. Without folds, the test rows choose, as in the authors' code.

    Args:
        run: the run.
        oof: (c, m, n, k), or None without folds.
        test: (c, m, n, k), or None without test rows.
        owner: (n,) the fold of each training row.

    Returns:
        Both with the chosen views only, (1, m, n, k).
    """
    counts = view_counts(run.recipe.views)
    combined = [i for i, m in enumerate(run.recipe.members) if m.name in run.recipe.combined]
    data, probs = (run.sources.train, oof) if oof is not None else (run.sources.test, test)
    assert data is not None
    assert probs is not None
    correct = probs[:, combined].mean(1).argmax(-1) == data.labels
    final = simplest(list(correct))
    crossed, optimism = None, []
    if oof is not None:
        crossed = np.empty_like(oof[:1])
        for fold in np.unique(owner):
            mine = owner == fold
            chosen = simplest(list(correct[:, ~mine])).chosen
            crossed[:, :, mine] = oof[chosen][:, mine]
        honest = crossed[0, combined].mean(0).argmax(-1) == data.labels
        entry = optimism_entry(
            "views",
            f"the number of views, {counts[final.chosen]}",
            Counts.from_hits(correct[final.chosen]),
            Counts.from_hits(honest),
            data.groups,
            rows=("oof rows", "oof rows, cross-fitted"),
        )
        optimism = [entry]
    accuracies = zip(counts, correct.mean(1), strict=True)
    run.folder.write_views(
        ChosenViews(
            version=VERSION,
            views=counts[final.chosen],
            chosen_on="out-of-fold rows" if oof is not None else "the scored rows",
            accuracy={count: float(accuracy) for count, accuracy in accuracies},
            best=counts[final.best],
            standard_error=final.error,
            optimism=tuple(optimism),
        )
    )
    return crossed, test[[final.chosen]] if test is not None else None


def choices_optimism(run: Run) -> list[Optimism]:
    """Entries of the optimism meter for the checkpoints, stages and views of a finished run.

    There are none under `paper`, where scores are apparent, or in a run of a version that kept no
    choices. Select rows and score rows are other images in each fold, so a difference is that of
    two samples, both resampled.

    Raises:
        RunError: a record of choices is missing or damaged.
    """
    if run.recipe.protocol == "paper" or roles_by_fold(run).taught:
        return []
    # The jobs' own lists are asked: a file that is lost must be missed, not passed over.
    if not all(run.folder.job_wrote(job, "choice.npz") for job in run.jobs):
        return []
    entries = [_checkpoint_entry(run)]
    if any(len(run.recipe.stages_of(m.name)) > 1 for m in run.recipe.members):
        entries.append(_stage_entry(run))
    views = run.folder.chosen_views if run.recipe.views.choose else None
    if views is not None:
        entries += views.optimism
    return entries


def _count(run: Run, *, last: bool) -> tuple[Counts, Counts]:
    """Correct answers by image, over members: on select rows and on score rows.

    Args:
        run: a finished run.
        last: after the members' last stage, else after their first.
    """
    n = len(run.sources.train)
    select, score = (Counts(np.zeros(n), np.zeros(n)) for _ in range(2))
    for member in run.recipe.members:
        stage = run.recipe.stages_of(member.name)[-1 if last else 0]
        for fold, roles in run.roles.items():
            if fold < 0 or (member.folds and fold not in member.folds):
                continue
            job = Job(member.name, fold, stage.name)
            arrays = run.folder.read_job_arrays(job, "choice.npz")
            select.right[roles.select] += arrays["select"]
            select.answers[roles.select] += 1
            score.right[roles.score] += arrays["score"]
            score.answers[roles.score] += 1
    return select, score


def _checkpoint_entry(run: Run) -> Optimism:
    select, score = _count(run, last=True)
    return optimism_entry(
        "checkpoint",
        "the best epoch and stage of every network",
        select,
        score,
        run.sources.train.groups,
        rows=("select rows", "score rows"),
    )


def _stage_entry(run: Run) -> Optimism:
    """Compare what later stages gain on select rows with what they gain on score rows.

    The apparent accuracy is that of the first stage on the score rows plus the select rows' gain.
    """
    select, score = _count(run, last=True)
    select_first, score_first = _count(run, last=False)
    scale = score.answers.sum() / select.answers.sum()
    gain = scale * (select.right - select_first.right)
    return optimism_entry(
        "stage",
        "which later stages to keep",
        Counts(score_first.right + gain, score.answers),
        score,
        run.sources.train.groups,
        rows=("select rows", "score rows"),
    )
