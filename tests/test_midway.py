"""A stage that is killed between two epochs goes on to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stages import data, fresh, task

from threefold import jobs, midway
from threefold.errors import RunError
from threefold.midway import Midway, load_midway, mark_of, save_midway
from threefold.recipe import Job, Recipe
from threefold.run import Run
from threefold.stages import StageOutcome, StageTask, train_stage
from threefold.training__watcher import Watcher


class Stop(Watcher):
    """Ends training in an epoch, and counts the images of all."""

    def __init__(self, epoch: int = -1) -> None:
        self.at, self.seen, self.images = epoch, 0, 0

    def batch(self, images: int) -> None:
        if self.seen == self.at:
            raise KeyboardInterrupt
        self.images += images

    def epoch(self, record: dict[str, Any]) -> None:
        self.seen += 1


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(midway, "EVERY", 0.0)


def killed(whole: StageTask, path: Path, epoch: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_stage(fresh(), replace(whole, keep=path, watcher=Stop(epoch)))


def same(a: StageOutcome, b: StageOutcome) -> bool:
    timed = ("seconds", "images_per_second")
    lines = [
        [{k: v for k, v in record.items() if k not in timed} for record in o.history["epochs"]]
        for o in (a, b)
    ]
    weights = all(torch.equal(value, b.state[name]) for name, value in a.state.items())
    return (
        weights
        and lines[0] == lines[1]
        and a.history["best_epoch"] == b.history["best_epoch"]
        and bool((a.hits == b.hits).all())
    )


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("train.optimizer=adam-keras", "train.weight_decay=0"),
        ("train.optimizer=sgd", "train.sampler=balanced"),
        ("train.ema=0.9", "train.accumulate=2"),
        ("augment.rotation=10", "augment.mixup=0.4", "augment.erasing=0.5"),
        ("stages.one.lr=1.0", "stages.one.schedule=constant"),
    ],
)
@pytest.mark.parametrize("epoch", [1, 3])
def test_killed_and_begun_again_is_uninterrupted_bit_for_bit(
    sets: tuple[str, ...], epoch: int, tmp_path: Path
) -> None:
    whole = task("stages.one.epochs=4", *sets)
    path = tmp_path / "job" / ".midway"
    killed(whole, path, epoch)
    watcher = Stop()
    again = train_stage(fresh(), replace(whole, keep=path, watcher=watcher))
    assert (
        watcher.seen == 4 - epoch
    )  # the epochs before are not trained again, and the bar counts them all the same
    assert watcher.images == 4 * 24
    assert again.earlier > 0
    assert same(again, train_stage(fresh(), whole))


def test_a_later_stage_that_never_was_better_goes_on_too(tmp_path: Path) -> None:
    whole = task(
        "stages.one.epochs=3",
        "stages.one.lr=3.0",
        "stages.one.schedule=constant",
        "train.optimizer=sgd",
        first=False,
    )
    killed(whole, tmp_path / ".midway", 2)
    again = train_stage(fresh(), replace(whole, keep=tmp_path / ".midway"))
    assert again.history["best_epoch"] == -1
    assert same(again, train_stage(fresh(), whole))


@pytest.mark.parametrize("other", ["seed", "rows", "recipe", "start", "flip", "cut", "empty"])
def test_a_file_of_another_stage_or_a_damaged_one_is_as_none(other: str, tmp_path: Path) -> None:
    whole, path, member = task("stages.one.epochs=3"), tmp_path / ".midway", fresh()
    killed(whole, path, 2)
    content = path.read_bytes()
    if other == "seed":
        whole = replace(whole, seed=2)
    elif other == "rows":
        whole = replace(whole, fit=data(30, 0))
    elif other == "recipe":
        whole = task("stages.one.epochs=3", "train.weight_decay=0.5")
    elif other == "start":
        with torch.no_grad():
            next(member.parameters()).mul_(2)
    else:
        flipped = bytes([content[len(content) // 2] ^ 1])
        middle = len(content) // 2
        path.write_bytes(
            {
                "flip": content[:middle] + flipped + content[middle + 1 :],
                "cut": content[:-1],
                "empty": b"",
            }[other]
        )
    watcher = Stop()
    train_stage(member, replace(whole, keep=path, watcher=watcher))
    assert watcher.seen == 3


def test_it_is_written_at_most_once_in_a_while_and_not_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(midway, "EVERY", 1000.0)
    path = tmp_path / ".midway"
    train_stage(fresh(), replace(task("stages.one.epochs=3"), keep=path))
    assert not path.exists()
    monkeypatch.setattr(midway, "EVERY", 0.0)
    train_stage(fresh(), replace(task("stages.one.epochs=1"), keep=path))
    assert not path.exists()


def test_values_come_back_as_they_were_and_a_full_disk_is_told(tmp_path: Path) -> None:
    path, values = tmp_path / "a" / ".midway", {"x": 0.1 + 0.2, "n": [1, None, 2**40]}
    tensors = {
        "a/b": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "c": torch.tensor(7),
    }
    save_midway(path, "m", Midway(tensors, values))
    found = load_midway(path, "m")
    assert found is not None
    assert found.values == values
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors.items())
    assert list(found.part("a")) == ["b"]
    assert load_midway(path, "other") is None
    assert mark_of("w", tensors) != mark_of("w", {**tensors, "c": torch.tensor(8)})
    with pytest.raises(RunError, match="cannot write"):
        save_midway(path / "below", "m", Midway(tensors, values))


def test_a_job_leaves_no_such_file_and_counts_the_seconds_before(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = jobs.train_stage
    monkeypatch.setattr(
        jobs, "train_stage", lambda member, one: replace(real(member, one), earlier=1000.0)
    )
    run = Run.create(tiny, tmp_path / "run")
    jobs.train_members(run)
    assert not list(run.dir.rglob(".midway"))
    job = Job("plain", 0, "one")
    assert jobs.read_json(run.folder.job_folder(job) / "done.json")["seconds"] > 1000
