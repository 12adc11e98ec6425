"""Fixtures of several test files: a tiny folder of images, a tiny recipe and its finished run."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers with several threads each would compete for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from support.tiny_runs import make_folder, tiny_tree

from threefold.recipe.recipe import Recipe


def pytest_collection_finish() -> None:
    """Keep the garbage collector away from all that the imports made.

    Every full collection would go through it, and a test that runs short of memory makes several:
    2.8 s instead of 0.6 s.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the collector take what was kept from it: some libraries report it as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of features that belongs to this test session only."""
    os.environ["THREEFOLD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and test/ of three classes."""
    return make_folder(tmp_path_factory.mktemp("images"), per_class=12, test=4)


@pytest.fixture(scope="session")
def tiny(images: Path) -> Recipe:
    """The tiny recipe on the tiny folder."""
    return Recipe.parse(tiny_tree(images))


@pytest.fixture(scope="session")
def finished(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of the tiny recipe, exported and reported. Tests read it, none changes it."""
    from threefold import api

    run = api.train(tiny, tmp_path_factory.mktemp("runs") / "tiny")
    api.finish(run)
    return run
