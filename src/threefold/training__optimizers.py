"""The paper's optimizer as Keras wrote it, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.models__member import Member
from threefold.recipe_schema import StageSpec

Schedule = Literal["constant", "time", "cosine", "one-cycle"]

WARMUP = 0.3
"""Share of the steps in which one-cycle rises."""
START = 1.0 / 25.0
"""Share of the learning rate at which one-cycle begins."""
END = START / 1e4
"""Share of the learning rate at which one-cycle ends."""


def lr_at(schedule: Schedule, lr: float, step: int, steps_total: int, epochs: int) -> float:
    """Learning rate of one optimizer step.

    Args:
        schedule: constant; time = lr / (1 + decay * step) with decay = lr / epochs (paper eq. 26, whose right side is
            read as the first rate); cosine = half a cosine down to 0; one-cycle = cosine up from lr / 25 over the first
            30 % of the steps, then cosine down to almost 0.
        lr: the stage's rate, the largest that any schedule gives.
        step: optimizer steps already taken in this stage, 0 first; beyond `steps_total` the last rate holds.
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
    return _anneal(lr, lr * END, (step - top) / (last - top)) if last > top else lr


def _anneal(start: float, end: float, share: float) -> float:
    """Half a cosine from start (share 0) to end (share 1 and beyond)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


class KerasAdam(torch.optim.Optimizer):
    """Adam as Keras 2.2 has it: epsilon is added to sqrt(v), which is not corrected for bias (paper eqs. 22 to 25).

    p -= lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps). Torch's Adam adds epsilon to the corrected root, which
    weakens it in the first steps: parameters with tiny gradients move further there. The paper prints epsilon 1e-8;
    what ran is Keras' default, 1e-7. Has no weight decay; the rate's decay over time is `lr_at`'s.

    Args:
        params: parameters, or groups of them with their own options.
        lr: learning rate.
        betas: decay of the running means of the gradient and of its square.
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
        """Update every parameter that has a gradient; `closure`, where given, computes the loss again first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for count, params in self._by_count(group["params"]).items():
                self._update(params, count, group["lr"], group["betas"], group["eps"])
        return loss

    def _by_count(self, params: list[Tensor]) -> dict[int, list[Tensor]]:
        """Count this step for each parameter with a gradient, and gather them by their count."""
        gathered: dict[int, list[Tensor]] = {}
        for param in params:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state.update(step=0, mean=torch.zeros_like(param), square=torch.zeros_like(param))
            state["step"] += 1
            gathered.setdefault(state["step"], []).append(param)
        return gathered

    def _update(
        self, params: list[Tensor], count: int, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        """One step for parameters that have all taken `count` steps, this one included."""
        grads = [param.grad for param in params if param.grad is not None]
        means, squares = (
            [self.state[param][name] for param in params] for name in ("mean", "square")
        )
        torch._foreach_lerp_(means, grads, 1.0 - betas[0])
        torch._foreach_mul_(squares, betas[1])
        torch._foreach_addcmul_(squares, grads, grads, 1.0 - betas[1])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, eps)
        rate = lr * math.sqrt(1.0 - betas[1] ** count) / (1.0 - betas[0] ** count)
        torch._foreach_addcdiv_(params, means, roots, -rate)


def set_trainable(member: nn.Module, stage: StageSpec) -> list[str]:
    """Freeze what the stage does not train; returns the names of the trainable parameters.

    Raises:
        RecipeError: the regexes leave nothing to train.
    """
    names = []
    for name, parameter in member.named_parameters():
        chosen = bool(re.search(stage.trainable, name)) and not (
            stage.frozen and re.search(stage.frozen, name)
        )
        parameter.requires_grad_(chosen)
        if chosen:
            names.append(name)
    if not names:
        raise RecipeError(
            "nothing to train",
            where=f"stage {stage.name}",
            got=f"trainable = {stage.trainable!r}, frozen = {stage.frozen!r}",
            fix="parameters are named backbone.* and head.*",
        )
    return names


def train_mode(member: nn.Module) -> None:
    """Training mode, but what is wholly frozen stays in eval mode: its statistics do not drift, no noise is added to it."""
    member.train()
    for module in member.modules():
        inside = list(module.parameters())
        if inside and not any(p.requires_grad for p in inside):
            module.eval()


def parameter_groups(member: nn.Module, lr: float, layer_decay: float) -> Iterator[dict[str, Any]]:
    """Optimizer groups of the trainable parameters; `layer_decay` < 1 lowers the rate block by block below the head."""
    if layer_decay == 1.0:
        yield {"params": [p for p in member.parameters() if p.requires_grad], "scale": 1.0}
        return
    by_height: dict[int, list[nn.Parameter]] = {}
    heights = _heights(member)
    for name, parameter in member.named_parameters():
        if parameter.requires_grad:
            by_height.setdefault(heights.get(name, 0), []).append(parameter)
    for height, parameters in sorted(by_height.items(), reverse=True):
        scale = layer_decay**height
        yield {"params": parameters, "scale": scale, "lr": lr * scale}


def _heights(member: nn.Module) -> dict[str, int]:
    """How many blocks below the head each parameter of a backbone lies; of every backbone, where members are joined."""
    found: dict[str, int] = {}
    for path, module in member.named_modules():
        if isinstance(module, Member):
            prefix = f"{path}.backbone." if path else "backbone."
            groups = timm.models.group_parameters(
                module.backbone, module.backbone.group_matcher(coarse=False)
            )
            depth = max(groups, default=0) + 1
            found |= {
                prefix + name: depth - layer for layer, names in groups.items() for name in names
            }
    return found
