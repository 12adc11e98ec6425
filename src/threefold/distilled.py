"""What distillation brought: student, twin and teacher on the same rows, every pair tested, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from threefold.compare import compare_members
from threefold.predictions import Predictions
from threefold.predictions__results_schema import (
    AnswerCost,
    Distillation,
    DistillTable,
    FoldTargets,
    Score,
    ShortScore,
    Teacher,
)
from threefold.run import Run
from threefold.teachers import Teaching, answers


def distilled(run: Run, scores: Sequence[Score]) -> Distillation | None:
    """Compare a student with its twin and teacher; None for a run without a student.

    Args:
        run: a run whose jobs are done.
        scores: its scores, with costs.

    Returns:
        A table for each kind of rows that are honest, and the costs of an answer.
    """
    teaching = Teaching.of(run)
    if teaching is None:
        return None
    spec, teacher = teaching.spec, teaching.teacher
    results, names = teacher.results, [name for name in (spec.student, spec.twin) if name]
    teacher_name = f"{results.chosen} of {teacher.dir.name or 'the run'}"
    tables, costs = [], list[AnswerCost]()
    for rows in (run.folder.test, run.folder.oof):
        if rows is None or rows.protocol != "honest":
            continue
        own = {
            name: next(s for s in scores if (s.name, s.kind, s.rows) == (name, "member", rows.kind))
            for name in names
        }
        teacher_score = results.score(results.chosen, "ensemble", rows.kind)
        assert teacher_score is not None
        lines = {**own, teacher_name: teacher_score}
        costs = [
            AnswerCost(name=name, parameters=line.parameters or 0, macs=line.macs or 0)
            for name, line in lines.items()
        ]
        together = _together(rows.select(names), teacher_name, _answers_of(teaching, rows))
        tables.append(
            DistillTable(
                rows=rows.kind,
                comparisons=tuple(
                    c.replace(accuracy_a=lines[c.a].accuracy, accuracy_b=lines[c.b].accuracy)
                    for c in compare_members(together)
                ),
                scores=tuple(_short(name, line) for name, line in lines.items()),
            )
        )
    return Distillation(
        teacher=Teacher(name=teacher_name, method=results.chosen, run=spec.run),
        student=spec.student,
        twin=spec.twin,
        alpha=spec.alpha,
        temperature=spec.temperature,
        inner=spec.inner,
        targets=tuple(_fold_targets(teaching, fold) for fold in run.roles),
        tables=tuple(tables),
        costs=tuple(costs),
    )


def _short(name: str, score: Score) -> ShortScore:
    return ShortScore(
        name=name,
        accuracy=score.accuracy,
        interval=score.interval,
        log_loss=score.log_loss,
        ece=score.ece,
        n=score.n,
    )


def _fold_targets(teaching: Teaching, fold: int) -> FoldTargets:
    """What taught one fold."""
    values = {key: v for key, v in teaching.targets(fold).told.items() if key != "key"}
    return FoldTargets(fold=fold, **values)


def _together(rows: Predictions, name: str, probs: np.ndarray) -> Predictions:
    """The members with the teacher as one more."""
    return replace(
        rows, probs=np.concatenate([rows.probs, probs[None]]), members=(*rows.members, name)
    )


def _answers_of(teaching: Teaching, rows: Predictions) -> np.ndarray:
    """The teacher's answers (n, k) on some rows, as it was scored on them: the run's own test answers, not opened again."""
    if rows.kind == "oof":
        return np.asarray(answers(teaching.teacher, teaching.teacher.results.chosen)[1], np.float32)
    return np.asarray(teaching.teacher.folder.chosen().probs, np.float32)
