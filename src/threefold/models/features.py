"""The features of a frozen backbone, in the form that a head reads, and their ONNX graph."""

from __future__ import annotations

import io
import warnings
from typing import Literal

import timm
import torch
from torch import Tensor, nn

from threefold.models.member import backbone_features

FeatureForm = Literal["pooled", "rows", "spatial"]
"""What a head reads, as `head.sequence`: pooled features (c,), the map's means over each row
(c, h, 1), or the whole map (c, h, w)."""


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
        takes_map = self.form != "pooled"
        features = backbone_features(self.backbone, normalized, takes_map=takes_map)
        if self.form == "rows":  # all that a head reads of a row, in a w-th of the memory
            features = features.mean(dim=3, keepdim=True)
        return features


def export_graph(extractor: nn.Module, batch: int, size: int) -> bytes:
    """Export an extractor as ONNX for batches of one size.

    The tracing exporter takes a tenth of the time of the one that torch prefers. With dynamic
    shapes it leaves the padding of TensorFlow's convolutions as arithmetic in the graph; with fixed
    ones onnxruntime folds that, and both exporters lead to the same optimized graph.

    Args:
        extractor: on the CPU.
        batch: number of images of every batch.
        size: side of the images in pixels.

    Returns:
        A graph that maps float32 `pixels` (batch, 3, size, size) to `features`.

    Raises:
        Exception: of any type, where torch cannot trace the backbone.
    """
    buffer = io.BytesIO()
    pixels = torch.zeros(batch, 3, size, size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it is deprecated, and what tracing made constant
        torch.onnx.export(
            extractor,
            (pixels,),
            buffer,  # type: ignore[arg-type]  # the tracing exporter also writes to streams
            dynamo=False,
            input_names=["pixels"],
            output_names=["features"],
            opset_version=18,
        )
    return buffer.getvalue()
