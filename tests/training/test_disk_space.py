"""The disk that decoded images take is known, and asked for, before any image is decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.notes import Notes
from support.tiny_runs import make_folder, tiny_tree

from threefold.errors import RunError
from threefold.recipe.recipe import Recipe
from threefold.training import disk_space
from threefold.training.disk_space import check_space, image_cache_bytes
from threefold.training.jobs import train_members
from threefold.training.run import Run


def make_run(folder: Path, *sets: str) -> Run:
    images = make_folder(folder / "images", 8)
    return Run.create(Recipe.parse(tiny_tree(images), sets), folder / "run", Notes())


@pytest.mark.parametrize(
    "sets",
    [
        ("views.upsample=1.5",),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("views.kind=flip",), marks=pytest.mark.slow),
    ],
)
def test_the_files_that_training_writes_are_foretold(tmp_path: Path, sets: tuple[str, ...]) -> None:
    run = make_run(tmp_path, *sets)
    foretold = image_cache_bytes(run.recipe, run.all_sources)

    train_members(run, keep_cache=True)

    written = {path.name: path.stat().st_size for path in (run.dir / "cache").glob("*.npy")}
    assert written.keys() == foretold.keys()
    assert all(0 <= size - foretold[name] < 512 for name, size in written.items())  # the header


def test_stages_on_cached_activations_need_no_room(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    cached = {"cached": True, "batch_norm": "fixed", "frozen": "backbone"}

    stages = tuple(stage.model_copy(update=cached) for stage in run.recipe.stages)

    assert image_cache_bytes(run.recipe.model_copy(update={"stages": stages}), run.sources) == {}


def test_a_run_does_not_begin_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    needed = sum(image_cache_bytes(run.recipe, run.all_sources).values())
    monkeypatch.setattr(disk_space, "free_disk", lambda folder: needed - 1)

    with pytest.raises(RunError, match=r"do not fit on the disk: .*fix: free disk space"):
        train_members(run)

    assert not (run.dir / "cache").exists()
    monkeypatch.setattr(disk_space, "free_disk", lambda folder: needed)
    check_space(run)


def test_what_an_earlier_process_wrote_needs_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    for name in image_cache_bytes(run.recipe, run.all_sources):
        (run.dir / "cache").mkdir(exist_ok=True)
        (run.dir / "cache" / name).touch()
    monkeypatch.setattr(disk_space, "free_disk", lambda folder: 0)

    check_space(run)


def test_a_large_run_says_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr(disk_space, "WORTH_A_NOTE", 1)

    check_space(run)

    assert isinstance(run.watcher, Notes)
    assert run.watcher.has("decoded images take 0.0 GB", "while it trains")
