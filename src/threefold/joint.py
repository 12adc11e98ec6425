"""Members joined into one network: E2E-3M as it trains end to end (paper section 3.3, figure 1, Algorithm 1).

The joined members stand side by side, each with its own normalisation, and a head maps their concatenated softmaxes to
logits. What is frozen is a stage's regex: `^head` trains the head alone, as in most of the authors' runs; `.` trains
everything. With frozen members this is the `stacked` ensemble, but on augmented images of the fit rows, whose softmaxes
are surer than on new images: out of fold `stacked` is the cleaner estimate of the same network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from threefold.model import Member
from threefold.recipe import HeadSpec
from threefold.stacked import stacked_network

STACKED_WIDTH = 4096
"""Width of the hidden layer of Algorithm 1, where `fc` is not set."""


class JointMember(nn.Module):
    """Members and a head on their softmaxes; behaves as a `Member`.

    `forward` maps pixels, float (b, 3, s, s) in 0..255, to logits (b, k).
    """

    def __init__(self, bases: Sequence[Member], head: nn.Module) -> None:
        super().__init__()
        self.bases = nn.ModuleList(bases)
        self.head = head

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (b, k) of pixels (b, 3, s, s) in 0..255."""
        probs = [
            base(pixels).float().softmax(-1) for base in self.bases
        ]  # bases in order: w_ij of eq. 19 follow them
        return cast(Tensor, self.head(torch.cat(probs, -1)))


def build_joint(spec: HeadSpec, bases: Sequence[Member], num_classes: int) -> JointMember:
    """Join members under a fresh head: `linear` (eq. 19) or `mlp` of width `fc` (Algorithm 1; 0 = 4096)."""
    inputs = len(bases) * num_classes
    if spec.kind == "mlp":
        head = stacked_network(len(bases), num_classes, spec.fc or STACKED_WIDTH)[
            1:-1
        ]  # the softmax belongs to the loss
    else:
        layer = nn.Linear(inputs, num_classes)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        head = nn.Sequential(layer)
    return JointMember(bases, head)


def describe_joint(spec: HeadSpec, joins: Sequence[str]) -> str:
    """One plain sentence that says what the network computes, for the report."""
    layer = (
        f"a hidden layer of {spec.fc or STACKED_WIDTH} units"
        if spec.kind == "mlp"
        else "one linear layer"
    )
    return f"{', '.join(joins)} joined into one network: {layer} on their softmaxes."
