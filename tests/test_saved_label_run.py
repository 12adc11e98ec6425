"""What a run of several labels per image shows in Python, on the page and in the terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.fake_label_runs import TEST, fake_label_run, label_recipe
from support.html_page import Page
from support.label_models import write_label_model
from typer.testing import CliRunner

import threefold
from threefold.cli.app import app
from threefold.cli.ui import describe_run
from threefold.errors import DataError, RecipeError, RunError
from threefold.evaluation.multilabel_saved import combine_multilabel, score_multilabel
from threefold.json_files import write_json
from threefold.predictions.multilabel_results import MultilabelScore
from threefold.report.multilabel_pages import write_multilabel_report

runner = CliRunner()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; only to be read."""
    return fake_label_run(tmp_path_factory.mktemp("runs") / "labels")


def write_colours(folder: Path) -> Path:
    """A table of yellow, black and white images, whose labels are their channels."""
    rows = {"yellow": ("green|red", 250, 250, 10), "white": ("blue|green|red", 250, 250, 250)}
    lines = ["path,labels", "black.png,"]
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(folder / "black.png")
    for name, (labels, *colour) in rows.items():
        for copy in range(2):
            pixels = np.full((6, 8, 3), colour, np.uint8)
            pixels[0, 0] = copy
            Image.fromarray(pixels).save(folder / f"{name}{copy}.png")
            lines.append(f"{name}{copy}.png,{labels}")
    table = folder / "colours.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def test_the_file_of_a_run_is_scored_on_labels(run: Path, tmp_path: Path) -> None:
    copy = threefold.open(shutil.copytree(run, tmp_path / "run"))
    write_label_model(copy.dir / "model.onnx")
    table = write_colours(tmp_path)
    paths = [tmp_path / f"{name}.png" for name in ("yellow0", "white0", "black")]

    score = copy.score(table)
    in_memory = copy.score(paths, [["green", "red"], ["blue", "green", "red"], []])

    assert isinstance(score, MultilabelScore)
    assert (score.n, score.subset_accuracy, score.macro_f1) == (5, 1, 1)
    assert isinstance(in_memory, MultilabelScore)
    assert (in_memory.n, in_memory.subset_accuracy) == (3, 1)
    with pytest.raises(DataError, match="one class for each image"):
        copy.score(folder_of_classes(tmp_path))


def folder_of_classes(folder: Path) -> Path:
    for name in ("red", "green"):
        (folder / "classes" / name).mkdir(parents=True)
        shutil.copy(folder / "black.png", folder / "classes" / name / "a.png")
    return folder / "classes"


def test_charts_are_drawn_or_refused_in_one_line(run: Path) -> None:
    opened = threefold.open(run)

    scores, calibration = opened.plot_scores().svg, opened.plot_calibration().svg

    assert "mean average precision" in scores
    for name in ("cat", "dog", "tree"):
        assert f">{name}</text>" in calibration
    with pytest.raises(RunError, match=r"needs one class for each image: .*; fix: use plot_cal"):
        opened.plot_confusion()
    with pytest.raises(RunError, match="no learning curves"):
        opened.plot_learning_curves()


def test_learning_curves_are_of_right_labels(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    epochs = [{"epoch": i, "select_accuracy": share} for i, share in enumerate((0.7, 0.8))]
    history = {"epochs": epochs, "accepted": True, "best_epoch": 1, "start_accuracy": 0.6}
    (copy / "jobs/a/fold0/one").mkdir(parents=True)
    write_json(copy / "jobs/a/fold0/one/history.json", history)

    curves = threefold.open(copy).plot_learning_curves().svg

    assert "Learning curve of a: share of right labels on the select rows" in curves


def test_the_report_shows_images_with_wrong_labels(run: Path, tmp_path: Path) -> None:
    folder = threefold.open(run).folder
    write_multilabel_report([folder], tmp_path / "report.html")
    chosen, page = folder.multilabel_chosen, Page(tmp_path / "report.html")
    wrong = (chosen.decided != chosen.targets).any(1)
    row = int(np.flatnonzero(wrong)[0])
    classes = folder.multilabel_results.classes

    assert f"{wrong.sum()} images of {TEST} got a label too few or too many" in page.text
    caption = page.text.partition(chosen.ids[row])[0].rpartition("png")[2]
    for j, name in enumerate(classes):
        true, given = bool(chosen.targets[row, j]), bool(chosen.decided[row, j])
        assert (f"missed {name} (" in caption) == (true and not given)
        assert (f"too many: {name} (" in caption) == (given and not true)
    page.needs_nothing_else()


def test_the_page_of_runs_has_the_mean_average_precision(run: Path, tmp_path: Path) -> None:
    found = describe_run(run)
    results = threefold.open(run).multilabel_results
    unfinished = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("results*"))

    assert results.expected is not None
    assert found["metric"] == describe_run(unfinished)["metric"] == "mAP"
    assert found["expected"]["value"] == results.expected.mean_average_precision
    assert found["expected"]["interval"] == list(results.expected.mean_average_precision_interval)
    values = [score["value"] for score in found["scores"] if score["rows"] == "test"]
    assert values == sorted(values, reverse=True)
    json.dumps(found)


def test_evaluate_says_which_images_it_leaves_out(run: Path, tmp_path: Path) -> None:
    alone = fake_label_run(tmp_path / "alone", test=False)

    whole = score_multilabel([run]).summary.warnings[0]
    without = score_multilabel([alone]).summary.warnings[0]
    shown = runner.invoke(app, ["evaluate", str(run)])

    unscored = "20 training images that no fold scores"
    test = f"{TEST} test images, whose scores are in the report"
    assert whole == f"labels: out-of-fold rows; left out: {unscored} and {test}"
    assert without == f"alone: out-of-fold rows; left out: {unscored}"
    assert "left out: 20 training images" in " ".join(shown.output.split())


def test_combining_a_run_takes_the_members_of_its_recipe(tmp_path: Path) -> None:
    folder = fake_label_run(tmp_path / "run", "ensemble.members=['b']")

    own, named = (
        combine_multilabel([folder], ["auto"]),
        combine_multilabel([folder], ["mean"], "ab"),
    )

    assert own.summary.combined == ("b",)
    assert named.summary.combined == ("a", "b")
    assert named.summary.chosen == "mean"
    assert "left out" in own.summary.warnings[0]


@pytest.mark.parametrize("export", ["auto", "mean", "best"])
def test_a_recipe_names_the_way_to_combine(export: str) -> None:
    assert label_recipe("x.csv", f"ensemble.export={export}").ensemble.export == export


def test_a_way_to_combine_of_one_class_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"ensemble.export = pool needs one class; set auto, mean"
    ):
        label_recipe("x.csv", "ensemble.export=pool")


def test_seeds_of_several_labels_are_refused_in_one_line(run: Path) -> None:
    pair = f"{run / 'oof.npz'}:a,{run / 'oof.npz'}:b"

    refused = runner.invoke(app, ["compare", pair, pair])

    assert "several seeds as one contender need one label per image" in str(refused.exception)


def test_a_search_is_refused_in_one_line(tmp_path: Path) -> None:
    from threefold.search import search  # with torch

    with pytest.raises(
        RecipeError, match=r"one class for each image: data\.task;.*compare RUN RUN"
    ):
        search(label_recipe("x.csv"), tmp_path / "out", ["train.batch_size=4,8"])

    assert not (tmp_path / "out").exists()
