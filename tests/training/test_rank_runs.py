"""Two processes over gloo: the numbers of one, a stop in the middle, and a rank that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.rank_stages import QUIET, SCENARIOS, quiet, train_scenarios
from support.ranks import run_on_ranks, start_ranks
from support.stages import Stopper, build_tiny
from support.tiny_runs import make_folder, tiny_tree

from threefold.json_files import read_json
from threefold.npz_files import read_arrays
from threefold.recipe.recipe import Recipe
from threefold.training.stages.loop import train_stage

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and signals of POSIX")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process and two write about the same stages."""
    root = tmp_path_factory.mktemp("ranks")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train_scenarios(root / "one")
    torch.set_num_threads(before)
    run_on_ranks(2, "support.rank_stages:train_scenarios", root / "two")
    return root / "one", root / "two"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SCENARIOS, "head"])
def test_two_processes_train_as_one(name: str, folders: tuple[Path, Path]) -> None:
    one, two = (read_json(folder / f"{name}.json") for folder in folders)
    weights = [load_file(folder / f"{name}.safetensors") for folder in folders]

    assert two["processes"] == 2
    # One of 171 weights more or less, where a layer has no even number of rows.
    assert two["weights_share"] == pytest.approx(0.5 if name.startswith("sharded") else 1, abs=0.05)
    assert one["best_epoch"] == two["best_epoch"]
    for alone, shared in zip(one["epochs"], two["epochs"], strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-6)
        assert shared["select_loss"] == pytest.approx(alone["select_loss"], abs=1e-6)
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_predict_as_one(folders: tuple[Path, Path]) -> None:
    one, two = (read_arrays(folder / "probs.npz")["probs"] for folder in folders)

    assert len(one) == 13
    np.testing.assert_allclose(two, one, atol=1e-5)


@pytest.mark.slow
def test_two_processes_compute_the_features_of_one(folders: tuple[Path, Path]) -> None:
    one, two = (read_arrays(folder / "probs.npz")["features"] for folder in folders)

    assert len(one) == 42  # images and copies
    np.testing.assert_array_equal(two, one)


@pytest.mark.long
def test_a_stopped_stage_goes_on(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    with pytest.raises(AssertionError, match="a signal"):
        run_on_ranks(2, "support.rank_stages:stop_in_the_middle", tmp_path)
    with pytest.raises(AssertionError, match="a signal"):
        run_on_ranks(2, "support.rank_stages:stop_divided", tmp_path)
    with pytest.raises(KeyboardInterrupt, match="a signal"):
        train_stage(build_tiny("plain", *QUIET), replace(quiet(tmp_path), watcher=Stopper(5)))

    run_on_ranks(2, "support.rank_stages:train_saved", tmp_path)

    for task in ("noisy", "divided"):
        whole, resumed = (load_file(f / f"{task}.safetensors") for f in (folders[1], tmp_path))
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    # Two processes go on from where one has stopped.
    whole, resumed = (load_file(f / "quiet.safetensors") for f in (folders[0], tmp_path))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_a_killed_rank_ends_the_group_and_it_goes_on(tmp_path: Path) -> None:
    tree = tiny_tree(make_folder(tmp_path / "images"))
    tree["members"] = tree["members"][:1]
    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(Recipe.parse(tree).dump())
    command = [sys.executable, "-m", "threefold", "train", str(recipe), "--out", str(out)]
    first, second = start_ranks(2, *command)
    while not list(out.glob("jobs/*/*/one/done.json")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)

    os.kill(second.pid, signal.SIGKILL)
    printed, errors = first.communicate(timeout=600)
    second.communicate()

    assert first.returncode == 1, printed + errors
    lines = [line for line in errors.splitlines() if line]
    assert len(lines) == 1, errors
    assert lines[0].startswith("error another process of the group has ended: one of 2")
    assert not (out / "results.json").exists()
    again = subprocess.run([*command, "--processes", "2"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (out / "report.html").exists()
    histories = [read_json(path) for path in sorted(out.glob("jobs/*/*/*/history.json"))]
    assert [history["processes"] for history in histories] == [2, 2, 2, 2]
