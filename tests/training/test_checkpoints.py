"""A stage that is killed between two epochs, or stopped in one, resumes to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.stages import (
    Interrupter,
    build_tiny,
    interrupt,
    make_rows,
    make_task,
    stop_after,
    without_path,
)
from torch import Tensor, nn

from threefold.errors import RunError
from threefold.recipe.recipe import Job, Recipe
from threefold.training import job as job_module
from threefold.training.checkpoints import (
    ResumeState,
    fingerprint,
    load_resume_state,
    save_resume_state,
)
from threefold.training.jobs import train_members
from threefold.training.progress.watcher import Watcher
from threefold.training.run import Run
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageOutcome, StageTask


def assert_same(a: StageOutcome, b: StageOutcome) -> None:
    """Compare weights, answers and history, except for times."""
    timed = ("seconds", "images_per_second")
    histories = [
        [{k: v for k, v in record.items() if k not in timed} for record in o.history["epochs"]]
        for o in (a, b)
    ]
    assert histories[0] == histories[1]
    assert a.history["best_epoch"] == b.history["best_epoch"]
    assert (a.correct == b.correct).all()
    assert all(torch.equal(value, b.state[name]) for name, value in a.state.items())


class Uninterrupted:
    """Stages of three epochs, each trained once for all tests.

    Args:
        folder: keeps the measured precision, which all trainings of a stage share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: dict[tuple[str, ...], StageOutcome] = {}

    def task(self, sets: tuple[str, ...]) -> StageTask:
        """The stage of the tiny recipe with these changes."""
        precision_file = self.folder / "precision.json"
        return make_task("stages.one.epochs=3", *sets, precision_file=precision_file)

    def outcome(self, sets: tuple[str, ...]) -> StageOutcome:
        """What it results in where nothing stops it."""
        if sets not in self.outcomes:
            self.outcomes[sets] = train_stage(build_tiny(), self.task(sets))
        return self.outcomes[sets]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    return Uninterrupted(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("train.optimizer=adam-keras", "train.weight_decay=0"),
        ("train.optimizer=sgd", "train.sampler=balanced"),
        ("train.ema=0.9", "train.accumulate=2"),
        (
            "augment.crop=0.5",
            "augment.policy=trivialaugment",
            "augment.color=0.3",
            "augment.rotation=10",
            "augment.mixup=0.4",
            "augment.erasing=0.5",
        ),
        ("stages.one.lr=1.0", "stages.one.schedule=constant"),
        (
            "stages.one.batch_norm=fixed",
            "stages.one.patience=4",
            "train.sam=0.05",
            "train.ema=0.999",
            "train.accumulate=2",
            "train.clip_grad=1.0",
            "train.layer_decay=0.8",
            "train.label_smoothing=0.1",
            "train.metric=roc_auc",
            "train.precision=auto",
            "augment.crop=0.5",
            "augment.policy=randaugment",
            "augment.color=0.3",
            "augment.cutmix=1.0",
        ),
    ],
)
@pytest.mark.parametrize("is_stopped", [False, True])
def test_resumed_stage_equals_uninterrupted_one(
    sets: tuple[str, ...], is_stopped: bool, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    task = replace(
        uninterrupted.task(sets), resume_path=tmp_path / "job" / ".resume", save_interval=0.0
    )
    if is_stopped:
        stop_after(replace(task, save_interval=1000.0), steps=5)  # of three in an epoch
    else:
        interrupt(task, 2)
    watcher = Interrupter()

    resumed = train_stage(build_tiny(), replace(task, watcher=watcher))

    assert watcher.epochs == (2 if is_stopped else 1)
    assert watcher.images == 3 * 24  # the progress bar also counts what was done before
    assert resumed.elapsed_before > 0
    assert_same(resumed, uninterrupted.outcome(sets))


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_stage_stopped_at_any_step_resumes(steps: int, tmp_path: Path) -> None:
    """After a first step, at the end of an epoch, and at the end of the last one."""
    task = make_task("stages.one.epochs=2", resume_path=tmp_path / ".resume")
    stop_after(task, steps)

    resumed = train_stage(build_tiny(), task)

    assert_same(resumed, train_stage(build_tiny(), without_path(task)))


def test_a_stop_after_the_last_safe_point_is_not_forgotten() -> None:
    watcher = Watcher()

    with pytest.raises(KeyboardInterrupt), watcher.deferring_stop():
        watcher.stop = KeyboardInterrupt()

    assert not watcher.defers_stop


def test_later_stage_without_improvement_resumes(tmp_path: Path) -> None:
    task = make_task(
        "stages.one.epochs=3",
        "stages.one.lr=3.0",
        "stages.one.schedule=constant",
        "train.optimizer=sgd",
        first=False,
        resume_path=tmp_path / ".resume",
        save_interval=0.0,
    )
    interrupt(task, 2)

    resumed = train_stage(build_tiny(), task)

    assert resumed.history["best_epoch"] == -1
    assert_same(resumed, train_stage(build_tiny(), without_path(task)))


@pytest.mark.parametrize("epoch", [1, 2])
def test_patience_counts_the_epochs_before_a_resume(epoch: int, tmp_path: Path) -> None:
    ruinous = ("stages.one.lr=3.0", "stages.one.schedule=constant", "train.optimizer=sgd")
    task = make_task(
        *ruinous,
        "stages.one.epochs=9",
        "stages.one.patience=3",
        first=False,
        resume_path=tmp_path / ".resume",
        save_interval=0.0,
    )
    interrupt(task, epoch)

    resumed = train_stage(build_tiny(), task)

    assert resumed.history["stopped"]
    assert_same(resumed, train_stage(build_tiny(), without_path(task)))


def start_over(task: StageTask, member: nn.Module | None = None) -> bool:
    """Whether a stage of three epochs trains all of them."""
    watcher = Interrupter()
    train_stage(member or build_tiny(), replace(task, watcher=watcher))
    return watcher.epochs == 3


@pytest.fixture
def interrupted(tmp_path: Path) -> StageTask:
    """A stage of three epochs with a resume file after the second."""
    task = make_task("stages.one.epochs=3", resume_path=tmp_path / ".resume", save_interval=0.0)
    interrupt(task, 2)
    return task


@pytest.mark.parametrize("change", ["seed", "rows", "recipe"])
def test_resume_file_of_another_task_is_ignored(interrupted: StageTask, change: str) -> None:
    changes = {
        "seed": {"seed": 2},
        "rows": {"fit": make_rows(30, 0)},
        "recipe": {"recipe": make_task("stages.one.epochs=3", "train.weight_decay=0.5").recipe},
    }

    task = replace(interrupted, **changes[change])

    assert start_over(task)


def test_resume_file_of_other_start_weights_is_ignored(interrupted: StageTask) -> None:
    member = build_tiny()
    with torch.no_grad():
        next(member.parameters()).mul_(2)

    assert start_over(interrupted, member)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_resume_file_is_ignored(interrupted: StageTask, damage: str) -> None:
    path = interrupted.resume_path
    assert path is not None
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "cut":
        content = content[:-1]
    else:
        content.clear()
    path.write_bytes(content)

    assert start_over(interrupted)


@pytest.mark.parametrize(("epochs", "interval"), [(3, 1000.0), (1, 0.0)])
def test_no_resume_file_too_soon_or_at_the_end(
    epochs: int, interval: float, tmp_path: Path
) -> None:
    path = tmp_path / ".resume"
    task = make_task(f"stages.one.epochs={epochs}", resume_path=path, save_interval=interval)

    train_stage(build_tiny(), task)

    assert not path.exists()


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "a/b": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "c": torch.tensor(7),
    }


def test_resume_state_round_trip(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path, values = tmp_path / "a" / ".resume", {"x": 0.1 + 0.2, "n": [1, None, 2**40]}

    save_resume_state(path, "m", ResumeState(tensors, values))
    state = load_resume_state(path, "m")

    assert state is not None
    assert state.values == values
    assert all(torch.equal(state.tensors[name], value) for name, value in tensors.items())
    assert list(state.section("a")) == ["b"]
    assert load_resume_state(path, "other") is None


def test_unwritable_resume_file_is_an_error(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(RunError, match="cannot write"):
        save_resume_state(tmp_path / "file" / "below", "m", ResumeState(tensors, {}))


def test_fingerprint_covers_the_weights(tensors: dict[str, Tensor]) -> None:
    assert fingerprint("w", tensors) != fingerprint("w", {**tensors, "c": torch.tensor(8)})


def test_done_job_counts_seconds_before_resume(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def resumed(member: nn.Module, task: StageTask) -> StageOutcome:
        return replace(train_stage(member, task), elapsed_before=1000.0)

    monkeypatch.setattr(job_module, "train_stage", resumed)
    run = Run.create(tiny, tmp_path / "run")

    train_members(run)

    assert not list(run.dir.rglob(".resume"))
    assert run.folder.job_record(Job("plain", 0, "one")).seconds > 1000
