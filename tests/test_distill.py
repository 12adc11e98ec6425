"""The verb distill: a run's ensemble to one network, in one command; bad input is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import threefold
from threefold.api import default_folder, student_recipe
from threefold.cli.app import app
from threefold.errors import RecipeError
from threefold.evaluation.compare import compare_saved
from threefold.predictions.run_folder import RunFolder
from threefold.recipe import Recipe
from threefold.training.run import Run

runner = CliRunner()
FAST = ["--set", "stages.one.epochs=1"]


@pytest.fixture(scope="module")
def taught(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A copy of the finished run, its student's folder, and what the command printed."""
    teacher = tmp_path_factory.mktemp("distill") / "teacher"
    shutil.copytree(finished.dir, teacher)
    done = runner.invoke(
        app,
        [
            "distill",
            str(teacher),
            "--student",
            "test_resnet",
            *FAST,
            "--set",
            "members.student.weights=none",
        ],
    )
    assert done.exit_code == 0, done.output
    return teacher, default_folder(teacher, "test_resnet"), done.output


def test_the_command_makes_a_whole_run_beside_its_teacher(taught: tuple[Path, Path, str]) -> None:
    teacher, folder, printed = taught
    assert folder == teacher.parent / "teacher-test_resnet"
    run = Run.open(folder)
    assert {p.name for p in folder.iterdir()} >= {
        "results.json",
        "report.html",
        "model.onnx",
        "oof.npz",
        "test.npz",
    }
    for word in (
        "student-labels",
        "of teacher",
        "exact McNemar",
        "apparent",
        "weights",
        "threefold predict",
    ):
        assert word in printed, word
    assert all(
        len(line) <= 80
        for line in printed.splitlines()
        if "%" in line and "-" in line and "test 12" in line
    )
    model = threefold.load(folder / "model.onnx")
    assert model.card["taught_by"].endswith("of teacher")
    test = run.sources.test
    assert test is not None
    found = np.load(folder / "chosen.npz")["probs"][:4]
    np.testing.assert_allclose(
        model.predict_proba([test.pixels(i) for i in range(4)]), found, atol=1e-4
    )
    results = json.loads((folder / "results.json").read_text())
    bytes_of = {line["name"]: line.get("bytes") for line in results["distill"]["costs"]}
    assert bytes_of["student"] == (folder / "model.onnx").stat().st_size
    assert (
        bytes_of[results["distill"]["teacher"]["name"]] == (teacher / "model.onnx").stat().st_size
    )


def test_the_student_can_be_compared_and_scored_as_any_run(taught: tuple[Path, Path, str]) -> None:
    teacher, folder, _ = taught
    tree, _ = compare_saved([str(folder), f"{folder}:student-labels", str(teacher)])
    lines = json.loads((folder / "results.json").read_text())["distill"]["tables"][0]["comparisons"]
    for ours, theirs in zip(lines, tree.comparisons, strict=True):
        keys = {"only_a", "only_b", "p", "difference"}
        assert {k: ours[k] for k in keys} == theirs.model_dump(include=keys)
    done = runner.invoke(app, ["ensemble", str(folder), "--method", "mean"])
    assert "apparent" in done.output


def test_the_teachers_ledger_notes_that_its_test_rows_were_opened(
    taught: tuple[Path, Path, str],
) -> None:
    teacher, folder, _ = taught
    opened = json.loads((teacher / "ledger.json").read_text())["test_opened"]
    assert [entry["by"] for entry in opened if entry["by"] != "export"] == ["train", "distill"]
    again = runner.invoke(
        app,
        [
            "distill",
            str(teacher),
            "--student",
            "test_resnet",
            *FAST,
            "--set",
            "members.student.weights=none",
        ],
    )
    assert again.exit_code == 0
    assert json.loads((teacher / "ledger.json").read_text())["test_opened"] == opened
    opened = json.loads((folder / "ledger.json").read_text())["test_opened"]
    assert [entry["by"] for entry in opened if entry["by"] != "export"] == ["train"]


def test_a_member_keeps_its_head_and_a_timm_name_gets_a_linear_one(finished: Run) -> None:
    by_name = student_recipe(finished, "run", "gated")
    assert by_name.members[0].model_copy(update={"name": "gated"}) == finished.recipe.member(
        "gated"
    )
    other = student_recipe(
        finished, "run", "test_vit", ["members.student.img_size=48", "distill.alpha=0.25"]
    )
    student, twin = other.members
    assert (student.backbone, student.head.kind, student.img_size, twin.img_size) == (
        "test_vit",
        "linear",
        48,
        48,
    )
    assert (student.name, twin.name, other.folds.final, other.combined) == (
        "student",
        "student-labels",
        "refit",
        ("student",),
    )
    assert other.distill is not None
    assert (other.distill.alpha, other.distill.twin) == (0.25, "student-labels")
    assert [s.model_copy(update={"members": ()}) for s in finished.recipe.stages] == list(
        other.stages
    )
    joined = Recipe.parse(
        {
            **finished.recipe.model_dump(exclude_none=True),
            "members": [
                *(m.model_dump() | {"img_size": 32} for m in finished.recipe.members),
                {"name": "both", "joins": ["plain", "gated"], "img_size": 32},
            ],
        }
    )
    with pytest.raises(RecipeError, match="joins others is no student"):
        student_recipe(Run(RunFolder(finished.dir, joined)), "run", "both")


def test_bad_input_is_one_line_before_anything_is_trained(finished: Run, tmp_path: Path) -> None:
    for words, told in (
        ([str(tmp_path), "--student", "plain"], "not a run folder"),
        ([str(finished.dir), "--student", "plian"], "unknown backbone"),
        (
            [str(finished.dir), "--student", "plain", "--set", "distill.alfa=1"],
            "did you mean alpha",
        ),
    ):
        done = runner.invoke(app, ["distill", *words, "--out", str(tmp_path / "out")])
        assert done.exit_code == 1
        assert told in str(done.exception)
        assert "\n" not in str(done.exception)
        assert not (tmp_path / "out").exists()
