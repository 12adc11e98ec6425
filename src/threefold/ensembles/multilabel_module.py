"""The ensemble of several labels per image as a torch module, for exported files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from threefold.ensembles.multilabel import LEAST, MultilabelEnsemble

if TYPE_CHECKING:
    from torch import Tensor, nn


def multilabel_module(ensemble: MultilabelEnsemble) -> nn.Module:
    """Return `MultilabelEnsemble.__call__` as a torch module, (b, m, k) to (b, k).

    It computes in float32; weights, slope and intercept are buffers.
    """
    import torch

    class Multilabel(torch.nn.Module):
        weights: Tensor
        slope: Tensor
        intercept: Tensor

        def __init__(self) -> None:
            super().__init__()
            for name in ("weights", "slope", "intercept"):
                values = torch.tensor(getattr(ensemble, name), dtype=torch.float32)
                self.register_buffer(name, values)

        def forward(self, probs: Tensor) -> Tensor:
            mean = (probs * self.weights[None, :, None]).sum(1).clamp(LEAST, 1 - LEAST)
            logits = mean.log() - (1 - mean).log()
            return (self.slope * logits + self.intercept).sigmoid()

    return Multilabel()
