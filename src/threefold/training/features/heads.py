"""Heads on cached features: the network that a head stage trains, and its answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor, nn

from threefold.models.answers import probabilities
from threefold.tasks import Task

BATCH: Final = 1024
"""Images whose features a head answers at a time."""

START_FILE: Final = "start.safetensors"
"""In the folder of a head's job: the head that has not seen the select rows."""


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


def head_probs(network: nn.Module, features: np.ndarray, task: Task = "multiclass") -> np.ndarray:
    """Answer cached features; the network is left in eval mode.

    Args:
        network: maps float features to logits.
        features: float16 (n, ...).
        task: what logits become, see `probabilities`.

    Returns:
        float32 (n, k).
    """
    return predict_cached(network, features, to_features, BATCH, task)


@torch.inference_mode()
def predict_cached(
    network: nn.Module,
    values: np.ndarray,
    convert: Callable[[np.ndarray, torch.device], Tensor],
    batch_size: int,
    task: Task = "multiclass",
) -> np.ndarray:
    """Run a network, or a part of one, on cached values; it is left in eval mode.

    Args:
        network: maps a batch to logits.
        values: float16 (n, ...).
        convert: makes a batch on a device from some of the values.
        batch_size: number of images in a batch.
        task: what logits become, see `probabilities`.

    Returns:
        Probabilities, float32 (n, k).
    """
    network.eval()
    device = next(network.parameters()).device
    probs = []
    for begin in range(0, len(values), batch_size):
        logits = network(convert(values[begin : begin + batch_size], device))
        probs.append(probabilities(logits, task).cpu().numpy())
    return np.concatenate(probs)
