"""The surface that users see: verbs, flags, exit codes, public names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import typer
from support.command_line import SURFACE, threefold_command
from support.paths import AUTHORS_PREDICTIONS
from typer.testing import CliRunner

import threefold
from threefold.arguments import QUALITIES
from threefold.cli.app import app
from threefold.training.planning.basis import Quality
from threefold.training.run import Run

runner = CliRunner()
ROOT_FLAGS = {"--version", "--install-completion", "--show-completion"}


def flags_of(command: Any) -> set[str]:
    """The long flags of a command, without --help."""
    names = {name for parameter in command.params for name in parameter.opts}
    return {name for name in names if name.startswith("--") and name != "--help"}


def test_verbs_and_flags_are_those_written_down() -> None:
    root = typer.main.get_command(app)
    commands = dict(root.commands)  # type: ignore[attr-defined]
    groups = {name: c.commands for name, c in commands.items() if hasattr(c, "commands")}
    commands |= {f"{name} {verb}": c for name, verbs in groups.items() for verb, c in verbs.items()}

    flags = {name: flags_of(command) for name, command in commands.items()}

    assert flags_of(root) == ROOT_FLAGS
    assert flags == SURFACE


def test_version() -> None:
    done = threefold_command("--version")

    assert (done.returncode, done.stdout) == (0, f"threefold {threefold.__version__}\n")


def test_the_shell_completes_verbs() -> None:
    words = {"COMP_WORDS": "threefold pre", "COMP_CWORD": "1"}

    completed = runner.invoke(
        app, env={"_THREEFOLD_COMPLETE": "complete_bash", **words}, prog_name="threefold"
    )

    assert completed.output.split() == ["predict"]


def test_every_verb_explains_itself() -> None:
    for verb in SURFACE:
        result = runner.invoke(app, [*verb.split(), "--help"])
        assert result.exit_code == 0
        assert len(result.output) > 100


def test_public_names_exist_and_are_documented() -> None:
    assert set(threefold.__all__) <= set(dir(threefold))
    for name in threefold.__all__:
        assert getattr(threefold, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = threefold.nothing  # type: ignore[attr-defined]


def test_public_functions_are_not_hidden_by_their_modules() -> None:
    import threefold.api  # imports every module there is

    assert not {
        name for name in threefold.__all__ if isinstance(getattr(threefold, name), type(threefold))
    }
    assert callable(threefold.train)
    assert callable(threefold.export)


def test_importing_and_help_are_light() -> None:
    code = (
        "import sys, threefold, threefold.cli\n"
        "assert not {'torch', 'timm', 'matplotlib', 'onnxruntime'} & set(sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], check=False)

    assert done.returncode == 0


def test_exit_codes() -> None:
    done = threefold_command("list", "recipes")
    error = threefold_command("train", "nothing.toml", "--out", "x")
    usage = threefold_command("train")

    assert done.returncode == 0
    assert (error.returncode, error.stdout) == (1, "")
    assert error.stderr.startswith("error cannot read the recipe: nothing.toml")
    assert error.stderr.count("\n") == 1
    assert usage.returncode == 2


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        ("photos", "threefold fit photos"),
        ("my.toml", "threefold train my.toml"),
        ("model.onnx", "threefold predict model.onnx IMAGES"),
        ("data photos", "threefold data check photos"),
    ],
)
def test_a_path_in_the_place_of_a_verb(
    words: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / words.split()[-1]).mkdir()

    done = runner.invoke(app, words.split(), env={"COLUMNS": "200"})

    assert done.exit_code == 2
    assert f"{words.split()[-1]} is no verb" in done.output
    assert verb in done.output


def test_a_name_that_no_file_can_have_is_no_verb() -> None:
    done = runner.invoke(app, ["x" * 300])

    assert (done.exit_code, type(done.exception)) == (2, SystemExit)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["heads"], "bilstm"),
        (["ensembles"], "pruned"),
        (["recipes"], "demo: The embedded default"),
        (["presets"], "--quality good: "),
        (["presets"], "threefold train demo: The embedded default"),
        (["data"], "folder"),
        (["backbones", "*lite0*"], "tf_efficientnet_lite0.in1k"),
    ],
)
def test_list(words: list[str], expected: str) -> None:
    assert expected in runner.invoke(app, ["list", *words]).output


def test_every_quality_is_described() -> None:
    assert tuple(QUALITIES) == get_args(Quality)


def test_predict_files_folders_lists_and_forms(finished: Run) -> None:
    model, root = str(finished.dir / "model.onnx"), Path(finished.recipe.data.root)
    ids = ids_of_test_images(finished)
    two_paths = f"{root / ids[1]}\n{root / ids[2]}\n"

    text = runner.invoke(app, ["predict", model, str(root / ids[0]), "--top", "1"])
    csv = runner.invoke(app, ["predict", model, str(root / "test"), "--csv"])
    listed = runner.invoke(app, ["predict", model, "-", "--json"], input=two_paths)

    assert text.exit_code == 0
    assert text.output.startswith(str(root / ids[0]) + ": ")
    rows = csv.output.splitlines()
    assert rows[0] == "path,prediction,confidence,blue,green,red"
    assert len(rows) == 1 + len(ids)
    answers = [json.loads(line) for line in listed.output.splitlines()]
    assert [a["image"] for a in answers] == [str(root / ids[1]), str(root / ids[2])]
    assert set(answers[0]["members"]) == {"plain", "gated"}


def test_predict_in_batches_and_into_a_file(finished: Run, tmp_path: Path) -> None:
    words = ["predict", str(finished.dir / "model.onnx"), str(Path(finished.recipe.data.root))]
    target = tmp_path / "answers.csv"

    alone = runner.invoke(app, [*words, "--csv"])
    batches = runner.invoke(app, [*words, "--csv", "--batch", "8"])
    done = runner.invoke(app, [*words, "--out", str(target)])
    both = runner.invoke(app, [*words, "--out", str(target), "--csv"])
    forms = runner.invoke(app, [*words, "--json", "--csv"])

    for text in (batches.output, target.read_text()):
        rows = [line.split(",") for line in text.splitlines()]
        expected = [line.split(",") for line in alone.output.splitlines()]
        assert [row[:2] for row in rows] == [row[:2] for row in expected]
        probs, right = (np.array([row[2:] for row in part[1:]], float) for part in (rows, expected))
        np.testing.assert_allclose(probs, right, atol=2e-6)
    assert re.fullmatch(rf"{target}: (\d+) images; \1 now \(.*/s, batch \d+\)\n", done.output)
    assert "leave --csv and --json out" in str(both.exception)
    assert "--csv and --json are two forms of the answers; fix: give" in str(forms.exception)


def test_explain_a_run_and_a_file(finished: Run, tmp_path: Path) -> None:
    image = Path(finished.recipe.data.root) / ids_of_test_images(finished)[0]
    of_run, of_file = tmp_path / "run.png", tmp_path / "file.png"

    run = runner.invoke(app, ["explain", str(finished.dir), str(image), "--out", str(of_run)])
    file = runner.invoke(
        app,
        ["explain", str(finished.dir / "model.onnx"), str(image), "--out", str(of_file), "--json"],
    )
    wrong = runner.invoke(app, ["explain", str(finished.dir), str(image), "--class", "pink"])

    lines = run.stdout.splitlines()
    explained = json.loads(file.stdout)
    assert explained["method"].startswith("occlusion")
    assert f"{explained['top'][0][0]} {explained['top'][0][1]:.1%}" in lines[0]
    assert "Grad-CAM" in lines[1]
    assert len([line for line in lines if line.startswith("  ")]) == 5
    assert of_run.read_bytes()[1:4] == of_file.read_bytes()[1:4] == b"PNG"
    assert "expected blue, green, red, got pink" in str(wrong.exception)


def test_embed_writes_the_features_of_images(finished: Run, tmp_path: Path) -> None:
    target, bad = tmp_path / "features.npz", tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    images = [str(Path(finished.recipe.data.root) / "test"), str(bad)]

    done = runner.invoke(app, ["embed", str(finished.dir), *images, "--out", str(target)])

    assert done.exit_code == 1
    with np.load(target) as arrays:
        assert len(arrays["paths"]) == len(arrays["features"]) == len(ids_of_test_images(finished))
        assert arrays["features"].shape[1] == arrays["widths"].sum()


def test_predict_names_bad_files_and_goes_on(finished: Run, tmp_path: Path) -> None:
    model = str(finished.dir / "model.onnx")
    bad, missing = tmp_path / "broken.png", tmp_path / "none.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n")
    good = Path(finished.recipe.data.root) / ids_of_test_images(finished)[0]

    (tmp_path / "empty").mkdir()
    bads = [str(bad), str(missing), str(tmp_path / "empty"), "a" * 5000]

    mixed = threefold_command("predict", model, *bads, str(good))
    nothing = threefold_command("predict", model, str(missing))

    assert mixed.returncode == 1
    lines = mixed.stderr.splitlines()
    assert len(lines) == len(bads)
    for name, line in zip(("broken.png", "none.png", "no images", "too long"), lines, strict=True):
        assert name in line
    assert mixed.stdout.startswith(str(good))
    assert nothing.returncode == 1


def test_names_that_the_terminal_lacks_lose_no_answer(finished: Run, tmp_path: Path) -> None:
    model = str(finished.dir / "model.onnx")
    good = Path(finished.recipe.data.root) / ids_of_test_images(finished)[0]
    odd = [tmp_path / "café.png", Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))]
    for path in odd:
        shutil.copy(good, path)
    paths = [*map(str, odd), str(good)]

    text = threefold_command("predict", model, *paths, encoding="ascii")
    lines = threefold_command("predict", model, "--json", *paths, encoding="ascii")
    unicode = threefold_command("predict", model, "--json", *paths, encoding="utf-8")

    assert [run.returncode for run in (text, lines, unicode)] == [0, 0, 0]
    assert len(text.stdout.splitlines()) == 3
    for run in (lines, unicode):
        assert [json.loads(line)["image"] for line in run.stdout.splitlines()] == paths


def test_ensemble_on_a_run_and_on_foreign_predictions(finished: Run) -> None:
    methods = ["--method", "mean", "--method", "vote"]
    oof = str(finished.dir / "oof.npz")

    of_run = runner.invoke(app, ["ensemble", str(finished.dir), *methods, "--json"])
    foreign = runner.invoke(
        app, ["ensemble", oof, "--members", "plain,gated", "--method", "pruned"]
    )

    tree = json.loads(of_run.output)
    scored = {(score["name"], score["rows"]) for score in tree["scores"]}
    assert scored >= {("mean", "oof"), ("mean", "test"), ("vote", "oof")}
    # The test rows were opened once, without the vote.
    assert ("vote", "test") not in scored
    assert any("by train; not scored on them: vote" in line for line in tree["warnings"])
    assert foreign.exit_code == 0
    assert "pruned" in foreign.output


def test_reopening_the_test_rows_is_explicit_and_recorded(finished: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.dir, run)
    before = openings(run)

    result = runner.invoke(
        app, ["ensemble", str(run), "--method", "vote", "--reopen-test", "--json"]
    )

    scores = json.loads(result.output)["scores"]
    assert ("vote", "test") in {(score["name"], score["rows"]) for score in scores}
    assert before == ["train"]
    assert openings(run) == ["train", "ensemble"]


def openings(run: Path) -> list[str]:
    """Who opened a run's test rows, other than export."""
    entries = json.loads((run / "ledger.json").read_text())["test_opened"]
    return [entry["by"] for entry in entries if entry["by"] != "export"]


def ids_of_test_images(run: Run) -> tuple[str, ...]:
    """The ids of a run's test images."""
    assert run.sources.test is not None
    return tuple(run.sources.test.ids)


def test_the_authors_published_predictions_give_their_scores() -> None:
    path = AUTHORS_PREDICTIONS
    if not path.exists():
        pytest.skip("the authors' predictions are not at hand")
    names = [str(name) for name in np.load(path)["members"] if "Mixed" in str(name)]
    words = ["--members", ",".join(names), "--method", "mean,pruned,vote", "--json"]

    done = threefold_command("ensemble", str(path), *words)

    scores = {score["name"]: score["accuracy"] for score in json.loads(done.stdout)["scores"]}
    assert (scores["mean"], scores["pruned"], scores["vote"]) == (0.9592, 0.9591, 0.9590)


@pytest.mark.long
@pytest.mark.slow
def test_plan_prints_a_recipe_with_reasons(images: Path) -> None:
    result = runner.invoke(app, ["plan", str(images), "--budget", "0"])

    assert result.exit_code == 0
    assert "# img_size = " in result.output
    assert tomllib.loads(result.output)["members"][0]["backbone"] == "tf_efficientnet_lite0.in1k"
