"""Students of a run with probes: their head is a member of its own, and they learn in the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.frozen_runs import PROBE, frozen_tree

from threefold.errors import RecipeError
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe
from threefold.training.run import Run
from threefold.training.student_recipe import student_recipe

HEAD = {"name": "head", "kind": "head", "members": ["probe"]}
TUNE = {"name": "tune", "epochs": 2, "lr": 1e-3}
TUNED = {"name": "tuned", "starts_from": "probe", "img_size": 40}


def teacher_of(folder: Path, **changes: Any) -> Run:
    return Run(RunFolder(folder, Recipe.parse(frozen_tree(folder / "images", **changes))))


@pytest.mark.parametrize("student", ["probe", "tuned", "test_efficientnet"])
def test_a_student_starts_from_a_head_as_the_members_do(tmp_path: Path, student: str) -> None:
    teacher = teacher_of(tmp_path, members=[PROBE, TUNED], stages=[HEAD, TUNE])

    recipe = student_recipe(teacher, "teacher", student)

    assert [(m.name, m.starts_from) for m in recipe.members] == [
        ("student-head", ""),
        ("student", "student-head"),
        ("student-labels", "student-head"),
    ]
    stages = {m.name: [s.kind for s in recipe.stages_of(m.name)] for m in recipe.members}
    assert stages == {"student-head": ["head"], "student": ["tune"], "student-labels": ["tune"]}
    assert recipe.combined == ("student",)
    assert recipe.member("student").img_size == (40 if student == "tuned" else 32)
    assert Recipe.parse(recipe.model_dump(mode="json", exclude_none=True)) == recipe


def test_a_member_with_both_kinds_of_stage_is_split(tmp_path: Path) -> None:
    stages = [{**HEAD, "members": []}, TUNE]
    teacher = teacher_of(tmp_path, members=[PROBE], stages=stages)

    recipe = student_recipe(teacher, "teacher", "probe")

    assert [s.name for s in recipe.stages_of("student")] == ["tune"]
    assert recipe.member("student").starts_from == "student-head"


def test_a_run_of_heads_alone_has_no_stages_for_a_student(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path)

    with pytest.raises(RecipeError, match=r"tunes no network.*expected a stage of kind tune"):
        student_recipe(teacher, "teacher", "probe")


def test_a_student_with_a_head_stage_is_refused(tmp_path: Path) -> None:
    tree = frozen_tree(tmp_path, members=[PROBE], distill={"run": "x", "student": "probe"})

    with pytest.raises(RecipeError, match=r"head learns from labels only.*let starts_from name it"):
        Recipe.parse(tree)
