"""Heads on cached features: the network that a head stage trains, and its answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor, nn

BATCH: Final = 1024
"""Images whose features a head answers at a time."""


class HeadNetwork(nn.Module):
    """A head alone, with the names of parameters that it has in a member.

    Args:
        head: see `heads.Head`.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """Map float features (b, ...) to logits (b, k)."""
        return cast("Tensor", self.head(features))

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Map every parameter to layer 0 (timm's convention): a head has no layers of its own."""
        return lambda name: 0


def to_features(features: np.ndarray, device: torch.device) -> Tensor:
    """Convert cached features, float16 (b, ...), to float32."""
    return torch.from_numpy(np.ascontiguousarray(features)).to(device).float()


@torch.inference_mode()
def head_probs(network: nn.Module, features: np.ndarray) -> np.ndarray:
    """Answer cached features; the network is left in eval mode.

    Args:
        network: maps float features to logits.
        features: float16 (n, ...).

    Returns:
        float32 (n, k).
    """
    network.eval()
    device = next(network.parameters()).device
    probs = [
        network(to_features(features[begin : begin + BATCH], device)).softmax(-1).cpu().numpy()
        for begin in range(0, len(features), BATCH)
    ]
    return np.concatenate(probs)
