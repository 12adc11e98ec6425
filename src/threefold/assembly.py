"""The folds of a run put together: out-of-fold and test predictions, the choice of views, members that are not in every fold.

Everything here is arithmetic on the jobs' saved probabilities (c, r, k), where c counts the numbers of views that can be
chosen from (one, where nothing is to be chosen).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from threefold.choice import simplest
from threefold.files import read_arrays
from threefold.ledger import FIT, SCORE, SELECT, TEACH
from threefold.models__views import view_counts
from threefold.optimism import Counts, optimism_entry
from threefold.predictions import Predictions
from threefold.predictions__results_schema import VERSION, ChosenViews, Optimism
from threefold.recipe import Job
from threefold.run import Run, stand_ins
from threefold.teachers import Teaching


def assemble(run: Run) -> None:
    """Write oof.npz, which covers every row once, test.npz, the average of the fold models, and views.json.

    Raises:
        RunError: a fold has no member.
    """
    arrays = _read(run)
    oof, test = _out_of_fold(run, arrays), _on_test(run, arrays)
    owner, roles = who_saw(run)
    if run.recipe.views.choose:
        oof, test = _choose_views(run, oof, test, owner)
    names = tuple(m.name for m in run.recipe.members)
    common: dict[str, Any] = {"classes": run.sources.train.classes, "members": names}
    for kind, data, probs in (("oof", run.sources.train, oof), ("test", run.sources.test, test)):
        if probs is not None and data is not None:
            seen: dict[str, Any] = {"protocol": run.recipe.protocol}
            if kind == "oof":
                seen = {
                    "folds": owner,
                    "roles": roles,
                    "protocol": "taught" if taught(owner, roles) else run.recipe.protocol,
                }
            rows = Predictions(
                probs=probs[0],
                labels=data.labels,
                ids=data.ids,
                groups=data.groups,
                kind=kind,  # type: ignore[arg-type]
                **seen,
                **common,
            )
            run.folder.write_predictions(rows)


def who_saw(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The fold that answers each row (n,), and what each fold's networks do with it (f, n)."""
    folds = {fold: roles for fold, roles in run.roles.items() if fold >= 0}
    owner = np.full(len(run.sources.train), -1)
    table = np.zeros((len(folds), len(owner)), np.int8)
    for fold, roles in folds.items():
        owner[roles.score] = fold
        for rows, bit in ((roles.fit, FIT), (roles.select, SELECT), (roles.score, SCORE)):
            table[fold, rows] += bit
    teaching = Teaching.of(run)
    for fold in folds if teaching is not None else ():
        table[fold] += TEACH * teaching.targets(fold).seen  # type: ignore[union-attr]
    return owner, table


def taught(owner: np.ndarray, roles: np.ndarray) -> bool:
    """Whether a row is answered by a student whose teachers learned from its label."""
    return bool(any((roles[fold, owner == fold] & TEACH).any() for fold in range(len(roles))))


Saved = dict[tuple[str, int], dict[str, np.ndarray]]
"""Arrays of every member and fold."""


def _read(run: Run) -> Saved:
    """Saved probabilities of every member in each of its folds."""
    found = {}
    for member in run.recipe.members:
        for fold in run.roles:
            if not member.folds or fold in member.folds:
                found[member.name, fold] = read_arrays(
                    run.folder.job_folder(run.last_job(member.name, fold)) / "probs.npz"
                )
    return found


def _mixed(run: Run, fold: int, arrays: Saved, which: str) -> np.ndarray:
    """Every member's probabilities (c, m, r, k) in a fold, stand-ins included."""
    names = [m.name for m in run.recipe.members]
    weights = stand_ins(run.recipe, fold)
    there = [j for j, name in enumerate(names) if (name, fold) in arrays]
    stacked = np.stack([arrays[names[j], fold][which] for j in there])
    if len(there) == len(names):
        return stacked.swapaxes(0, 1)
    return np.asarray(np.einsum("ij,jcrk->cirk", weights[:, there], stacked), np.float32)


def _out_of_fold(run: Run, arrays: Saved) -> np.ndarray | None:
    """Probabilities (c, m, n, k) of every training row by the fold that did not see it; None without folds."""
    folds = [fold for fold, roles in run.roles.items() if fold >= 0 and len(roles.score)]
    probs = None
    for fold in folds:
        part = _mixed(run, fold, arrays, "score")
        if probs is None:
            c, m, _, k = part.shape
            probs = np.full((c, m, len(run.sources.train), k), np.nan, np.float32)
        probs[:, :, run.roles[fold].score] = part  # a partition: `assign_roles` has checked it
    return probs


def _on_test(run: Run, arrays: Saved) -> np.ndarray | None:
    """Probabilities (c, m, n, k) of the test rows: the fold models averaged, or the refitted model."""
    if run.sources.test is None:
        return None
    parts = [_mixed(run, fold, arrays, "test") for fold in run.final_folds]
    return np.asarray(np.mean(parts, axis=0, dtype=np.float32))


def _choose_views(
    run: Run, oof: np.ndarray | None, test: np.ndarray | None, owner: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Keep the fewest views within one standard error of the best, by the mean over the members; write views.json.

    A fold's own rows are answered with the views that the other folds' rows choose, so the out-of-fold scores stay
    honest; new images with those that all rows choose. Without folds the test rows choose, as the authors let them.
    """
    counts, members = view_counts(run.recipe.views), list(run.recipe.combined)
    index = [i for i, m in enumerate(run.recipe.members) if m.name in members]
    data, probs = (run.sources.train, oof) if oof is not None else (run.sources.test, test)
    assert data is not None
    assert probs is not None
    hits = probs[:, index].mean(1).argmax(-1) == data.labels
    final = simplest(list(hits))
    kept, line = None, []
    if oof is not None:
        kept = np.empty_like(oof[:1])
        for fold in np.unique(owner):
            mine = owner == fold
            kept[:, :, mine] = oof[simplest(list(hits[:, ~mine])).chosen][:, mine]
        honest = kept[0, index].mean(0).argmax(-1) == data.labels
        told, rows = (
            f"the number of views, {counts[final.chosen]}",
            ("oof rows", "oof rows, cross-fitted"),
        )
        pair = Counts.from_hits(hits[final.chosen]), Counts.from_hits(honest)
        line = [optimism_entry("views", told, *pair, data.groups, rows=rows)]
    accuracy = {count: float(row.mean()) for count, row in zip(counts, hits, strict=True)}
    run.folder.write_views(
        ChosenViews(
            version=VERSION,
            views=counts[final.chosen],
            chosen_on="out-of-fold rows" if oof is not None else "the scored rows",
            accuracy=accuracy,
            best=counts[final.best],
            standard_error=final.error,
            optimism=tuple(line),
        )
    )
    return kept, test[[final.chosen]] if test is not None else None


def choices_optimism(run: Run) -> list[Optimism]:
    """The optimism meter's lines for checkpoints, stages and views of a run whose jobs are done; none under `paper`, or where score rows are apparent.

    Select rows and score rows are other images in each fold, so a difference is that of two samples, both drawn anew.
    """
    jobs = [run.folder.job_folder(job) / "choice.npz" for job in run.jobs]
    if (
        run.recipe.protocol == "paper"
        or not all(path.exists() for path in jobs)
        or taught(*who_saw(run))
    ):
        return []
    lines = [line for line in (_checkpoints(run), _stages(run)) if line]
    views = run.folder.chosen_views if run.recipe.views.choose else None
    return lines + list(views.optimism if views is not None else ())


def _tally(run: Run, last: bool) -> tuple[Counts, Counts]:
    """Right answers of all members on their select rows and score rows, by image; after the last stage or the first."""
    columns = np.zeros((4, len(run.sources.train)))
    for member in run.recipe.members:
        stages = run.recipe.stages_of(member.name)
        for fold, roles in run.roles.items():
            if fold < 0 or (member.folds and fold not in member.folds):
                continue
            job = Job(member.name, fold, stages[-1 if last else 0].name)
            arrays = read_arrays(run.folder.job_folder(job) / "choice.npz")
            for at, rows, hits in (
                (0, roles.select, arrays["select"]),
                (2, roles.score, arrays["score"]),
            ):
                columns[at, rows] += hits
                columns[at + 1, rows] += 1
    return Counts(*columns[:2]), Counts(*columns[2:])


_ROLES = ("select rows", "score rows")


def _checkpoints(run: Run) -> Optimism:
    told = "the best epoch and stage of every network"
    return optimism_entry(
        "checkpoint", told, *_tally(run, last=True), run.sources.train.groups, rows=_ROLES
    )


def _stages(run: Run) -> Optimism | None:
    """What later stages promised on the select rows, added to what the first reached on the score rows, against the truth."""
    if all(len(run.recipe.stages_of(m.name)) < 2 for m in run.recipe.members):
        return None
    (select, score), (select_first, score_first) = _tally(run, last=True), _tally(run, last=False)
    scale = score.answers.sum() / select.answers.sum()
    promised = Counts(
        score_first.right + scale * (select.right - select_first.right), score.answers
    )
    told = "which later stages to keep"
    return optimism_entry("stage", told, promised, score, run.sources.train.groups, rows=_ROLES)
