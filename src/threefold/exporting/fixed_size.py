"""A pipeline for images of one size, for programs that take no other.

Core ML, LiteRT and TensorRT want the height and width of an image in the file, and cannot compute
the weights of a resize. So the image comes on the members' canvas, resized before
(`runtime.canvas`), and everything after the resize is in the file.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from threefold.errors import ExportError
from threefold.models.pipeline import Pipeline, Predictor, mix
from threefold.models.shared import HeadPredictor, HeadsPipeline, SharedBackbone
from threefold.models.tracing import simplify


class FixedSize(nn.Module):
    """A pipeline without its resize, its networks simplified for images of one size.

    Args:
        pipeline: in eval mode on the CPU; it stays as it is.
        where: the file that is written, for the message.

    Attributes:
        size: side of the images in pixels.

    Raises:
        ExportError: as `common_size`.
    """

    def __init__(self, pipeline: Pipeline, where: object) -> None:
        super().__init__()
        self.size = common_size(pipeline, where)
        self.mixing, self.combiner = pipeline.mixing, copy.deepcopy(pipeline.combiner)
        backbones: dict[int, SharedBackbone] = {}
        self.networks = nn.ModuleList()
        self.heads = nn.ModuleList()
        for part in pipeline.parts:
            if isinstance(part, HeadsPipeline):
                key = id(part.shared)
                if key not in backbones:
                    backbones[key] = cast("SharedBackbone", simplify(part.shared, self.size))
                self.networks.append(backbones[key])
                self.heads.append(copy.deepcopy(part.heads))
            else:
                predictors = [
                    simplify(cast("Predictor", predictor), self.size)
                    for predictor in part.predictors
                ]
                self.networks.append(nn.ModuleList(predictors))
                self.heads.append(nn.Identity())
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map pixels (b, 3, size, size) in 0..255 to probs (b, k) and member_probs (b, m, k)."""
        features: dict[int, dict[str, Tensor]] = {}
        nets: list[list[Tensor]] = []
        for network, heads in zip(self.networks, self.heads, strict=True):
            if isinstance(network, nn.ModuleList):
                nets.append([predictor(pixels) for predictor in network])
                continue
            if id(network) not in features:
                features[id(network)] = network(pixels)
            shared = features[id(network)]
            predictors = [cast("HeadPredictor", head) for head in cast("nn.ModuleList", heads)]
            nets.append([predictor(shared[predictor.form]) for predictor in predictors])
        if self.mixing is None:
            member_probs = torch.stack([torch.stack(net).mean(0) for net in nets], 1)
        else:
            member_probs = mix(torch.stack([one for net in nets for one in net], 1), self.mixing)
        return self.combiner(member_probs), member_probs


def common_size(pipeline: Pipeline, where: object) -> int:
    """Return the side in pixels of the square that all members resize images to.

    Raises:
        ExportError: they resize images to several sizes, or in several ways.
    """
    canvases = {(part.canvas, part.resize) for part in pipeline.parts}
    if len(canvases) > 1:
        raise ExportError(
            "this kind of file takes images of one size",
            where=where,
            got=", ".join(f"{resize} to {size}" for size, resize in sorted(canvases)),
            fix="export members of one size with --members, or an .onnx file without --fixed-size",
        )
    return canvases.pop()[0]


def describe_input(card: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a model card that says that images come resized, by the resize that it describes."""
    entry = f"uint8 RGB ({size}, {size}, 3), upright, resized before"
    preprocessing = [{**part, "input": entry} for part in card["preprocessing"]]
    return {**card, "preprocessing": preprocessing, "fixed_size": size}


def on_canvas(pipeline: Pipeline, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Resize images uint8 (h, w, 3) to the canvas of the first member, uint8 (size, size, 3)."""
    pixels = pipeline.parts[0].pixels(images)
    return list(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1).astype(np.uint8)))
