"""What the loop of a stage needs to go on where it was stopped, to the bit."""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple, Protocol

import torch
from timm.utils import ModelEmaV3
from torch import Generator, Tensor, nn

from threefold.training.checkpoints import (
    Checkpoint,
    ResumeState,
    optimizer_state,
    random_state,
    restore_optimizer,
    restore_random,
)
from threefold.training.distributed.fsdp import load_whole_state, whole_state
from threefold.training.stages.recovery import Recovery
from threefold.training.steps.memory import MemoryGuard

RESUME_FORMAT: Final = 4
"""Raised when the values of the resume file change; files in another format are ignored."""


class Resumable(Protocol):
    """A loop whose state is all in these attributes."""

    member: nn.Module
    average: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    recovery: Recovery
    memory: MemoryGuard
    device: torch.device
    generators: dict[str, Generator]
    order_state: Tensor
    step: int
    started: float
    elapsed_before: float


class Progress(NamedTuple):
    """How far an epoch has come: steps, the sum of the images' losses, images and seconds.

    The images of steps that were left out have no loss.
    """

    steps: int = 0
    loss_sum: float = 0.0
    images: int = 0
    seconds: float = 0.0
    without_loss: int = 0
    skipped: int = 0


def collect_state(
    loop: Resumable, best: Checkpoint, records: list[dict[str, Any]], progress: Progress
) -> ResumeState:
    """Collect the state of a loop.

    Args:
        loop: between two steps.
        best: the best checkpoint so far.
        records: of the epochs that are over.
        progress: of the epoch that is not.
    """
    optimizer = optimizer_state(loop.optimizer)
    randomness = random_state(loop.device, loop.generators)
    if progress.steps:  # the same batches are drawn again, and the first of them left out
        randomness.tensors["batches"] = loop.order_state
    sections = {
        "member": whole_state(loop.member),
        "optimizer": optimizer.tensors,
        "random": randomness.tensors,
    }
    if loop.average is not None:
        sections["average"] = whole_state(loop.average)
    if best.epoch >= 0:
        sections["best"] = best.state
    tensors = {
        f"{section}/{name}": tensor
        for section, state in sections.items()
        for name, tensor in state.items()
    }
    if best.epoch >= 0:
        tensors["probs"] = torch.from_numpy(best.probs)
    values = {
        "records": records,
        "progress": progress,
        "best_epoch": best.epoch,
        "step": loop.step,
        "lrs": [group["lr"] for group in loop.optimizer.param_groups],
        "elapsed": loop.elapsed_before + time.monotonic() - loop.started,
        "optimizer": optimizer.values,
        "random": randomness.values,
        "scaler": loop.scaler.state_dict(),
        "recovery": loop.recovery.values(),
        "memory": loop.memory.values(),
    }
    return ResumeState(tensors, values)


def restore_loop(loop: Resumable, state: ResumeState) -> tuple[list[dict[str, Any]], Progress]:
    """Restore `collect_state`, but for the best checkpoint.

    Returns:
        The records of the epochs that are over, and the progress of the one that is not.
    """
    values = state.values
    load_whole_state(loop.member, state.section("member"))
    if loop.average is not None:
        load_whole_state(loop.average, state.section("average"))
    optimizer = ResumeState(state.section("optimizer"), values["optimizer"])
    restore_optimizer(loop.optimizer, optimizer)
    randomness = ResumeState(state.section("random"), values["random"])
    restore_random(loop.device, loop.generators, randomness)
    loop.scaler.load_state_dict(values["scaler"])
    loop.recovery.restore(values["recovery"])
    loop.memory.restore(values["memory"])
    loop.step, loop.elapsed_before = values["step"], values["elapsed"]
    for group, lr in zip(loop.optimizer.param_groups, values["lrs"], strict=True):
        group["lr"] = lr  # of the last step, for the record of its epoch
    return values["records"], Progress(*values["progress"])
