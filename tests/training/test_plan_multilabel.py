"""The plan of images with any number of labels: the task is found, said, and can be overruled."""

from __future__ import annotations

from pathlib import Path

import pytest

from threefold import api
from threefold.data.shapes import SHAPES, write_shapes
from threefold.errors import DataError, RecipeError, RunError
from threefold.predictions.multilabel import MultilabelPredictions
from threefold.predictions.multilabel_results import MultilabelResults
from threefold.search import search
from threefold.training.distillation import open_teacher
from threefold.training.planning.plan import plan_folder
from threefold.training.run import Run

TINY = ("test_efficientnet",)
SETS = (
    "members.0.weights=none",
    "train.device=cpu",
    "train.precision=float32",
    "features.engine=torch",
)
SIZED = (*SETS, "members.0.img_size=32")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
def test_the_task_of_a_table_is_found_and_said(tmp_path: Path) -> None:
    table = write_shapes(tmp_path, 40, size=40)

    plan = plan_folder(table, 0, TINY, SETS, group_file=tmp_path / "groups.csv")

    decisions = {decision.key: decision for decision in plan.decisions}
    assert "have several labels in the 4 columns of 0 and 1" in decisions["data.task"].reason
    assert plan.recipe.data.task == "multilabel"
    assert plan.recipe.train.metric == "mean_average_precision"
    assert plan.recipe.train.label_smoothing == 0
    assert plan.recipe.ensemble.methods == ("mean", "best")
    assert "log loss and mean average precision of a probe" in decisions["img_size"].reason
    assert "mAP 0." in decisions["img_size"].reason
    assert "scenes are not looked for" in decisions["folds.scheme"].reason
    assert plan.sources is not None
    assert plan.sources.train.classes == SHAPES


def test_a_separator_is_found_and_written_down(tmp_path: Path) -> None:
    table = write_shapes(tmp_path, 40, size=40)
    cells = [line.split(",") for line in table.read_text().splitlines()[1:]]
    names = [";".join(n for n, c in zip(SHAPES, row[1:], strict=True) if c == "1") for row in cells]
    rows = [f"{row[0]},{name}" for row, name in zip(cells, names, strict=True)]
    table.write_text("\n".join(["path,tags", *rows]))

    plan = plan_folder(table, 0, TINY, SIZED)

    assert plan.recipe.data.label_separator == ";"
    assert plan.recipe.folds.k == 5
    with pytest.raises(DataError, match=r"invalid row.*label not empty"):
        plan_folder(table, 0, TINY, (*SIZED, "data.task=multiclass"))


def test_copies_share_a_fold(tmp_path: Path) -> None:
    table = write_shapes(tmp_path, 40, size=40)
    for i in range(4):
        content = (tmp_path / "images" / f"{i:05d}.png").read_bytes()
        (tmp_path / "images" / f"{i + 20:05d}.png").write_bytes(content)

    plan = plan_folder(table, 0, TINY, SIZED, group_file=tmp_path / "groups.csv")

    assert plan.recipe.folds.scheme == "grouped"
    assert plan.sources is not None
    assert plan.sources.train.groups is not None
    assert len(set(plan.sources.train.groups)) == 36


@pytest.mark.slow
def test_fit_from_a_table_to_a_finished_run(tmp_path: Path) -> None:
    table = write_shapes(tmp_path / "shapes", 90, test=30, size=40)
    sets = (*SIZED, "stages.tune1.epochs=2", "stages.tune2.epochs=1", "folds.k=2")

    run = api.fit(table, tmp_path / "run", budget=0, members=TINY, overrides=sets, progress=False)

    results = run.folder.any_results
    assert isinstance(results, MultilabelResults)
    assert results.expected is not None
    assert results.expected.rows == "test"
    assert 0.3 < results.expected.mean_average_precision <= 1
    assert {score.kind for score in results.scores} == {"member", "ensemble"}
    assert [opening for opening in (results.test_opened,) if opening] != []
    assert (run.dir / "model.onnx").exists()
    assert (run.dir / "report.html").exists()
    oof = MultilabelPredictions.load(run.dir / "oof.npz")
    assert oof.probs.shape == (2, 90, 4)
    again = api.fit(table, tmp_path / "run", budget=0, members=TINY, progress=False)
    assert again.folder.any_results.scores == results.scores


def test_verbs_for_one_class_refuse_the_run(tmp_path: Path) -> None:
    table = write_shapes(tmp_path, 40, size=40)
    recipe = plan_folder(table, 0, TINY, SIZED).recipe
    run = Run.create(recipe, tmp_path / "run")
    pytest.importorskip("optuna")

    with pytest.raises(RecipeError, match="a search compares answers of one class"):
        search(recipe, tmp_path / "search", ["train.batch_size=8,16"])
    with pytest.raises(RunError, match="not complete"):
        open_teacher(run.dir)
