"""A shortage of memory: the same batch in smaller parts, recorded; the bits of such parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.notes import Notes
from support.stages import Stopper, build_tiny, make_task
from torch import nn

from threefold.errors import OutOfMemoryError
from threefold.models.member import Member
from threefold.recipe.recipe import Job
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageOutcome
from threefold.training.steps.memory import memory_notes

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
)
SHORT = "stages.one.epochs=1"
MIXED = (SHORT, "augment.mixup=0.5", "augment.erasing=0.5")


def limited(limit: int, error: Exception = CPU, after: int = 0) -> Member:
    """Build the tiny network, which fails while it is trained on more images than `limit`.

    It fails behind its first layers, so that batch norm has seen the images already.
    """
    member, calls = build_tiny(), 0

    def fail(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += module.training
        if module.training and calls > after and len(inputs[0]) > limit:
            raise error

    member.head.register_forward_pre_hook(fail)
    return member


@pytest.fixture(scope="module")
def in_four_parts() -> StageOutcome:
    """A stage whose batches of 8 images are computed in four parts."""
    return train_stage(build_tiny(), make_task(*MIXED, "train.accumulate=4"))


@pytest.mark.parametrize(
    "error",
    [
        CUDA,
        pytest.param(CPU, marks=pytest.mark.slow),
        pytest.param(MemoryError(), marks=pytest.mark.slow),
    ],
)
def test_a_batch_that_does_not_fit_is_halved(error: Exception, in_four_parts: StageOutcome) -> None:
    notes = Notes()

    outcome = train_stage(limited(2, error), make_task(*MIXED, watcher=notes))

    for name, tensor in in_four_parts.state.items():
        assert torch.equal(outcome.state[name], tensor), name
    assert outcome.history["splits"] == [
        {"step": 0, "images": 8, "parts": 2},
        {"step": 0, "images": 8, "parts": 4},
    ]
    said = "batches of 8 images are computed in 4 parts of 2, which batch norm sees by themselves"
    assert said in outcome.history["reason"]
    assert said in notes.notes[-1]


def test_later_steps_keep_the_smaller_parts() -> None:
    outcome = train_stage(limited(4, after=4), make_task())

    assert outcome.history["splits"] == [{"step": 4, "images": 8, "parts": 2}]


def test_a_shortage_leaves_no_trace_where_parts_were_enough() -> None:
    outcome = train_stage(limited(4), make_task(SHORT, "train.accumulate=2"))

    assert outcome.history["splits"] == []
    assert outcome.history["reason"] == "first stage"


def test_two_images_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(OutOfMemoryError, match="not even for 2 images at once"):
        train_stage(limited(1), make_task())


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="a fault"):
        train_stage(limited(4, RuntimeError("a fault")), make_task())


@pytest.mark.slow
def test_a_resumed_stage_keeps_the_parts(tmp_path: Path) -> None:
    whole = train_stage(limited(4), make_task(SHORT))
    task = make_task(SHORT, resume_path=tmp_path / ".resume")
    with pytest.raises(KeyboardInterrupt, match="a signal"):
        train_stage(limited(4), replace(task, watcher=Stopper(2)))

    resumed = train_stage(build_tiny(), task)  # now there would be enough memory

    for name, tensor in whole.state.items():
        assert torch.equal(resumed.state[name], tensor), name
    assert resumed.history["splits"] == whole.history["splits"]


def test_a_shortage_in_the_second_pass_of_sam_moves_no_weight() -> None:
    sets = (SHORT, "train.sam=0.05")
    parts = train_stage(build_tiny(), make_task(*sets, "train.accumulate=2"))

    outcome = train_stage(limited(4, after=1), make_task(*sets))

    assert outcome.history["splits"] == [{"step": 0, "images": 8, "parts": 2}]
    for name, tensor in parts.state.items():
        assert torch.equal(outcome.state[name], tensor), name


def test_results_name_the_jobs() -> None:
    splits = [{"step": 3, "images": 32, "parts": 2}]
    histories = {Job("a", 0, "one"): {"splits": splits}, Job("a", 1, "one"): {}}

    assert memory_notes(histories) == [
        "training met a shortage of memory: a/fold0/one: memory was short: from step 3 on, batches "
        "of 32 images are computed in 2 parts of 16"
    ]
