"""What a stage does when its numbers are not finite: skip steps, then go back and slow down.

A step whose loss or gradient is not finite changes nothing. After several in a row, the stage goes
back to the weights of its best epoch and halves the learning rate. Both are bounded and recorded,
and depend only on the steps before, so that a stage which is stopped and resumed ends at the same
bits. (Large runs go back to a checkpoint, too: Chowdhery et al. 2022, arXiv:2204.02311, section
5.1.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from threefold.errors import shorten
from threefold.recipe.recipe import Job
from threefold.recipe.schema import StageSpec
from threefold.training.checkpoints import Checkpoint
from threefold.training.checks import diverged
from threefold.training.distributed.fsdp import load_whole_state

SKIPS: Final = 3
"""Steps in a row that are left out; at the next that is not finite, the stage goes back."""

RETURNS: Final = 4
"""How often a stage goes back before it gives up."""

RATE: Final = 0.5
"""What the learning rate is multiplied by each time."""


class Recovery:
    """Leaves out steps that are not finite, and goes back where that does not help.

    Args:
        member: the network.
        optimizer: of its weights.
        average: of its weights; None = none.
        stage: what is trained.
        note: tells the user.

    Attributes:
        skipped: steps that were left out.
        rate: what the learning rate is multiplied by.
        returns: each time that it went back: `epoch` and `step` of the stage, `to_epoch` (-1 = the
            start) and the new `rate`.
    """

    def __init__(
        self,
        member: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: ModelEmaV3 | None,
        stage: StageSpec,
        note: Callable[[str], None],
    ) -> None:
        self.member, self.optimizer, self.average = member, optimizer, average
        self.stage, self.note = stage, note
        self.skipped, self.rate = 0, 1.0
        self.returns: list[dict[str, Any]] = []
        self._in_a_row = 0
        norms = [m for m in member.modules() if getattr(m, "track_running_stats", False)]
        if stage.batch_norm == "fixed":
            norms = []
        self._statistics: list[Tensor] = [b for norm in norms for b in norm.buffers()]
        self._kept = [buffer.clone() for buffer in self._statistics]

    def begin_step(self) -> None:
        """Remember the running statistics of norms, which a forward pass changes."""
        if self._statistics:
            torch._foreach_copy_(self._kept, self._statistics)

    def undo_step(self) -> None:
        """Restore the running statistics from before the step, and drop its gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._kept)

    def allows(self, loss: float, gradient_norm: float) -> bool:
        """Whether a step may be taken; one that may not leaves no trace in the network."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self._in_a_row = 0
            return True
        self.undo_step()
        self._in_a_row += 1
        self.skipped += 1
        return False

    @property
    def is_stuck(self) -> bool:
        """Whether too many steps in a row were left out."""
        return self._in_a_row > SKIPS

    def go_back(self, best: Checkpoint, epoch: int, step: int, what: str) -> None:
        """Go on from the best weights, with a fresh optimizer and half the learning rate.

        Args:
            best: the best checkpoint so far.
            epoch: the epoch that failed.
            step: optimizer steps of the stage so far.
            what: was not finite.

        Raises:
            RunError: it has gone back too often.
        """
        if len(self.returns) == RETURNS:
            got = f"NaN or infinity after {RETURNS} returns to the best weights, at {self.rate} lr"
            raise diverged(self.stage, epoch, what, got)
        load_whole_state(self.member, best.state)
        if self.average is not None:
            load_whole_state(self.average.module, best.state)
        self.optimizer.state.clear()
        self.rate *= RATE
        self._in_a_row = 0
        record = {"epoch": epoch, "step": step, "to_epoch": best.epoch, "rate": self.rate}
        self.returns.append(record)
        self.note(
            f"stage {self.stage.name}, epoch {epoch}: {what}; it goes on from "
            f"{_name_weights(best.epoch)}, at {self.rate:g} x the learning rate"
        )

    def values(self) -> dict[str, Any]:
        """Return what a resumed stage needs."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "rate": self.rate,
            "returns": self.returns,
        }

    def restore(self, values: dict[str, Any]) -> None:
        """Restore `values`."""
        self.skipped, self._in_a_row = values["skipped"], values["in_a_row"]
        self.rate, self.returns = values["rate"], values["returns"]

    def describe(self) -> str:
        """Say what happened, in words; empty if all was finite."""
        return describe_recovery(self.skipped, self.returns)


def describe_recovery(skipped: int, returns: list[dict[str, Any]]) -> str:
    """Say how many steps a stage left out, and how it went back; empty if it did neither.

    Args:
        skipped: steps.
        returns: the attribute of `Recovery`.
    """
    if not skipped and not returns:
        return ""
    text = f"steps left out because loss or gradient was not finite: {skipped}"
    if returns:
        ends = ", ".join(_name_weights(entry["to_epoch"]) for entry in returns)
        text += f"; went back to {ends}, at last with {returns[-1]['rate']:g} x the learning rate"
    return text


def recovery_notes(histories: Mapping[Job, Mapping[str, Any]]) -> list[str]:
    """Name the jobs of a run whose numbers were not finite.

    Args:
        histories: content of history.json by job.
    """
    texts = {
        job: describe_recovery(history.get("skipped_steps", 0), history.get("returns", []))
        for job, history in histories.items()
    }
    jobs = [f"{job.path.removeprefix('jobs/')}: {text}" for job, text in texts.items() if text]
    return [f"training met numbers that are not finite: {shorten(jobs, 5)}"] if jobs else []


def _name_weights(epoch: int) -> str:
    return "the weights at the start" if epoch < 0 else f"the weights of epoch {epoch}"
