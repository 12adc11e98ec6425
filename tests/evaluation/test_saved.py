"""Saved predictions, combined and scored: one file, several, a run; the verbs' JSON and tables."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.saved_models import model, save
from typer.testing import CliRunner

from threefold.cli.app import app
from threefold.errors import DataError, RunError
from threefold.evaluation.saved import (
    evaluate_saved,
    read_sources,
    score_saved,
    summarize_evaluation,
)
from threefold.predictions.predictions import Predictions
from threefold.training.run import Run

runner = CliRunner()


def pool(m: int = 4, n: int = 240) -> Predictions:
    parts = [model(n, 0.7 + 0.02 * i, seed=i) for i in range(m)]
    probs = np.concatenate([part.probs for part in parts])
    first = parts[0]
    return Predictions(
        probs=probs,
        labels=first.labels,
        ids=first.ids,
        classes=first.classes,
        members=tuple(f"m{i}" for i in range(m)),
    )


def test_several_files_are_joined_by_id(tmp_path: Path) -> None:
    files = save(
        tmp_path,
        a=model(seed=1, name="a"),
        b=model(seed=2, name="b").rows(np.random.default_rng(0).permutation(300)),
    )

    rows = read_sources([Path(f) for f in files])

    assert rows.members == ("a", "b")
    np.testing.assert_array_equal(rows.probs[1], model(seed=2).probs[0])
    assert read_sources([Path(files[0])], ["a"]).members == ("a",)
    with pytest.raises(DataError, match="no predictions given"):
        read_sources([])
    with pytest.raises(RunError, match=r"no out-of-fold predictions.*give a finished run folder"):
        read_sources([tmp_path])


def circle(path: Path) -> None:
    """Put a link to itself in place of a file."""
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("left", ["nothing but the recipe", "all but oof.npz"])
def test_a_run_without_its_rows_names_training(finished: Run, tmp_path: Path, left: str) -> None:
    run = tmp_path / "run"
    if left == "all but oof.npz":
        shutil.copytree(finished.dir, run, ignore=shutil.ignore_patterns("oof.npz"))
    else:
        run.mkdir()
        shutil.copy(finished.dir / "recipe.toml", run)
    train = f"fix: run `threefold train {run / 'recipe.toml'} --out {run}`"

    with pytest.raises(RunError, match=re.escape(train)):
        score_saved([run])


@pytest.mark.parametrize("damage", [Path.unlink, circle])
def test_results_that_are_gone_are_named(
    finished: Run, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run = Path(shutil.copytree(finished.dir, tmp_path / "run"))
    damage(run / "results.json")

    with pytest.raises(RunError, match=r"results\.json; .*fix: (delete .* and )?run `threefold"):
        evaluate_saved(run, ["mean"])


def test_a_copy_of_a_member_counts_once_and_is_named(tmp_path: Path) -> None:
    rows = pool()
    twice = Predictions(
        probs=np.concatenate([rows.probs, rows.probs[:1]]),
        labels=rows.labels,
        ids=rows.ids,
        classes=rows.classes,
        members=(*rows.members, "again"),
    )
    twice.save(tmp_path / "twice.npz")
    rows.save(tmp_path / "once.npz")

    doubled, plain = (
        evaluate_saved(tmp_path / f"{name}.npz", ["mean", "greedy"]) for name in ("twice", "once")
    )

    assert doubled.combined == plain.combined
    assert "again answers as m0 does; the two count once" in doubled.warnings
    doubled_mean, mean = (
        next(s for s in evaluation.scores if s.name == "mean") for evaluation in (doubled, plain)
    )
    assert doubled_mean == mean


def test_the_meter_says_what_each_choice_promised(tmp_path: Path) -> None:
    pool(12).save(tmp_path / "p.npz")
    path = tmp_path / "p.npz"

    summary = summarize_evaluation([path], evaluate_saved(path, ["auto"]))

    lines = {line.choice: line for line in summary.optimism}
    assert {"member", "weighted", "greedy", "method"} <= set(lines)
    for line in lines.values():
        assert line.interval is not None
        assert line.difference == pytest.approx(line.apparent - line.honest)
        assert line.interval[0] <= line.difference <= line.interval[1]
    assert summary.expected is not None
    assert summary.expected.accuracy == pytest.approx(lines["method"].honest)  # no test rows
    assert "each answered by a method that was chosen without it" in summary.expected.basis
    assert all(line.overlap == 0 for line in summary.ledger)
    assert summary.diversity is not None
    assert summary.diversity.members == tuple(f"m{i}" for i in range(12))
    assert summary.size_curve is not None
    assert len(summary.size_curve.mean) == 12


def test_evaluate_fits_nothing(tmp_path: Path) -> None:
    rows = pool(2)
    rows.save(tmp_path / "p.npz")
    loss = -np.log(rows.probs[0, np.arange(240), rows.labels]).mean()

    summary, _ = score_saved([tmp_path / "p.npz"])

    first = summary.scores[0]
    assert first.log_loss == pytest.approx(loss, rel=1e-5)
    assert first.fitted_on == "nothing"
    assert first.calibrated_log_loss is not None
    assert first.calibrated_log_loss < first.log_loss + 0.01
    assert summary.per_class_of == "m1"


@pytest.mark.parametrize(
    "words", [pytest.param("ensemble --method auto", marks=pytest.mark.slow), "evaluate", "compare"]
)
def test_verbs_print_tables_pages_and_json(tmp_path: Path, words: str) -> None:
    path, page = str(tmp_path / "p.npz"), tmp_path / "page.html"
    pool(3).save(tmp_path / "p.npz")
    verb, *options = words.split()
    command = [verb, path, *options]

    table = runner.invoke(app, command)
    html = runner.invoke(app, [*command, "--html", str(page)])
    tree = json.loads(runner.invoke(app, [*command, "--json"]).output)

    assert table.exit_code == 0, table.output
    assert "m0" in table.output
    assert html.exit_code == 0, html.output
    assert "<!doctype html>" in page.read_text(encoding="utf-8").lower()
    assert tree["kind"] == verb
    assert tree["source"] == [path]


def test_tables_state_the_conclusion(tmp_path: Path) -> None:
    path = str(tmp_path / "p.npz")
    pool(3).save(tmp_path / "p.npz")

    ensemble, compare = (
        runner.invoke(app, [verb, path]).output for verb in ("ensemble", "compare")
    )

    assert "Expect" in ensemble
    assert "no evidence" in compare or "is better" in compare


def test_a_runs_results_say_who_saw_what(finished: Run) -> None:
    results = finished.results

    lines = {line.step: line for line in results.ledger}
    assert {"weights of the members", "checkpoints and stages", "ensemble stacked"} <= set(lines)
    assert all(line.overlap == 0 for line in lines.values())
    assert lines["ensembles, calibration, choice of the method"].scored == "12 test rows"
    assert results.test_opened is not None
    assert results.test_opened.times == 1
    choices = {line.choice for line in results.optimism}
    assert {"checkpoint", "stage", "member", "stacked", "method"} <= choices
    assert results.expected is not None
    assert results.expected.rows == "test"
    assert results.conformal is not None
    assert [sets.by_class for sets in results.conformal.sets] == [False, True]
    assert results.audit is not None
    assert results.audit.missing == ""
    assert (finished.dir / "suspects.csv").exists()

    mean = next(s for s in results.scores if s.name == "mean")
    member = next(s for s in results.scores if s.name == "plain")
    assert mean.macs is not None
    assert member.macs is not None
    assert mean.macs > member.macs > 0


def test_an_array_alone_takes_labels_and_names_from_beside_it(tmp_path: Path) -> None:
    rows = pool(2)
    np.save(tmp_path / "net.npy", rows.probs[1])
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    (tmp_path / "labels.csv").write_text(
        "label\n" + "\n".join("abc"[y] for y in rows.labels) + "\n"
    )

    words = ["evaluate", str(tmp_path / "net.npy"), "--json"]
    more = ["--labels", str(tmp_path / "labels.csv"), "--classes", str(tmp_path / "classes.txt")]

    without_labels = runner.invoke(app, words)
    tree = json.loads(runner.invoke(app, [*words, *more]).output)

    assert without_labels.exit_code == 1
    assert tree["scores"][0]["name"] == "net"
    assert tree["scores"][0]["accuracy"] == pytest.approx(
        (rows.probs[1].argmax(1) == rows.labels).mean()
    )


def test_a_page_about_a_run(finished: Run, tmp_path: Path) -> None:
    for words in (["ensemble", "--method", "mean,vote"], ["evaluate"], ["compare"]):
        page = tmp_path / f"{words[0]}.html"

        text = runner.invoke(app, [words[0], str(finished.dir), *words[1:], "--html", str(page)])
        assert text.exit_code == 0, text.output
        assert page.stat().st_size > 10_000
