"""Distillation: the soft targets of a student, and the comparison with its teacher.

A teacher's probabilities for row i come from networks that did not see row i. That is not enough
for an honest score: those networks learned from other rows, and if a scored row is among them, its
label reaches the student through the probabilities of its neighbours. So the teachers of a fold are
trained anew without the fold's score rows (in `distill.inner` folds), or the score counts as
apparent. `SoftTargets.seen` records whose labels the targets contain; the ledger compares it with
the rows that are scored.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from threefold.data.dataset import ImageDataset, Sources
from threefold.errors import DamagedFileError, RunError
from threefold.evaluation.compare import compare_members
from threefold.evaluation.evaluate import evaluate
from threefold.files import sha256
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import (
    AnswerCost,
    Comparison,
    DistillationResults,
    DistillTable,
    FoldTargets,
    Score,
    ShortScore,
    Teacher,
)
from threefold.recipe.recipe import Recipe, fold_name
from threefold.recipe.schema import DistillSpec
from threefold.training.run import Run

TEACHERS_FOLDER: Final = "teachers"
"""In the run folder of a student: the runs of its teachers, by fold."""


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """A teacher's probabilities for one fold of the student.

    Attributes:
        rows: (r,) row numbers of the student's training images, ascending.
        probs: (r, k) float32, calibrated, by networks and an ensemble that did not see the row.
        seen: (n,) booleans, the rows whose labels any part of the teacher learned from.
        summary: method, temperature, accuracy on the rows, seconds, and `key`, what they depend on.
    """

    rows: np.ndarray
    probs: np.ndarray
    seen: np.ndarray
    summary: dict[str, Any]

    def probs_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the probabilities (len(rows), k) of some rows.

        Raises:
            RunError: there are none for one of them.
        """
        index = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        missing = self.rows[index] != rows
        if missing.any():
            raise RunError(
                "the teacher has no answer",
                where=f"row {rows[missing][0]}",
                expected=f"{len(rows)} rows",
            )
        return self.probs[index]


class TeacherAnswers(NamedTuple):
    """An ensemble's probabilities on its run's out-of-fold rows."""

    predictions: Predictions
    """Of the members, with ids and labels."""
    probs: np.ndarray
    """(n, k), cross-fitted and calibrated."""
    summary: dict[str, Any]
    """Method, temperature, accuracy."""


@dataclass(frozen=True)
class Distillation:
    """The teachers of a run whose recipe has a `distill` table."""

    run: Run
    spec: DistillSpec

    @classmethod
    def from_run(cls, run: Run) -> Distillation | None:
        """The distillation of a run; None if all its members learn from labels."""
        return cls(run, run.recipe.distill) if run.recipe.distill is not None else None

    @cached_property
    def teacher(self) -> Run:
        """The teacher's run, checked to be complete, honest, and of the same images.

        Raises:
            RunError: it is not.
        """
        teacher = open_teacher(self.spec.run)
        self._check_images(teacher, "training", self.run.sources.train, teacher.folder.oof)
        self._check_images(teacher, "test", self.run.sources.test, teacher.folder.test)
        return teacher

    def _check_images(
        self, teacher: Run, kind: str, images: ImageDataset | None, rows: Predictions | None
    ) -> None:
        if images is None and rows is None:
            return
        if (
            images is not None
            and rows is not None
            and images.ids == rows.ids
            and tuple(images.classes) == rows.classes
            and np.array_equal(images.labels, rows.labels)
        ):
            return
        count = len(rows) if rows is not None else 0
        raise RunError(
            f"the student's {kind} images are not those of its teacher",
            where=teacher.dir,
            expected=f"{count} images with the same names, labels and classes",
            got=f"{len(images) if images is not None else 0} images",
            fix="restore the images, or train the teacher's run again",
        )

    def prepare(self, train: Callable[[Run], None]) -> None:
        """Write the soft targets of every fold that has none yet.

        Args:
            train: runs the jobs of a run and writes its out-of-fold predictions.

        Raises:
            RunError: no score of the student would be honest, or the teacher cannot be used.
        """
        if not self.spec.inner and self.run.sources.test is None:
            raise RunError(
                "no row would be left for an honest score of the student",
                where="distill.inner = 0",
                got=f"no test images in {self.spec.run}, whose networks learned from all others",
                fix="set distill.inner = 2, which trains teachers without each fold's score rows",
            )
        for fold in self.run.roles:
            if not self.path(fold).exists():
                self._write_targets(fold, train)
            self.targets(fold)

    def path(self, fold: int) -> Path:
        """The file of a fold's soft targets."""
        return self.run.dir / self.file(fold)

    @staticmethod
    def file(fold: int) -> str:
        """Name of that file in the run folder."""
        return f"targets/{fold_name(fold)}.npz"

    def targets(self, fold: int) -> SoftTargets:
        """Read the soft targets of a fold.

        Raises:
            RunError: they are missing, or come from another teacher.
        """
        path = self.path(fold)
        fix = f"delete {path} and run `{self.run.folder.train_command()}`, which writes it again"
        try:
            arrays = self.run.folder.read_arrays(self.file(fold))
            summary = json.loads(str(arrays["summary"]))
            saved, key = summary["key"], self._key(fold)
        except DamagedFileError as error:
            raise error.with_fix(fix) from None
        except (KeyError, ValueError, TypeError) as error:
            raise DamagedFileError(
                "the file is damaged", where=path, got=type(error).__name__, fix=fix
            ) from None
        if not key["oof"]:  # the teacher's run may have been deleted since
            key["oof"] = saved["oof"]
        if saved != key:
            raise RunError(
                "the targets come from another teacher, or it was trained again",
                where=path,
                got=f"targets from {saved['run']}",
                fix="choose another --out, or delete the folder",
            )
        return SoftTargets(arrays["rows"], arrays["probs"], arrays["seen"], summary)

    def _write_targets(self, fold: int, train: Callable[[Run], None]) -> None:
        began, teacher = time.monotonic(), self.teacher
        nested = self.nested_run(fold)
        if nested is None:
            answers = teacher_answers(teacher, teacher.results.chosen)
        else:
            self.run.watcher.note(
                f"{fold_name(fold)}: training its teachers, {len(teacher.recipe.members)} members "
                f"in {self.spec.inner} folds, without its {len(self.run.roles[fold].score):,} "
                "score rows"
            )
            train(nested)
            answers = teacher_answers(nested)
        row_of = {name: row for row, name in enumerate(self.run.sources.train.ids)}
        rows = np.array([row_of[name] for name in answers.predictions.ids])
        order = np.argsort(rows)
        # Each fold of the teacher misses some rows, but together with the ensemble and its
        # temperature they have seen all of them.
        seen = np.zeros(len(row_of), bool)
        seen[rows] = True
        seconds = time.monotonic() - began
        summary = {**answers.summary, "key": self._key(fold), "seconds": seconds}
        self.run.folder.write_arrays(
            self.file(fold),
            rows=rows[order],
            probs=answers.probs[order].astype(np.float32),
            seen=seen,
            summary=np.array(json.dumps(summary)),
        )
        if nested is not None:
            # Only their predictions are needed from here on.
            nested.folder.forget(list(nested.folder.manifest))
            shutil.rmtree(nested.dir / "jobs")
            shutil.rmtree(nested.dir / "backbones", ignore_errors=True)

    def nested_run(self, fold: int) -> Run | None:
        """Return a run of the teacher's recipe without a fold's score rows; None = not needed."""
        if fold < 0 or not self.spec.inner:
            return None
        images = self.run.sources.train
        rows = np.setdiff1d(np.arange(len(images)), self.run.roles[fold].score)
        recipe = _nested_recipe(self.teacher, self.spec.inner, fold)
        folder = self.run.dir / TEACHERS_FOLDER / fold_name(fold)
        sources = Sources(images.subset(rows), None, (), ())
        nested = Run.create(recipe, folder, self.run.watcher, sources=sources)
        if recipe.pseudo_labels is not None:
            # Compared with all labelled images, of which the nested run has only some.
            nested.all_sources = replace(sources, unlabelled=self.teacher.unlabelled)
        return nested

    def _key(self, fold: int) -> dict[str, Any]:
        """What the targets of a fold depend on, besides the images."""
        oof = Path(self.spec.run) / "oof.npz"
        return {
            "run": self.spec.run,
            "oof": sha256(oof) if oof.exists() else "",
            "fold": fold,
            "inner": self.spec.inner if fold >= 0 else 0,
        }


def open_teacher(folder: str | Path) -> Run:
    """Open a run that can teach: complete, honest, and not a student itself.

    Raises:
        RunError: there is no run, it is not complete, or its answers are not out of fold.
    """
    run = Run.open(folder)
    run.folder.check_finished("the teacher's run is not complete")
    if run.recipe.protocol == "paper":
        raise RunError(
            "a run of protocol paper cannot teach",
            where=run.dir,
            got="checkpoints chosen on the rows that they answer, or on the test rows",
            fix="train it with --set protocol=honest",
        )
    if run.recipe.data.task == "multilabel":
        raise RunError(
            "a run with any number of labels per image cannot teach",
            where=run.dir,
            expected="one class for each image",
            fix="train the student on the images: threefold fit DATA --members NAME",
        )
    if run.recipe.distill is not None:
        raise RunError(
            "a student cannot teach",
            where=run.dir,
            got="answers that depend on its own teacher's",
            fix=f"use its teacher, {run.recipe.distill.run}",
        )
    if run.recipe.folds.scheme == "holdout":
        raise RunError(
            "the run has out-of-fold predictions of a part of its images only",
            where=run.dir,
            got="folds.scheme = holdout",
            fix="train it with --set folds.scheme=stratified",
        )
    oof = run.folder.oof
    if oof is None or oof.roles is None:
        raise RunError(
            "the run has no out-of-fold predictions that record the rows each fold saw",
            where=run.dir,
            expected="oof.npz with roles",
            fix="train it again with this version",
        )
    run.folder.check_recipe()
    return run


def teacher_answers(run: Run, method: str | None = None) -> TeacherAnswers:
    """Fit a run's ensemble on its out-of-fold predictions.

    Args:
        run: its jobs are done.
        method: the ensemble; None = choose on these rows, as the recipe says.
    """
    oof = run.predictions("oof")
    spec = run.recipe.ensemble.model_copy(update={"members": run.recipe.combined})
    if method is not None:
        spec = spec.model_copy(update={"methods": (method,), "export": method})
    evaluation = evaluate(oof, None, spec, run.recipe.seed, run.recipe.train.metric)
    probs = evaluation.calibration.probs
    summary = {
        "method": evaluation.chosen,
        "temperature": evaluation.calibration.temperature,
        "accuracy": float((probs.argmax(1) == oof.labels).mean()),
    }
    return TeacherAnswers(oof, probs, summary)


def _nested_recipe(teacher: Run, inner: int, fold: int) -> Recipe:
    """The teacher's recipe for fewer rows: `inner` folds, all members, a share of the budget."""
    recipe, folds = teacher.recipe, teacher.folder.info.folds
    scheme = "stratified" if recipe.folds.scheme == "stratified" else "grouped"
    if recipe.folds.scheme == "column" and teacher.sources.train.groups is None:
        scheme = "stratified"
    changes = {"k": inner, "scheme": scheme, "final": "average"}
    return recipe.model_copy(
        update={
            "name": f"{recipe.name[:60]}-without-{fold_name(fold)}",
            "budget_minutes": recipe.budget_minutes / folds,
            "data": recipe.data.model_copy(update={"fold_column": ""}),
            "folds": recipe.folds.model_copy(update=changes),
            "members": tuple(m.model_copy(update={"folds": ()}) for m in recipe.members),
        }
    )


def distillation_results(run: Run, scores: Sequence[Score]) -> DistillationResults | None:
    """Compare student, twin and teacher on the same rows; None for a run without a student.

    Args:
        run: a run whose jobs are done.
        scores: its scores, with costs.

    Returns:
        The teacher's summary for each fold, a table for each kind of honest rows (every pair is
        compared, after Holm's correction), and the costs of an answer.
    """
    distillation = Distillation.from_run(run)
    if distillation is None:
        return None
    spec, teacher = distillation.spec, distillation.teacher
    results = teacher.results
    teacher_name = f"{results.chosen} of {teacher.dir.name or 'the run'}"
    members = [name for name in (spec.student, spec.twin) if name]
    tables, costs = [], list[AnswerCost]()
    for rows in (run.folder.all_test, run.folder.oof):
        if rows is None or rows.protocol != "honest":
            continue
        teacher_score = results.score(results.chosen, "ensemble", rows.kind)
        assert teacher_score is not None
        lines = {name: _member_score(scores, name, rows.kind) for name in members}
        lines[teacher_name] = teacher_score
        joined = _with_teacher(rows.select(members), teacher_name, _teacher_probs(teacher, rows))
        tables.append(_table(rows.kind, lines, compare_members(joined)))
        costs = [
            AnswerCost(name=name, parameters=line.parameters or 0, macs=line.macs or 0)
            for name, line in lines.items()
        ]
    return DistillationResults(
        teacher=Teacher(name=teacher_name, method=results.chosen, run=spec.run),
        student=spec.student,
        twin=spec.twin,
        alpha=spec.alpha,
        temperature=spec.temperature,
        inner=spec.inner,
        targets=tuple(_fold_targets(distillation, fold) for fold in run.roles),
        tables=tuple(tables),
        costs=tuple(costs),
    )


def _member_score(scores: Sequence[Score], name: str, rows: str) -> Score:
    return next(s for s in scores if (s.name, s.kind, s.rows) == (name, "member", rows))


def _fold_targets(distillation: Distillation, fold: int) -> FoldTargets:
    summary = distillation.targets(fold).summary
    return FoldTargets(fold=fold, **{key: v for key, v in summary.items() if key != "key"})


def _table(rows: str, lines: dict[str, Score], comparisons: Sequence[Comparison]) -> DistillTable:
    """Scores of student, twin and teacher on one kind of rows, and their comparisons."""
    return DistillTable(
        rows=rows,
        comparisons=tuple(
            c.replace(accuracy_a=lines[c.a].accuracy, accuracy_b=lines[c.b].accuracy)
            for c in comparisons
        ),
        scores=tuple(
            ShortScore(
                name=name,
                accuracy=line.accuracy,
                interval=line.interval,
                log_loss=line.log_loss,
                ece=line.ece,
                n=line.n,
            )
            for name, line in lines.items()
        ),
    )


def _with_teacher(rows: Predictions, name: str, probs: np.ndarray) -> Predictions:
    """The predictions with the teacher as one more member."""
    joined = np.concatenate([rows.probs, probs[None]])
    return replace(rows, probs=joined, members=(*rows.members, name))


def _teacher_probs(teacher: Run, rows: Predictions) -> np.ndarray:
    """The teacher's probabilities (n, k) as they were scored.

    Those on test rows are in its folder, so that its test split is not opened again.
    """
    if rows.kind == "oof":
        return np.asarray(teacher_answers(teacher, teacher.results.chosen).probs, np.float32)
    return np.asarray(teacher.folder.chosen.probs, np.float32)
