"""The learning-rate range test: steps whose learning rate grows, and the loss before each.

Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3.
The stop at four times the lowest loss and the two suggestions are those of fastai's `lr_find`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch import nn

from threefold.training.randomness import keep_generators, seed_generators
from threefold.training.stages.loop import StageLoop
from threefold.training.stages.task import StageTask
from threefold.training.steps.allocator import reuse_freed_memory

DECAY: Final = 0.9
"""Decay of the moving average that smooths the losses."""

SETTLED: Final = 10
"""Steps after which the average counts; before, it is that of a few batches."""

DIVERGED: Final = 4.0
"""Times the lowest smoothed loss at which the test stops."""

_SIGMAS: Final = 3.0
"""Standard errors by which the loss must fall, or the test suggests nothing."""


@dataclass(frozen=True, eq=False)
class RangeTest:
    """Losses against learning rates.

    Attributes:
        rates: (s,) learning rates, ascending.
        losses: (s,) the loss of each step's images, before the step.
        smoothed: (s,) their exponential moving average, corrected for its start.
        diverged: whether the test stopped at a rate that is too high.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    diverged: bool

    @property
    def falls(self) -> bool:
        """Whether the loss falls by more than the noise of its batches."""
        first = self.losses[:SETTLED]
        lowest = self.smoothed[SETTLED:].min(initial=math.inf)
        averaged = (1 + DECAY) / (1 - DECAY)  # batches that the moving average is worth
        error = first.std(ddof=1) * math.sqrt(1 / len(first) + 1 / averaged)
        return bool(first.mean() - lowest > max(_SIGMAS * error, 1e-9 * abs(first.mean())))

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls most steeply; None if it does not fall."""
        if not self.falls:
            return None
        slopes = np.gradient(self.smoothed, np.log(self.rates))
        return float(self.rates[SETTLED + slopes[SETTLED : self._lowest + 1].argmin()])

    @property
    def minimum_tenth(self) -> float | None:
        """A tenth of the rate at which the smoothed loss is lowest; None if it does not fall."""
        return float(self.rates[self._lowest]) / 10 if self.falls else None

    @property
    def suggestion(self) -> float | None:
        """The lower of the two, since a rate that is too high costs more than one too low."""
        if self.steepest is None or self.minimum_tenth is None:
            return None
        return min(self.steepest, self.minimum_tenth)

    @property
    def _lowest(self) -> int:
        return SETTLED + int(self.smoothed[SETTLED:].argmin())


def follow_losses(rates: Sequence[float], losses: Iterable[float]) -> RangeTest:
    """Smooth the losses of steps at growing rates, and stop once they diverge.

    Args:
        rates: ascending.
        losses: of a step at each rate, which is taken when its loss is asked for.

    Returns:
        The steps that were taken; a loss that is not a number ends them, and is left out.
    """
    taken: list[float] = []
    smoothed: list[float] = []
    average, lowest, diverged = 0.0, math.inf, False
    for number, loss in zip(range(1, len(rates) + 1), losses, strict=False):
        if not math.isfinite(loss):
            diverged = True
            break
        average = DECAY * average + (1 - DECAY) * loss
        taken.append(loss)
        smoothed.append(average / (1 - DECAY**number))
        if number > SETTLED:
            lowest = min(lowest, smoothed[-1])
            if smoothed[-1] > DIVERGED * lowest:
                diverged = True
                break
    used = np.asarray(rates, dtype=np.float64)[: len(taken)]
    return RangeTest(used, np.array(taken), np.array(smoothed), diverged)


def sweep_stage(member: nn.Module, task: StageTask, rates: Sequence[float]) -> RangeTest:
    """Take the steps of a range test on a copy of a network.

    Neither the network nor any global random generator changes; the same seed gives the same
    losses.

    Args:
        member: the network that the stage starts from; of a head stage, a `HeadNetwork`.
        task: the stage; its learning rate and schedule are not used.
        rates: ascending, one for each step.

    Raises:
        RunError: the memory is exhausted.
        RecipeError: the stage's regexes leave nothing to train.
    """
    with keep_generators(next(member.parameters()).device), reuse_freed_memory():
        seed_generators(task.seed)
        loop = StageLoop(copy.deepcopy(member), task)
        return follow_losses(rates, _reported(loop.take_steps(rates), task))


def _reported(losses: Iterator[float], task: StageTask) -> Iterator[float]:
    """Tell the watcher of each step."""
    images = task.batch_size or task.recipe.train.batch_size
    for loss in losses:
        task.watcher.batch(images)
        yield loss
