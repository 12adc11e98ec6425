"""A plan states the memory that its run takes, and refuses what cannot fit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from support.tiny_runs import make_folder

from threefold.data.load import load_data
from threefold.errors import OutOfMemoryError
from threefold.machine import peak_memory
from threefold.recipe.recipe import Recipe
from threefold.training.features import store as feature_store
from threefold.training.features.cache import FeatureCache
from threefold.training.planning import memory
from threefold.training.planning.memory import predict_memory
from threefold.training.planning.plan import plan_folder

SMALL = ("members.0.weights=none", "members.0.img_size=32")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_recipe(root: Path, *heads: str) -> Recipe:
    """Members with these kinds of head on one frozen network without weights."""
    network = {"backbone": "test_efficientnet", "weights": "none", "img_size": 32}
    return Recipe.parse(
        {
            "data": {"source": "folder", "root": str(root)},
            "stages": [{"name": "head", "kind": "head"}],
            "members": [{"name": kind, **network, "head": {"kind": kind}} for kind in heads],
        }
    )


def test_the_header_of_a_plan_states_the_memory(tmp_path: Path) -> None:
    plan = plan_folder(make_folder(tmp_path, 4), 0, ("test_efficientnet",), SMALL, "fast")

    (line,) = [line for line in plan.explain().splitlines() if line.startswith("memory: ")]

    stated = float(re.findall(r"about ([\d.]+) GB", line)[0])
    assert stated == pytest.approx(peak_memory() / 1e9, abs=0.1)


@pytest.mark.parametrize(("heads", "copies"), [(("linear",), 3), (("gru",), 1)])
def test_features_of_all_images_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: tuple[str, ...], copies: int
) -> None:
    recipe = make_recipe(make_folder(tmp_path, 10), *heads)
    sources = load_data(recipe.data, recipe.seed)
    cache = FeatureCache(sources, recipe)
    features = cache.rows("train", recipe.members[0], np.arange(len(sources.train))).features
    monkeypatch.setattr(memory, "peak_memory", lambda: 10**9)
    # As if each image stood for ten million.
    size = cache.bytes_per_image(recipe.members[0])
    monkeypatch.setattr(cache, "bytes_per_image", lambda member: size * 10**7)
    monkeypatch.setattr(feature_store, "available_memory", lambda: 10**15)

    line = predict_memory(recipe, sources, cache)

    expected = 1 + copies * features.nbytes * 10**7 / 1e9
    assert line.startswith(f"memory: about {expected:.1f} GB at its peak; ")


def test_features_that_do_not_fit_are_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path, 4)
    monkeypatch.setattr(feature_store, "available_memory", lambda: 1000)

    with pytest.raises(OutOfMemoryError, match=r"do not fit.*12 images.*at most 0.0 GB.*fix"):
        plan_folder(folder, 0, ("test_efficientnet",), SMALL, "fast")
