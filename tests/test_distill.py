"""The verb distill: a run's ensemble to one network, in one command; bad input is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

import threefold
from threefold.api import default_folder
from threefold.cli.app import app
from threefold.errors import RecipeError
from threefold.evaluation.compare import compare_saved
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe
from threefold.training.run import Run
from threefold.training.student_recipe import student_recipe

runner = CliRunner()

pytestmark = pytest.mark.slow  # training/test_distillation.py has the parts
STUDENT = [
    *("--student", "test_resnet"),
    *("--set", "stages.one.epochs=1"),
    *("--set", "members.student.weights=none"),
]


class Distilled(NamedTuple):
    """A copy of the finished run, its student's folder, and what the command printed."""

    teacher: Path
    student: Path
    output: str


@pytest.fixture(scope="module")
def distilled(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    teacher = tmp_path_factory.mktemp("distill") / "teacher"
    shutil.copytree(finished.dir, teacher)
    done = runner.invoke(app, ["distill", str(teacher), *STUDENT])
    assert done.exit_code == 0, done.output
    return Distilled(teacher, default_folder(teacher, "test_resnet"), done.output)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def openings(run: Path) -> list[str]:
    """Who opened a run's test rows, other than export."""
    entries = read(run / "ledger.json")["test_opened"]
    return [entry["by"] for entry in entries if entry["by"] != "export"]


def test_the_student_is_a_whole_run_beside_its_teacher(distilled: Distilled) -> None:
    folder = distilled.student
    files = {path.name for path in folder.iterdir()}
    costs = read(folder / "results.json")["distill"]["costs"]
    teacher_name = read(folder / "results.json")["distill"]["teacher"]["name"]

    file_sizes = {line["name"]: line.get("bytes") for line in costs}

    assert folder == distilled.teacher.parent / "teacher-test_resnet"
    assert files >= {"results.json", "report.html", "model.onnx", "oof.npz", "test.npz"}
    assert file_sizes["student"] == (folder / "model.onnx").stat().st_size
    assert file_sizes[teacher_name] == (distilled.teacher / "model.onnx").stat().st_size


@pytest.mark.parametrize(
    "words",
    [
        "student-labels",
        "of teacher",
        "exact McNemar",
        "apparent",
        "weights",
        "threefold predict",
    ],
)
def test_the_command_prints_scores_and_costs(distilled: Distilled, words: str) -> None:
    assert words in distilled.output


def test_the_tables_of_scores_fit_80_columns(distilled: Distilled) -> None:
    rows = [line for line in distilled.output.splitlines() if "test 12" in line]

    assert len(rows) == 3
    assert max(map(len, rows)) <= 80


def test_the_exported_student_answers_as_the_run(distilled: Distilled) -> None:
    test = Run.open(distilled.student).sources.test
    assert test is not None
    expected = np.load(distilled.student / "chosen.npz")["probs"][:4]

    model = threefold.load(distilled.student / "model.onnx")
    probs = model.predict_proba([test.pixels(row) for row in range(4)])

    assert model.card["taught_by"].endswith("of teacher")
    np.testing.assert_allclose(probs, expected, atol=1e-4)


def test_a_student_can_be_compared_as_any_run(distilled: Distilled) -> None:
    folder = distilled.student
    stored = read(folder / "results.json")["distill"]["tables"][0]["comparisons"]
    keys = {"only_a", "only_b", "p", "difference"}

    summary, _ = compare_saved([str(folder), f"{folder}:student-labels", str(distilled.teacher)])

    for ours, theirs in zip(stored, summary.comparisons, strict=True):
        assert {key: ours[key] for key in keys} == theirs.model_dump(include=keys)


def test_a_student_can_be_scored_as_any_run(distilled: Distilled) -> None:
    done = runner.invoke(app, ["ensemble", str(distilled.student), "--method", "mean"])

    assert "apparent" in done.output


def test_the_teachers_ledger_records_one_opening(distilled: Distilled) -> None:
    before = read(distilled.teacher / "ledger.json")

    repeated = runner.invoke(app, ["distill", str(distilled.teacher), *STUDENT])

    assert repeated.exit_code == 0
    assert read(distilled.teacher / "ledger.json") == before
    assert openings(distilled.teacher) == ["train", "distill"]
    assert openings(distilled.student) == ["train"]


def test_a_member_as_student_keeps_its_head(finished: Run) -> None:
    recipe = student_recipe(finished, "run", "gated")

    assert recipe.members[0].model_copy(update={"name": "gated"}) == finished.recipe.member("gated")


def test_a_timm_name_as_student_gets_a_linear_head(finished: Run) -> None:
    overrides = ["members.student.img_size=48", "distill.alpha=0.25"]

    recipe = student_recipe(finished, "run", "test_vit", overrides)

    student, twin = recipe.members
    assert (student.name, student.backbone) == ("student", "test_vit")
    assert student.head.kind == "linear"
    assert (student.img_size, twin.img_size) == (48, 48)
    assert twin.name == "student-labels"
    assert recipe.folds.final == "refit"
    assert recipe.combined == ("student",)
    assert recipe.distill is not None
    assert (recipe.distill.alpha, recipe.distill.twin) == (0.25, "student-labels")
    stages = [stage.model_copy(update={"members": ()}) for stage in finished.recipe.stages]
    assert list(recipe.stages) == stages


def test_a_joint_member_cannot_be_a_student(finished: Run) -> None:
    members = [member.model_dump() | {"img_size": 32} for member in finished.recipe.members]
    members.append({"name": "both", "joins": ["plain", "gated"], "img_size": 32})
    tree = finished.recipe.model_dump(exclude_none=True) | {"members": members}
    run = Run(RunFolder(finished.dir, Recipe.parse(tree)))

    with pytest.raises(RecipeError, match="joins others is no student"):
        student_recipe(run, "run", "both")


@pytest.mark.parametrize(
    ("student", "overrides", "message"),
    [
        ("plian", [], "unknown backbone"),
        ("plain", ["--set", "distill.alfa=1"], "did you mean alpha"),
    ],
)
def test_bad_input_is_one_line_before_training(
    finished: Run, tmp_path: Path, student: str, overrides: list[str], message: str
) -> None:
    out = tmp_path / "out"
    words = ["distill", str(finished.dir), "--student", student, *overrides, "--out", str(out)]

    done = runner.invoke(app, words)

    assert_refused(done, message, out)


def test_a_folder_that_is_no_run_cannot_teach(tmp_path: Path) -> None:
    out = tmp_path / "out"

    done = runner.invoke(app, ["distill", str(tmp_path), "--student", "plain", "--out", str(out)])

    assert_refused(done, "not a run folder", out)


def assert_refused(done: Result, message: str, out: Path) -> None:
    """Assert that a command failed with one line and wrote nothing."""
    assert done.exit_code == 1
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not out.exists()
