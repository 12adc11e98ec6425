"""A search chooses on out-of-fold rows, opens the test once, and resumes to the same trials."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from support.tiny_runs import make_folder, tiny_tree

from threefold.errors import MissingExtraError, RecipeError, RunError
from threefold.json_files import read_json
from threefold.recipe.recipe import Recipe
from threefold.search import Choices, choose_trial, parse_space, search

SPACE = ("stages.one.lr=1e-4..1e-2", "train.batch_size=6,12")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    tree = tiny_tree(make_folder(tmp_path / "images", per_class=8, test=3))
    return Recipe.parse(tree | {"members": tree["members"][:1], "stages": tree["stages"][:1]})


def test_ranges_and_values_are_read() -> None:
    rate, size, units, name = parse_space(
        ["stages.one.lr=1e-4..1e-2", "train.batch_size=16,32", "x.units=16..20", "y=a,b"]
    )

    assert rate == Choices("stages.one.lr", (), 1e-4, 1e-2, whole=False, log=True)
    assert size == Choices("train.batch_size", (16, 32))
    assert units == Choices("x.units", (), 16, 20, whole=True, log=False)
    assert name.values == ("a", "b")


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["train.batch_size"],
        ["train.batch_size=16"],
        ["train.lr=3..1"],
        ["train.lr=a..b"],
        ["a=1,2", "a=3,4"],
        ["seed=1,2"],
        ["folds.k=2,3"],
        ["data.limit_per_class=5,10"],
        ["train.metric=accuracy,log_loss"],
    ],
)
def test_unusable_space_is_refused(texts: list[str]) -> None:
    with pytest.raises(RecipeError, match="--space"):
        parse_space(texts)


def test_missing_optuna_names_the_extra(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)

    with pytest.raises(MissingExtraError, match=r"pip install .*\[search\]'"):
        search(recipe, tmp_path / "out", SPACE)


def test_noise_seldom_replaces_the_recipe() -> None:
    """Twenty equal trials: the recipe as it is stays five times of six."""
    rng = np.random.default_rng(0)

    kept = [choose_trial(rng.gamma(1.0, 0.5, (20, 400))) == 0 for _ in range(200)]

    assert np.mean(kept) > 0.7


def test_clear_lead_replaces_the_recipe() -> None:
    losses = np.random.default_rng(0).gamma(1.0, 0.5, (20, 400))
    losses[7] = losses[0] - 0.2

    assert choose_trial(losses) == 7


def test_a_search_that_is_stopped_in_its_first_trial_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threefold.search.train_members", Mock(side_effect=KeyboardInterrupt))

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(recipe, tmp_path / "search", SPACE, trials=2)

    with pytest.raises(RunError, match="another search"):
        search(recipe, tmp_path / "search", SPACE[:1], trials=2)


@pytest.mark.slow
def test_search_resumes_and_opens_the_test_once(recipe: Recipe, tmp_path: Path) -> None:
    whole = search(recipe, tmp_path / "whole", SPACE, trials=4)
    search(recipe, tmp_path / "parts", SPACE, trials=2)

    parts = search(recipe, tmp_path / "parts", SPACE, trials=4)

    assert parts.trials == whole.trials
    assert parts.chosen == whole.chosen
    assert whole.trials[0].overrides == ()
    assert len({trial.overrides for trial in whole.trials}) == 4
    opened = [
        path.parent.name
        for path in sorted((tmp_path / "whole" / "trials").glob("*/ledger.json"))
        if read_json(path)
    ]
    sealed = set(range(4)) - {whole.chosen}
    folders = [tmp_path / "whole" / "trials" / f"{n:03d}" for n in sealed]
    assert not any((folder / "results.json").exists() for folder in folders), opened
    assert whole.run.results.test_opened is not None
    assert whole.run.results.test_opened.times == 1
    assert (whole.run.dir / "model.onnx").exists()
    assert any(line.choice == "trial" for line in whole.run.results.optimism)
    with pytest.raises(RunError, match="another search"):
        search(recipe, tmp_path / "whole", SPACE[:1], trials=2)
