"""The features of a frozen backbone, in the form that a head reads, and their ONNX graph."""

from __future__ import annotations

from typing import Literal

import timm
import torch
from torch import Tensor, nn

from threefold.models.heads import input_form
from threefold.models.member import head_input
from threefold.models.tracing import simplify, trace_network

FeatureForm = Literal["pooled", "levels", "rows", "spatial"]
"""What a head reads, as `head.sequence`: pooled features (c,), those of several levels side by side
(c1 + c2 + ...,), the map's means over each row (c, h, 1), or the whole map (c, h, w)."""


class FeatureExtractor(nn.Module):
    """A backbone with its normalisation, in eval mode; answers as `Member` does below its head.

    Args:
        backbone: a timm network without classifier.
        form: what the head reads.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, form: FeatureForm) -> None:
        super().__init__()
        config = timm.data.resolve_model_data_config(backbone)
        self.backbone, self.form = backbone, form
        self.register_buffer("mean", 255 * torch.tensor(config["mean"]).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(config["std"]).view(1, -1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels, float (b, 3, s, s) in 0..255, to features (b, ...) of the form."""
        normalized = (pixels - self.mean) / self.std
        features = head_input(self.backbone, normalized, input_form(self.form))
        if self.form == "rows":  # all that a head reads of a row, in a w-th of the memory
            features = features.mean(dim=3, keepdim=True)
        return features


def export_graph(extractor: nn.Module, size: int) -> bytes:
    """Export an extractor as ONNX for images of one size.

    Args:
        extractor: the backbone.
        size: side of the images in pixels.

    Returns:
        A graph that maps float32 `pixels` (b, 3, size, size) to `features`.

    Raises:
        TracingError: torch cannot trace the backbone.
    """
    return trace_network(simplify(extractor, size), size, ("pixels", "features"))
