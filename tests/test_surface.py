"""What users see stays what it is: verbs, flags, exit codes, public names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import threefold
from threefold.cli import app
from threefold.run import Run

runner = CliRunner()
# A training option is a recipe key, never a flag: think before adding one here.
SURFACE = {
    "demo": {"--out", "--verbose"},
    "fit": {"--out", "--budget", "--members", "--set", "--verbose"},
    "plan": {"--budget", "--members", "--set"},
    "train": {"--out", "--set", "--verbose"},
    "ensemble": {
        "--method",
        "--members",
        "--top",
        "--reopen-test",
        "--labels",
        "--classes",
        "--json",
        "--html",
    },
    "evaluate": {"--members", "--labels", "--classes", "--json", "--html"},
    "compare": {"--shared", "--labels", "--classes", "--json", "--html"},
    "export": {"--out", "--method", "--members", "--precision", "--web", "--web-runtime"},
    "distill": {"--student", "--out", "--set", "--verbose"},
    "predict": {"--top", "--json", "--csv", "--mode", "--budget"},
    "serve": {"--host", "--port", "--api-key", "--limit", "--mode", "--budget"},
    "report": {"--out"},
    "list": set(),
    "data": set(),
    "data fetch": {"--to", "--extra", "--accept-licence"},
    "data check": {"--as", "--json"},
    "reproduce": {"--scale", "--protocol", "--out", "--data", "--seeds", "--set"},
}


def threefold_command(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "threefold", *words],
        capture_output=True,
        text=True,
        input=stdin,
        check=False,
    )


def test_verbs_and_flags_are_those_written_down() -> None:
    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    groups = {name: c.commands for name, c in commands.items() if hasattr(c, "commands")}
    commands |= {f"{name} {verb}": c for name, verbs in groups.items() for verb, c in verbs.items()}
    found = {
        name: {o for p in c.params for o in p.opts if o.startswith("--") and o != "--help"}
        for name, c in commands.items()
    }
    assert found == SURFACE


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


def test_public_functions_stay_functions_after_their_modules_are_imported() -> None:
    import threefold.workflow  # imports every module there is

    assert not {
        name for name in threefold.__all__ if isinstance(getattr(threefold, name), type(threefold))
    }
    assert callable(threefold.train)
    assert callable(threefold.export)


def test_importing_and_help_are_light() -> None:
    code = "import sys, threefold, threefold.cli; assert not {'torch', 'timm', 'matplotlib', 'onnxruntime'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_exit_codes() -> None:
    assert threefold_command("list", "heads").returncode == 0
    error = threefold_command("train", "nothing.toml", "--out", "x")
    assert (error.returncode, error.stdout) == (1, "")
    assert error.stderr.startswith("error cannot read the recipe: nothing.toml")
    assert error.stderr.count("\n") == 1
    assert threefold_command("train").returncode == 2


def test_list() -> None:
    for what, word in (
        ("heads", "bilstm"),
        ("ensembles", "pruned"),
        ("recipes", "demo"),
        ("data", "folder"),
    ):
        assert word in runner.invoke(app, ["list", what]).output
    assert (
        "tf_efficientnet_lite0.in1k" in runner.invoke(app, ["list", "backbones", "*lite0*"]).output
    )


def test_predict_files_folders_lists_and_forms(finished: Run) -> None:
    model, root = str(finished.dir / "model.onnx"), Path(finished.recipe.data.root)
    ids = finished.sources.test.ids  # type: ignore[union-attr]
    text = runner.invoke(app, ["predict", model, str(root / ids[0]), "--top", "1"])
    assert text.exit_code == 0
    assert text.output.startswith(str(root / ids[0]) + ": ")
    table = runner.invoke(app, ["predict", model, str(root / "test"), "--csv"]).output.splitlines()
    assert table[0] == "image,label,probability,blue,green,red"
    assert len(table) == 1 + len(ids)
    listed = runner.invoke(
        app, ["predict", model, "-", "--json"], input=f"{root / ids[1]}\n{root / ids[2]}\n"
    )
    answers = [json.loads(line) for line in listed.output.splitlines()]
    assert [a["image"] for a in answers] == [str(root / ids[1]), str(root / ids[2])]
    assert set(answers[0]["members"]) == {"plain", "gated"}


def test_predict_names_bad_files_and_goes_on(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    good = Path(finished.recipe.data.root) / finished.sources.test.ids[0]  # type: ignore[union-attr]
    done = threefold_command(
        "predict", str(finished.dir / "model.onnx"), str(tmp_path / "broken.png"), str(good)
    )
    assert done.returncode == 1
    assert "broken.png" in done.stderr
    assert done.stdout.startswith(str(good))
    assert (
        threefold_command(
            "predict", str(finished.dir / "model.onnx"), str(tmp_path / "none.png")
        ).returncode
        == 1
    )


def test_ensemble_on_a_run_and_on_foreign_predictions(finished: Run) -> None:
    found = runner.invoke(
        app, ["ensemble", str(finished.dir), "--method", "mean", "--method", "vote", "--json"]
    )
    scores = json.loads(found.output)["scores"]
    assert {(s["name"], s["rows"]) for s in scores} >= {
        ("mean", "oof"),
        ("mean", "test"),
        ("vote", "oof"),
    }
    assert ("vote", "test") not in {
        (s["name"], s["rows"]) for s in scores
    }  # the test rows were opened once, without it
    assert any(
        "by train; not scored on them: vote" in line
        for line in json.loads(found.output)["warnings"]
    )
    foreign = runner.invoke(
        app,
        [
            "ensemble",
            str(finished.dir / "oof.npz"),
            "--members",
            "plain,gated",
            "--method",
            "pruned",
        ],
    )
    assert foreign.exit_code == 0
    assert "pruned" in foreign.output


def test_test_rows_are_opened_again_only_when_asked_for_and_that_is_noted(
    finished: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.dir, run)
    before = json.loads((run / "ledger.json").read_text())["test_opened"]
    assert [entry["by"] for entry in before if entry["by"] != "export"] == ["train"]
    found = runner.invoke(
        app, ["ensemble", str(run), "--method", "vote", "--reopen-test", "--json"]
    )
    assert ("vote", "test") in {(s["name"], s["rows"]) for s in json.loads(found.output)["scores"]}
    after = json.loads((run / "ledger.json").read_text())["test_opened"]
    assert [entry["by"] for entry in after if entry["by"] != "export"] == ["train", "ensemble"]


def test_the_authors_published_predictions_replay_through_the_command() -> None:
    path = Path(__file__).parents[2] / "shared/data/fashion_mnist_authors_predictions.npz"
    if not path.exists():
        pytest.skip("the authors' predictions are not at hand")
    import numpy as np

    names = [str(n) for n in np.load(path)["members"] if "Mixed" in str(n)]
    done = threefold_command(
        "ensemble",
        str(path),
        "--members",
        ",".join(names),
        "--method",
        "mean,pruned,vote",
        "--json",
    )
    scores = {s["name"]: s["accuracy"] for s in json.loads(done.stdout)["scores"]}
    assert (scores["mean"], scores["pruned"], scores["vote"]) == (0.9592, 0.9591, 0.9590)


def test_plan_prints_a_recipe_with_reasons(images: Path) -> None:
    result = runner.invoke(app, ["plan", str(images), "--budget", "0"])
    assert result.exit_code == 0
    assert "# img_size = " in result.output
    import tomllib

    assert tomllib.loads(result.output)["members"][0]["backbone"] == "tf_efficientnet_lite0.in1k"
