"""What a student learns from: for every fold, a teacher's probabilities on its rows, and whose labels that teacher has seen.

A teacher's answer on row i comes from networks that did not see row i. That is not enough for an honest score: those
networks learned from other rows, and if a scored row is among them, its label reaches the student through the answers on
its neighbours. So the teachers of a fold are trained anew without the fold's scored rows (`distill.inner` folds of them), or
the score is called apparent. `Targets.seen` says which labels are in the answers; it goes into the roles of the student's
predictions, and the ledger there compares it with the rows that are scored.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from threefold.datasets import ImageDataset, Sources
from threefold.errors import RunError
from threefold.evaluate import evaluate
from threefold.files import read_arrays, sha256, write_arrays
from threefold.predictions import Predictions
from threefold.recipe import Recipe, fold_name
from threefold.recipe_schema import DistillSpec
from threefold.run import Run


@dataclass(frozen=True, eq=False)
class Targets:
    """A teacher's answers for one fold of the student.

    Attributes:
        rows: (r,) row numbers of the student's training images, ascending.
        probs: (r, k) float32, calibrated; each by networks and an ensemble that did not see the row.
        seen: (n,) booleans: the rows whose labels any part of the teacher learned from.
        told: method, temperature, accuracy on the rows, seconds of training.
    """

    rows: np.ndarray
    probs: np.ndarray
    seen: np.ndarray
    told: dict[str, Any]

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The answers (len(rows), k) on some rows.

        Raises:
            RunError: the teacher did not answer one of them.
        """
        at = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        missing = self.rows[at] != rows
        if missing.any():
            raise RunError(
                "the teacher has no answer",
                where=f"row {rows[missing][0]}",
                expected=f"{len(rows)} rows",
            )
        return self.probs[at]


@dataclass(frozen=True)
class Teaching:
    """The teachers of a run that has a `distill` table."""

    run: Run
    spec: DistillSpec

    @classmethod
    def of(cls, run: Run) -> Teaching | None:
        """The teachers of a run, None where all its members learn from labels."""
        return cls(run, run.recipe.distill) if run.recipe.distill is not None else None

    @cached_property
    def teacher(self) -> Run:
        """The run that teaches, checked: finished, honest, and of the same images.

        Raises:
            RunError: it is not.
        """
        teacher = teacher_run(self.spec.run)
        sources = self.run.sources
        for kind, mine, theirs in zip(
            ("training", "test"),
            (sources.train, sources.test),
            (teacher.folder.oof, teacher.folder.test),
            strict=True,
        ):
            if (mine is None) != (theirs is None) or (
                mine is not None and theirs is not None and _differ(mine, theirs)
            ):
                raise RunError(
                    f"the student's {kind} images are not those of the run that teaches",
                    where=teacher.dir,
                    expected=f"{len(theirs) if theirs is not None else 0} images, names, labels and classes as they were",
                    got=f"{len(mine) if mine is not None else 0} images",
                    fix="restore the images, or train the run again",
                )
        return teacher

    def prepare(self, train: Callable[[Run], None]) -> None:
        """Make the targets of every fold, where they are missing; `train` does the jobs of a run and puts them together.

        Raises:
            RunError: no score of the student would be honest, or the run that teaches cannot be used.
        """
        if not self.spec.inner and self.run.sources.test is None:
            raise RunError(
                "no row would be left for an honest score of the student",
                where="distill.inner = 0",
                got=f"no test images in {self.spec.run}, and its networks learned from all others",
                fix="set distill.inner = 2: the teachers of each fold are then trained without its scored rows",
            )
        for fold in self.run.roles:
            if not self.path(fold).exists():
                self._make(fold, train)
            self.targets(fold)

    def path(self, fold: int) -> Path:
        """Where the targets of a fold are kept."""
        return self.run.dir / "targets" / f"{fold_name(fold)}.npz"

    def targets(self, fold: int) -> Targets:
        """The targets of a fold.

        Raises:
            RunError: they are missing, or of another teacher.
        """
        path = self.path(fold)
        if not path.exists():
            raise RunError("a student has no targets", where=path, fix="run the same command again")
        arrays = read_arrays(path)
        told = json.loads(str(arrays["told"]))
        key = self._key(fold)
        if told["key"] != {
            **key,
            "oof": key["oof"] or told["key"]["oof"],
        }:  # the run that taught may be gone by now
            raise RunError(
                "the targets are of another teacher, or it was trained again",
                where=path,
                got=f"made from {told['key']['run']}",
                fix="choose another --out, or delete the folder",
            )
        return Targets(arrays["rows"], arrays["probs"], arrays["seen"], told)

    def _make(self, fold: int, train: Callable[[Run], None]) -> None:
        began, teacher = time.monotonic(), self.teacher
        nested = self._nested(fold)
        if nested is not None:
            n = len(self.run.roles[fold].score)
            self.run.watcher.note(
                f"{fold_name(fold)}: training its teachers, {len(teacher.recipe.members)} members in {self.spec.inner} folds, without the {n:,} rows that it scores"
            )
            train(nested)
            rows, probs, told = answers(nested, None)
        else:
            rows, probs, told = answers(teacher, teacher.results.chosen)
        at = {name: row for row, name in enumerate(self.run.sources.train.ids)}
        numbers = np.array([at[name] for name in rows.ids])
        order, seen = np.argsort(numbers), np.zeros(len(at), bool)
        seen[numbers] = (
            True  # folds of the teacher, its ensemble and its temperature have between them seen every row of it
        )
        told |= {"key": self._key(fold), "seconds": time.monotonic() - began}
        write_arrays(
            self.path(fold),
            rows=numbers[order],
            probs=probs[order].astype(np.float32),
            seen=seen,
            told=np.array(json.dumps(told)),
        )
        if nested is not None:
            shutil.rmtree(nested.dir / "jobs")  # what the networks know is in the targets now

    def _nested(self, fold: int) -> Run | None:
        """The teachers that are trained for one fold: a run of the same recipe on the rows that the fold does not score."""
        if fold < 0 or not self.spec.inner:
            return None
        run, teacher = self.run, self.teacher
        rows = np.setdiff1d(np.arange(len(run.sources.train)), run.roles[fold].score)
        sources = Sources(run.sources.train.subset(rows), None, (), ())
        recipe = _nested_recipe(teacher, self.spec.inner, fold)
        folder = run.dir / "teachers" / fold_name(fold)
        return Run.create(recipe, folder, run.watcher, sources=sources)

    def _key(self, fold: int) -> dict[str, Any]:
        """What the targets of a fold depend on, besides the images."""
        oof = Path(self.spec.run) / "oof.npz"
        inner = self.spec.inner if fold >= 0 else 0
        return {
            "run": self.spec.run,
            "oof": sha256(oof) if oof.exists() else "",
            "fold": fold,
            "inner": inner,
        }


def teacher_run(folder: str | Path) -> Run:
    """A run that can teach: finished, honest, not itself taught.

    Raises:
        RunError: there is no run, it is not finished, or its answers are not out of fold.
    """
    run = Run.open(folder)
    run.folder.check_finished("the run that is to teach is not finished")
    if run.recipe.protocol == "paper":
        raise RunError(
            "a run of protocol paper cannot teach",
            where=run.dir,
            got="checkpoints chosen on the very rows that they answer, or on the test rows",
            fix="train it with --set protocol=honest",
        )
    if run.recipe.distill is not None:
        raise RunError(
            "a student cannot teach",
            where=run.dir,
            got="its answers are not free of its own teacher's",
            fix=f"give the run that taught it, {run.recipe.distill.run}",
        )
    oof = run.folder.oof
    if oof is None or oof.roles is None:
        raise RunError(
            "the run has no out-of-fold answers with the rows that each fold saw",
            where=run.dir,
            expected="oof.npz with roles",
            fix="train it again with this version",
        )
    return run


def answers(run: Run, method: str | None) -> tuple[Predictions, np.ndarray, dict[str, Any]]:
    """The out-of-fold rows of a run and its ensemble's answers on them (n, k), cross-fitted and calibrated.

    Args:
        run: its jobs are done.
        method: the ensemble; None = chosen on these rows, as the recipe says.

    Returns:
        Rows, probabilities, and what there is to tell: method, temperature, accuracy.
    """
    oof = run.predictions("oof")
    spec = run.recipe.ensemble.model_copy(update={"members": run.recipe.combined})
    if method is not None:
        spec = spec.model_copy(update={"methods": (method,), "export": method})
    found = evaluate(oof, None, spec, run.recipe.seed)
    probs = found.calibration.probs
    accuracy = float((probs.argmax(1) == oof.labels).mean())
    told = {
        "method": found.chosen,
        "temperature": found.calibration.temperature,
        "accuracy": accuracy,
    }
    return oof, probs, told


def _nested_recipe(teacher: Run, inner: int, fold: int) -> Recipe:
    """The teacher's recipe for fewer rows: other folds, every member in all of them, its share of the time."""
    recipe, folds = teacher.recipe, teacher.folder.info.folds
    scheme = "stratified" if recipe.folds.scheme == "stratified" else "grouped"
    return recipe.model_copy(
        update={
            "name": f"{recipe.name[:60]}-without-{fold_name(fold)}",
            "budget_minutes": recipe.budget_minutes / folds,
            "folds": recipe.folds.model_copy(
                update={"k": inner, "scheme": scheme, "final": "average"}
            ),
            "members": tuple(m.model_copy(update={"folds": ()}) for m in recipe.members),
        }
    )


def _differ(images: ImageDataset, rows: Predictions) -> bool:
    return (
        images.ids != rows.ids
        or tuple(images.classes) != rows.classes
        or not np.array_equal(images.labels, rows.labels)
    )
