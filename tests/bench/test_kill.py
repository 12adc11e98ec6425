"""A kill at any moment: the old file or the new one, and then the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_runs import make_folder, tiny_tree

from threefold.data.group_file import GROUP_FILE, write_groups
from threefold.data.load import load_data
from threefold.exporting.onnx_files import write_file
from threefold.files import write_bytes
from threefold.json_files import read_json, write_json
from threefold.models.views import Views
from threefold.npz_files import read_arrays, write_arrays
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Job, Recipe
from threefold.training.checkpoints import ResumeState, load_resume_state, save_resume_state
from threefold.training.features.store import FeatureStore
from threefold.training.pixel_cache import PixelCache

DEAD = 2**22 + 1
"""The number of a process beyond any of Linux."""

BENCH = Path(__file__).parents[2] / "bench"


def write_resume_state(path: Path, value: int) -> None:
    save_resume_state(path, "mark", ResumeState({"a": torch.full((99,), value)}, {"b": value}))


def read_resume_state(path: Path) -> int:
    state = load_resume_state(path, "mark")
    assert state is not None
    assert state.tensors["a"].unique().tolist() == [state.values["b"]]
    return int(state.values["b"])


WRITERS: dict[str, tuple[Callable[[Path, int], Any], Callable[[Path], int]]] = {
    "bytes": (
        lambda path, value: write_bytes(path, b"%d" % value * 100),
        lambda path: int(path.read_bytes()[:1]) if len(path.read_bytes()) == 100 else -1,
    ),
    "json": (lambda path, value: write_json(path, [value] * 99), lambda path: read_json(path)[98]),
    "arrays": (
        lambda path, value: write_arrays(path, a=np.full(99, value)),
        lambda path: int(read_arrays(path)["a"].max()),
    ),
    "state of a stage": (write_resume_state, read_resume_state),
    "model": (
        lambda path, value: write_file(path, b"%d" % value * 100),
        lambda path: int(path.read_bytes()[:1]) if len(path.read_bytes()) == 100 else -1,
    ),
}
"""Writers of a file, and what reads the value that was written."""


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """A function that does something, and returns the states that a kill on the way leaves."""
    monkeypatch.syspath_prepend(BENCH)
    from kill_child import CHANGES, Recorder

    def do(action: Callable[[], object]) -> list[Path]:
        recorder = Recorder(tmp_path / "folder", tmp_path / "copies")
        with monkeypatch.context() as patches:
            for name in CHANGES:
                patches.setattr(os, name, recorder.watched(name, getattr(os, name)))
            action()
        states = sorted((tmp_path / "copies").iterdir())
        for state in states:  # as if the process that wrote them were dead
            for path in [*state.rglob(f".*-{os.getpid()}.*.tmp")]:
                path.rename(path.with_name(path.name.replace(f"-{os.getpid()}.", f"-{DEAD}.")))
        return states

    (tmp_path / "folder").mkdir()
    return do


@pytest.mark.parametrize("kind", WRITERS)
def test_a_kill_leaves_the_old_file_or_the_new_one(
    kind: str, tmp_path: Path, record: Callable[..., list[Path]]
) -> None:
    write, read = WRITERS[kind]
    path = tmp_path / "folder" / "file"
    write(path, 1)

    states = record(lambda: write(path, 2))

    values = [read(state / "file") for state in states] + [read(path)]
    assert any(state.name.endswith("half") for state in states)
    assert sorted(values) == values
    assert set(values) == {1, 2}


def test_only_times_may_differ_between_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from kill_compare import hash_arrays

    def digest(probs: np.ndarray, **summary: Any) -> str:
        write_arrays(tmp_path / "a.npz", probs=probs, summary=np.array(json.dumps(summary)))
        return hash_arrays(tmp_path / "a.npz")

    probs = np.ones((2, 3), dtype=np.float32)
    expected = digest(probs, accuracy=0.5, seconds=1.0)

    assert digest(probs, accuracy=0.5, seconds=2.0) == expected
    assert digest(probs, accuracy=0.6, seconds=1.0) != expected
    assert digest(probs * 2, accuracy=0.5, seconds=1.0) != expected
    assert digest(probs.astype(np.float64), accuracy=0.5, seconds=1.0) != expected
    assert digest(probs.reshape(3, 2), accuracy=0.5, seconds=1.0) != expected


def test_a_run_begins_after_a_kill_at_its_beginning(
    tmp_path: Path, record: Callable[..., list[Path]]
) -> None:
    recipe = Recipe.parse(tiny_tree(tmp_path))

    def begin() -> None:
        write_groups(tmp_path / "folder" / GROUP_FILE, ["a", "b"], ["g", "h"])
        RunFolder.create(tmp_path / "folder", recipe)

    for state in record(begin):
        RunFolder.create(state, recipe)

        names = {path.name for path in state.iterdir() if "manifest" not in path.name}
        assert names <= {GROUP_FILE, "recipe.toml"}


def test_a_kill_leaves_a_job_done_and_sound_or_not_done(
    tmp_path: Path, record: Callable[..., list[Path]]
) -> None:
    recipe = Recipe.parse(tiny_tree(tmp_path))
    run, job = RunFolder(tmp_path / "folder", recipe), Job("plain", 0, "one")

    def do_job() -> None:
        write_bytes(run.job_folder(job) / "weights.safetensors", b"weights")
        write_arrays(run.job_folder(job) / "probs.npz", a=np.arange(9))
        run.finish_job(job, 1.0)

    states = [*record(do_job), run.path]

    done = [RunFolder(state, recipe).is_done(job) for state in states]
    assert sorted(done) == done
    assert done[0] != done[-1]
    RunFolder(states[done.index(True)], recipe).verify_job(job)


def test_a_kill_leaves_no_wrong_image_or_feature(
    tmp_path: Path, record: Callable[..., list[Path]]
) -> None:
    recipe = Recipe.parse(tiny_tree(make_folder(tmp_path / "images", 3)))
    sources, spec = load_data(recipe.data, 0), recipe.members[0]

    def squares(folder: Path) -> np.ndarray:
        cache = PixelCache(sources, lambda s: Views(recipe.views, s.img_size, 0), folder)
        return cache.rows("train", spec, np.arange(9)).pixels[:]

    def fill() -> None:
        squares(tmp_path / "folder" / "squares")
        store = FeatureStore(tmp_path / "folder", "store")
        for first in ("a", "c"):
            store.write([first, first + "2"], np.full((2, 4), ord(first), np.float16))

    states = record(fill)

    right = squares(tmp_path / "folder" / "squares")
    for state in states[:: max(1, len(states) // 8)]:
        assert np.array_equal(squares(state / "squares"), right)
        store = FeatureStore(state, "store")
        there = [name for name in ("a", "a2", "c", "c2") if name not in store.missing([name])]
        assert (store.read(there) == [[ord(name[0])] * 4 for name in there]).all()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--kills", "3"], marks=pytest.mark.slow),
        pytest.param(["--walk", "--every", "40"], marks=pytest.mark.long),
    ],
)
def test_a_killed_run_ends_at_the_same_bits(options: list[str], tmp_path: Path) -> None:
    table = tmp_path / "kill.json"
    command = [sys.executable, str(BENCH / "kill.py"), "--only", "train", "--json", str(table)]

    done = subprocess.run([*command, *options], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads(table.read_text())["train"]
    assert sum(tally["kills"].values()) >= 3
    assert tally["faults"] == 0
