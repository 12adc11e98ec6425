"""Runs from what is no folder: a table with the user's folds, an archive, data in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_runs import make_folder, tiny_tree

from threefold import api
from threefold.cli import app
from threefold.data.detect_source import detect_source
from threefold.data.in_memory import store_data
from threefold.errors import DataError, RunError
from threefold.recipe.recipe import Recipe
from threefold.training.run import Run

SETS = ("members.0.weights=none", "members.0.img_size=32", "features.engine=torch")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))


def fit(data: Path, out: Path) -> Run:
    return api.fit(
        data,
        out,
        budget=0,
        members="test_resnet",
        overrides=SETS,
        quality="fast",
        progress=False,
    )


def test_a_run_on_a_table_in_memory_with_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "finish", lambda run: None)  # export and report take longest
    root = make_folder(tmp_path / "photos", per_class=4)
    paths = sorted(root.rglob("*.png"))
    table = {
        "image_path": [Image.open(path) for path in paths],
        "species": [path.parent.name for path in paths],
        "fold": [i % 2 for i in range(len(paths))],
    }
    out = tmp_path / "my run"

    run = fit(store_data(table, None, out), out)

    oof = run.predictions("oof")
    assert [int(name[:7]) % 2 for name in oof.ids] == np.asarray(oof.folds).tolist()
    assert run.recipe.name == "my-run"
    assert Path(run.recipe.data.root).is_relative_to(out)
    table["species"] = table["species"][::-1]
    with pytest.raises(RunError, match="a run on other images"):
        store_data(table, None, out)

    shutil.rmtree(root)
    moved = Path(shutil.move(out, tmp_path / "moved"))
    table["species"] = table["species"][::-1]
    again = fit(store_data(table, None, moved), moved)
    assert again.results.chosen == run.results.chosen
    assert len(Run.open(moved).sources.train) == len(paths)


def test_a_plan_for_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path / "photos", per_class=4)
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", root))
    shutil.rmtree(root)

    app.plan(str(archive), "0", "fast", "test_resnet", [*SETS, "folds.scheme=stratified"])
    (tmp_path / "recipe.toml").write_text(capsys.readouterr().out)
    planned = Recipe.load(tmp_path / "recipe.toml")
    assert planned.data.root == str(archive)


def test_a_folder_with_a_table_inside_is_that_of_its_run(tmp_path: Path) -> None:
    """The recipe names the table; `fit` on the folder again goes on, here to the lost images."""
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "data/train.csv").write_text("image,label\n0.png,a\n1.png,b\n")
    spec = detect_source(tmp_path / "data")
    tree = tiny_tree(Path(spec.root), data={"source": spec.source, "root": spec.root})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.toml").write_text(Recipe.parse(tree).dump())

    with pytest.raises(DataError, match=r"0\.png"):
        api.fit(tmp_path / "data", tmp_path / "run", progress=False)
