"""Losses and gradients that are not finite: left out, then a return to the best weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stages import Stopper, build_tiny, make_task
from torch import Tensor, nn

from threefold.errors import RunError
from threefold.models.member import Member
from threefold.recipe.recipe import Job
from threefold.training.stages.loop import StageLoop, train_stage
from threefold.training.stages.recovery import recovery_notes
from threefold.training.stages.task import StageOutcome

LOSS, GRADIENT = "loss", "gradient"
ALWAYS = range(10_000)


def spoil(member: Member, steps: Collection[int], what: str = LOSS, begin: int = 0) -> Member:
    """Make what a network answers, or the gradient of it, NaN in some training steps.

    Args:
        member: the network.
        steps: numbers of the steps, from 0.
        what: the loss or only the gradient.
        begin: steps before the first call.
    """
    count = begin

    def hook(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
        nonlocal count
        if not torch.is_grad_enabled():
            return logits
        count += 1
        if count - 1 not in steps:
            return logits
        if what == LOSS:
            return logits * torch.nan
        logits.register_hook(lambda gradient: gradient * torch.nan)
        return logits

    member.register_forward_hook(hook)
    return member


def snapshot(member: Member) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in member.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("what", [LOSS, GRADIENT])
def test_a_step_that_is_not_finite_changes_nothing(what: str) -> None:
    """Neither weights nor the running statistics of norms."""
    member = spoil(build_tiny(), [1], what)
    loop = StageLoop(member, make_task("train.ema=0.9"))
    steps = loop.take_steps([1e-2, 1e-2, 1e-2])

    next(steps)
    before, average = snapshot(member), loop.average.module.state_dict()
    next(steps)
    after = snapshot(member)
    next(steps)

    assert equal(before, after)
    assert all(torch.isfinite(value).all() for value in average.values())
    assert not equal(after, snapshot(member))
    assert loop.recovery.skipped == 1


@pytest.mark.parametrize(("what", "skipped"), [(LOSS, 1), (GRADIENT, 0)])
def test_loss_scaling_finds_its_scale_by_itself(what: str, skipped: int) -> None:
    """A gradient that overflows belongs to it; a loss that is not finite does not."""
    member = spoil(build_tiny(), [1], what)
    loop = StageLoop(member, make_task())
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    steps = loop.take_steps([1e-2, 1e-2, 1e-2])

    next(steps)
    before = [parameter.clone() for parameter in member.parameters()]
    next(steps)

    assert all(map(torch.equal, before, member.parameters()))
    assert loop.scaler.get_scale() == 512
    assert loop.recovery.skipped == skipped
    next(steps)
    assert not all(map(torch.equal, before, member.parameters()))


@pytest.mark.parametrize("what", [LOSS, GRADIENT])
def test_a_stage_leaves_out_what_is_not_finite_and_says_so(what: str) -> None:
    outcome = train_stage(spoil(build_tiny(), [1, 4], what), make_task())

    history = outcome.history
    assert [record["skipped_steps"] for record in history["epochs"]] == [1, 1]
    assert all(0 < record["loss"] < 10 for record in history["epochs"])
    assert history["returns"] == []
    assert "left out because loss or gradient was not finite: 2" in history["reason"]
    assert all(torch.isfinite(value).all() for value in outcome.state.values())


def test_many_in_a_row_go_back_at_half_the_rate() -> None:
    task = make_task("stages.one.schedule=constant", "stages.one.epochs=4")
    member = spoil(build_tiny(), range(3, 7))  # of three steps in each epoch
    notes: list[str] = []
    task.watcher.note = notes.append
    history = train_stage(member, task).history

    assert history["returns"] == [{"epoch": 2, "step": 7, "to_epoch": 0, "rate": 0.5}]
    rates = [record["lr"] for record in history["epochs"]]
    assert rates == [task.stage.lr] * 2 + [task.stage.lr / 2] * 2
    assert len(notes) == 1
    assert "it goes on from the weights of epoch 0, at 0.5 x the learning rate" in notes[0]


def test_training_that_stays_not_finite_ends_soon() -> None:
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += torch.is_grad_enabled()

    member = spoil(build_tiny(), ALWAYS)
    member.register_forward_hook(count)

    with pytest.raises(RunError, match=r"after 4 returns to the best weights, at 0\.0625 lr"):
        train_stage(member, make_task("stages.one.epochs=50"))
    assert steps == 20  # five times three that are left out, and one


BAD = [1, 5, 6, 7, 8, 10]


LONG = ("stages.one.epochs=4", "train.ema=0.9")


@pytest.fixture(scope="module")
def whole() -> StageOutcome:
    """A stage that leaves steps out and goes back, and is not interrupted."""
    return train_stage(spoil(build_tiny(), BAD), make_task(*LONG))


@pytest.mark.parametrize("steps", [2, 7, 9], ids=["left out", "in a row", "gone back"])
def test_a_resumed_stage_ends_at_the_same_bits(
    whole: StageOutcome, steps: int, tmp_path: Path
) -> None:
    task = make_task(*LONG, resume_path=tmp_path / "resume")
    with pytest.raises(KeyboardInterrupt):
        train_stage(spoil(build_tiny(), BAD), replace(task, watcher=Stopper(steps)))

    resumed = train_stage(spoil(build_tiny(), BAD, begin=steps), task)

    assert len(whole.history["returns"]) == 1
    assert equal(whole.state, resumed.state)
    for key in ("returns", "skipped_steps", "best_epoch", "reason"):
        assert whole.history[key] == resumed.history[key]
    for one, other in zip(whole.history["epochs"], resumed.history["epochs"], strict=True):
        assert {**one, "seconds": 0, "images_per_second": 0} == {
            **other,
            "seconds": 0,
            "images_per_second": 0,
        }


def test_results_name_the_jobs() -> None:
    histories = {
        Job("a", 0, "one"): {"skipped_steps": 0, "returns": []},
        Job("b", 1, "one"): {
            "skipped_steps": 5,
            "returns": [{"epoch": 1, "step": 7, "to_epoch": -1, "rate": 0.5}],
        },
        Job("c", 0, "head"): {},
    }

    assert recovery_notes(histories) == [
        "training met numbers that are not finite: b/fold1/one: steps left out because loss or "
        "gradient was not finite: 5; went back to the weights at the start, at last with "
        "0.5 x the learning rate"
    ]
