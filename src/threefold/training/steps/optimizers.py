"""What a stage trains and how: trainable parameters, optimizers, learning rates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.recipe.schema import StageSpec, TrainSpec

Schedule = Literal["constant", "time", "cosine", "one-cycle"]

WARMUP = 0.3
"""Share of the steps in which one-cycle rises."""
START = 1.0 / 25.0
"""Share of the learning rate at which one-cycle begins."""
END = START / 1e4
"""Share of the learning rate at which one-cycle ends."""


def set_trainable(member: nn.Module, stage: StageSpec) -> list[str]:
    """Freeze every parameter that the stage does not train.

    Returns:
        The names of the trainable parameters.

    Raises:
        RecipeError: the regexes leave nothing to train.
    """
    names = []
    for name, parameter in member.named_parameters():
        frozen = bool(stage.frozen and re.search(stage.frozen, name))
        parameter.requires_grad = not frozen and bool(re.search(stage.trainable, name))
        if parameter.requires_grad:
            names.append(name)
    if not names:
        raise RecipeError(
            "nothing to train",
            where=f"stage {stage.name}",
            got=f"trainable = {stage.trainable!r}, frozen = {stage.frozen!r}",
            fix="parameters are named backbone.* and head.*",
        )
    return names


def train_mode(member: nn.Module, *, fixed_norms: bool = False) -> None:
    """Switch to training mode, except modules whose parameters are all frozen.

    These stay in eval mode, so that their batch norm statistics do not drift and no noise is added.

    Args:
        member: the network.
        fixed_norms: also leave all norms with running statistics in eval mode: they normalize by
            these and keep them. Their scale and offset still train.
    """
    member.train()
    for module in member.modules():
        parameters = list(module.parameters())
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if frozen or (fixed_norms and getattr(module, "running_mean", None) is not None):
            module.eval()


def create_optimizer(member: nn.Module, spec: TrainSpec, lr: float) -> torch.optim.Optimizer:
    """Create the recipe's optimizer for the trainable parameters of a member.

    Weight decay does not apply to norms and biases, nor to what the backbone exempts.

    Args:
        member: the network; `layer_decay` below 1 needs its `group_matcher` (timm's convention).
        spec: optimizer, weight decay and layer decay.
        lr: learning rate of the stage.

    Returns:
        The optimizer. With layer decay its groups have a `lr_scale`, by which the caller multiplies
        each new learning rate.
    """
    layer_decay = spec.layer_decay if spec.layer_decay < 1.0 else None
    if spec.optimizer != "adam-keras":
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            member,
            opt=spec.optimizer,
            lr=lr,
            weight_decay=spec.weight_decay,
            filter_bias_and_bn=True,
            layer_decay=layer_decay,
            fused=True,
        )
        return optimizer
    if layer_decay is None:
        return KerasAdam([p for p in member.parameters() if p.requires_grad], lr=lr)
    groups = param_groups_layer_decay(
        member, weight_decay=0.0, weight_decay_exclude_1d=False, layer_decay=layer_decay
    )
    return KerasAdam(groups, lr=lr)


def lr_at(schedule: Schedule, lr: float, step: int, steps_total: int, epochs: int) -> float:
    """Compute the learning rate of one optimizer step.

    Args:
        schedule: `constant`; `time`, lr / (1 + decay * step) with decay = lr / epochs (eq. 26,
            whose right side is read as the initial rate); `cosine`, half a cosine down to 0;
            `one-cycle`, half a cosine up from lr / 25 in the first 30 % of the steps, then half a
            cosine down to almost 0.
        lr: rate of the stage, the largest that any schedule reaches.
        step: optimizer steps taken in this stage so far. Beyond `steps_total` the last rate holds.
        steps_total: optimizer steps in the stage.
        epochs: epochs in the stage.
    """
    if schedule == "constant":
        return lr
    if schedule == "time":
        return lr / (1.0 + lr / epochs * step)
    if schedule == "cosine":
        return _anneal(lr, 0.0, step / steps_total)
    top, last = max(WARMUP * steps_total - 1.0, 0.0), steps_total - 1.0
    if step < top:
        return _anneal(lr * START, lr, step / top)
    if last > top:
        return _anneal(lr, lr * END, (step - top) / (last - top))
    return lr


def _anneal(start: float, end: float, share: float) -> float:
    """Half a cosine from start (share 0) to end (share 1 and beyond)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


class KerasAdam(torch.optim.Optimizer):
    """Adam as in Keras 2.2: epsilon is added to sqrt(v) before the bias correction (eqs. 22 to 25).

    p -= lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps). torch's Adam adds epsilon to the
    corrected root, so that in the first steps parameters with tiny gradients move further. The
    paper prints epsilon = 1e-8; its runs used Keras' default, 1e-7. There is no weight decay; the
    decay of the learning rate is in `lr_at`.

    Args:
        params: parameters, or groups of them with their own options.
        lr: learning rate.
        betas: decay rates of the running means of the gradient and of its square.
        eps: added to the root of the mean square.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the loss of `closure`, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for count, params in self._by_step_count(group["params"]).items():
                self._update(params, count, group["lr"], group["betas"], group["eps"])
        return loss

    def _by_step_count(self, params: list[Tensor]) -> dict[int, list[Tensor]]:
        """Count this step for every parameter with a gradient, and group them by their count."""
        by_count: dict[int, list[Tensor]] = {}
        for param in params:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state.update(step=0, mean=torch.zeros_like(param), square=torch.zeros_like(param))
            state["step"] += 1
            by_count.setdefault(state["step"], []).append(param)
        return by_count

    def _update(
        self, params: list[Tensor], count: int, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        """Take step number `count` for parameters that have all taken `count` - 1 steps."""
        grads = [param.grad for param in params if param.grad is not None]
        means = [self.state[param]["mean"] for param in params]
        squares = [self.state[param]["square"] for param in params]
        step = torch.tensor(float(count), device=params[0].device)
        # torch adds epsilon to the corrected root; divided by the correction it is Keras' form.
        correction = math.sqrt(1.0 - betas[1] ** count)
        torch._fused_adam_(
            params,
            grads,
            means,
            squares,
            [],
            [step] * len(params),
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=0.0,
            eps=eps / correction,
            amsgrad=False,
            maximize=False,
        )
