"""The verb `distill`: a finished run's ensemble teaches one small network, beside a twin that learns from labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from threefold import workflow
from threefold.errors import RecipeError
from threefold.predictions__run_folder import RunFolder
from threefold.recipe import Recipe
from threefold.recipe_schema import MemberSpec
from threefold.run import Run
from threefold.training__distillation import open_teacher
from threefold.training__watcher import Watcher

STUDENT, TWIN = "student", "student-labels"
"""Names of the two members of the run that `distill` makes."""


def distill(
    run: str | Path,
    student: str,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    watcher: Watcher | None = None,
) -> Run:
    """Train one network on a finished run's out-of-fold ensemble probabilities, and its twin on labels; score, export, report.

    The result is a run like any other (resumable; `report`, `export`, `compare`, `serve` work on it) whose results.json has
    the comparison under `distill`.

    Args:
        run: the folder of the finished run that teaches.
        student: a member of that run, to be trained again with its head, or a timm name (a linear head).
        out: the new run folder (default: beside the run, named after both).
        overrides: `a.b=c` changes to the student's recipe, such as distill.alpha=0.9 or members.student.img_size=64.
        watcher: told how it goes on.

    Raises:
        RunError: the run cannot teach, or its images have changed.
        RecipeError: the student is unknown, or an override cannot be used.
    """
    teacher = open_teacher(run)
    recipe = student_recipe(teacher, str(run), student, overrides)
    target = Path(out) if out is not None else default_folder(run, student)
    # An unknown student is an error before teachers are trained.
    Run(RunFolder(target, recipe)).build(recipe.members[0], 2, pretrained=True)
    trained = workflow.train(
        recipe, target, watcher, f"made by threefold distill {run} --student {student}"
    )
    workflow.finish(trained)
    _note_bytes(trained, teacher)
    return trained


def _note_bytes(run: Run, teacher: Run) -> None:
    """Add the sizes of both exported files to results.json, where there are two."""
    distillation = run.results.distill
    assert distillation is not None
    folders = {distillation.student: run.dir, distillation.teacher.name: teacher.dir}
    costs = []
    for cost in distillation.costs:
        path = folders[cost.name] / "model.onnx" if cost.name in folders else None
        if path is not None and path.is_file():
            costs.append(cost.replace(bytes=path.stat().st_size))
        else:
            costs.append(cost)
    distillation = distillation.replace(costs=tuple(costs))
    run.folder.write_results(run.results.replace(distill=distillation))


def default_folder(run: str | Path, student: str) -> Path:
    """Where `distill` puts a student if it is not told: beside the run, named after both."""
    folder = Path(run).resolve()
    return folder.parent / f"{folder.name}-{re.sub(r'[^A-Za-z0-9_.-]', '-', student)}"


def student_recipe(teacher: Run, run: str, student: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a student and its twin: the teacher's data, folds, augmentation and training, one refitted network each.

    `distill.inner` is 0 where the run has test images, which then carry the honest scores, else 2.

    Raises:
        RecipeError: the student is no member and no timm name is left, or an override cannot be used.
    """
    recipe = teacher.recipe
    tree: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
    like = next((m for m in recipe.members if m.name == student), None)
    if like is not None and like.joins:
        raise RecipeError(
            "a member that joins others is no student",
            got=student,
            fix="name a member with a backbone of its own, or a timm network",
        )
    first = next(m for m in recipe.members if not m.joins)
    spec = like or MemberSpec(
        name=STUDENT, backbone=student, img_size=first.img_size, resize=first.resize
    )
    stages = recipe.stages_of((like or first).name)
    tree |= {
        "name": f"{recipe.name[:60]}-student",
        "budget_minutes": 0.0,
        "folds": tree["folds"] | {"final": "refit"},
        "views": {},
        "ensemble": tree["ensemble"]
        | {"methods": ["mean"], "export": "mean", "members": [STUDENT], "top": 0},
        "stages": [s.model_dump(mode="json") | {"members": []} for s in stages],
        "members": [spec.model_dump(mode="json") | {"name": STUDENT, "folds": []}],
        "distill": {
            "run": run,
            "student": STUDENT,
            "inner": 2 if teacher.folder.test is None else 0,
        },
    }
    alone = Recipe.parse(tree, overrides, where="the student's recipe")
    tree = alone.model_dump(mode="json", exclude_none=True)
    tree["members"] += [m | {"name": TWIN} for m in tree["members"] if m["name"] == STUDENT]
    tree["distill"]["twin"] = TWIN
    return Recipe.parse(tree, where="the student's recipe")
