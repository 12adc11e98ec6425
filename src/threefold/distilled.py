"""What distillation brought: student, twin and teacher on the same rows, every pair tested, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from threefold.compare import pair_members
from threefold.files import read_arrays
from threefold.predictions import Predictions
from threefold.run import Run
from threefold.saved import saved_predictions
from threefold.teachers import Teaching, answers

_FIGURES = ("accuracy", "interval", "log_loss", "ece", "n")


def distilled(run: Run, scores: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The `distill` key of results.json; None for a run without a student.

    Args:
        run: a run whose jobs are done.
        scores: its scores, with costs.

    Returns:
        teacher (name, method, run), alpha, temperature, inner; `targets`, what taught each fold; `tables`, one for each kind of rows
        that are honest: rows, scores (name and figures of teacher, student and twin), comparisons (every pair, under Holm's
        correction); `costs` (name, parameters, macs).
    """
    teaching = Teaching.of(run)
    if teaching is None:
        return None
    spec, teacher = teaching.spec, teaching.teacher
    results, names = teacher.results, [name for name in (spec.student, spec.twin) if name]
    called = f"{results['chosen']} of {teacher.dir.name or 'the run'}"
    oof, test = saved_predictions(run.dir)
    tables, costs = [], {}
    for rows in (test, oof):
        if rows is None or rows.protocol != "honest":
            continue
        beside = next(
            s
            for s in results["scores"]
            if (s["name"], s["kind"], s["rows"]) == (results["chosen"], "ensemble", rows.kind)
        )
        own = [
            next(
                s
                for s in scores
                if (s["name"], s["kind"], s["rows"]) == (name, "member", rows.kind)
            )
            for name in names
        ]
        lines = dict(zip([*names, called], [*own, beside], strict=True))
        costs = {
            name: {key: line[key] for key in ("parameters", "macs")} for name, line in lines.items()
        }
        together = _together(rows.select(names), called, _answers_of(teaching, rows))
        right = {name: line["accuracy"] for name, line in lines.items()}
        tables.append(
            {
                "rows": rows.kind,
                "comparisons": [
                    {**c, "accuracy_a": right[c["a"]], "accuracy_b": right[c["b"]]}
                    for c in pair_members(together)
                ],
                "scores": [
                    {"name": name, **{key: line[key] for key in _FIGURES}}
                    for name, line in lines.items()
                ],
            }
        )
    told = {
        fold: {k: v for k, v in teaching.targets(fold).told.items() if k != "key"}
        for fold in run.roles
    }
    return {
        "teacher": {"name": called, "method": results["chosen"], "run": spec.run},
        "student": spec.student,
        "twin": spec.twin,
        "alpha": spec.alpha,
        "temperature": spec.temperature,
        "inner": spec.inner,
        "targets": [{"fold": fold, **line} for fold, line in told.items()],
        "tables": tables,
        "costs": [{"name": name, **line} for name, line in costs.items()],
    }


def _together(rows: Predictions, name: str, probs: np.ndarray) -> Predictions:
    """The members with the teacher as one more."""
    return replace(
        rows, probs=np.concatenate([rows.probs, probs[None]]), members=(*rows.members, name)
    )


def _answers_of(teaching: Teaching, rows: Predictions) -> np.ndarray:
    """The teacher's answers (n, k) on some rows, as it was scored on them: the run's own test answers, not opened again."""
    if rows.kind == "oof":
        return np.asarray(
            answers(teaching.teacher, teaching.teacher.results["chosen"])[1], np.float32
        )
    return np.asarray(read_arrays(teaching.teacher.dir / "chosen.npz")["probs"], np.float32)
