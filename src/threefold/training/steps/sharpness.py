"""Sharpness-aware minimization (SAM): take the gradient at the worst weights nearby.

Foret, Kleiner, Mobahi and Neyshabur 2021, "Sharpness-Aware Minimization for Efficiently Improving
Generalization", arXiv:2010.01412, algorithm 1 with the 2-norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from threefold.training.distributed.fsdp import own_part, whole


def sharpen_gradients(member: nn.Module, radius: float, backward: Callable[[], object]) -> None:
    """Replace the gradients by those at the weights moved uphill by `radius`.

    The weights move along the gradients they have now, over all trained parameters together
    (equation 2), and then back to the same bits. The second pass leaves the running statistics of
    norms alone: they describe the weights that stay. Gradients that are not finite, as loss scaling
    meets them, move no weight.

    Args:
        member: the network, with gradients of the batch.
        radius: length of the move (the paper's rho).
        backward: adds the gradients of the same batch at the current weights.
    """
    trained = [p for p in member.parameters() if p.grad is not None]
    moved = [own_part(p.detach()) for p in trained]  # share their memory with the parameters
    weights = [value.clone() for value in moved]
    gradients = [p.grad for p in trained if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    gradients = [own_part(gradient) for gradient in gradients]
    if norm > 0 and torch.isfinite(norm):
        torch._foreach_add_(moved, gradients, alpha=radius / float(norm))
    for parameter in trained:
        parameter.grad = None
    try:
        with _statistics_kept(member):
            backward()
    finally:
        torch._foreach_copy_(moved, weights)


@contextmanager
def _statistics_kept(member: nn.Module) -> Iterator[None]:
    """Let norms use the statistics of the batch without adding them to their running ones."""
    norms: list[Any] = [m for m in member.modules() if getattr(m, "track_running_stats", False)]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
