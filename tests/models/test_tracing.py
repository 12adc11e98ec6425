"""Traced graphs answer as the networks do, and what cannot be traced is found out."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from threefold.exporting.onnx_networks import Tracer
from threefold.models.features import FeatureExtractor
from threefold.models.heads import build_head
from threefold.models.member import create_backbone
from threefold.models.resize import resize_square
from threefold.models.shared import HeadPredictor
from threefold.models.tracing import TracingError, simplify, trace, trace_network
from threefold.recipe.schema import HeadSpec, MemberSpec

NAMES = ("pixels", "features")


class CountsImages(nn.Module):
    """Adds the number of images, which tracing takes for a constant."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3)) + len(pixels)


class Resizes(nn.Module):
    """Resizes images to 24 x 24 pixels."""

    def __init__(self, mode: Literal["squash", "crop"]) -> None:
        super().__init__()
        self.mode: Literal["squash", "crop"] = mode

    def forward(self, images: Tensor) -> Tensor:
        return resize_square(images, 24, self.mode)


def answer(graph: bytes, example: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    return np.asarray(outputs[0])


def make_images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


def make_extractor(name: str) -> FeatureExtractor:
    torch.manual_seed(0)
    spec = MemberSpec(name="m", backbone=name, img_size=64, weights="none")
    return FeatureExtractor(create_backbone(spec, pretrained=False), "pooled")


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "tf_efficientnet_lite0", "test_resnet", "test_convnext"]
)
def test_graph_answers_as_the_network_for_any_number_of_images(name: str) -> None:
    extractor = make_extractor(name)
    pixels = 255 * torch.rand(5, 3, 64, 64)

    graph = trace_network(simplify(extractor, 64), 64, NAMES)

    for batch in (pixels, pixels[:1]):
        answers = answer(graph, batch)
        np.testing.assert_allclose(answers, extractor(batch).numpy(), rtol=1e-3, atol=1e-4)


def test_the_padding_of_tensorflow_is_constant_in_the_graph() -> None:
    graph = trace_network(simplify(make_extractor("tf_efficientnet_lite0"), 64), 64, NAMES)

    kinds = Counter(node.op_type for node in onnx.load_from_string(graph).graph.node)
    assert kinds["Pad"] == 5
    assert not {"Shape", "Ceil", "BatchNormalization"} & set(kinds)


def test_a_batch_taken_for_a_constant_is_found() -> None:
    with pytest.raises(TracingError, match="differ"):
        trace_network(CountsImages(), 8, NAMES)


def test_what_tracing_cannot_export_goes_the_other_way() -> None:
    model = Tracer().trace_network(CountsImages(), 8, NAMES)

    answers = answer(model.SerializeToString(), torch.zeros(5, 3, 8, 8))
    np.testing.assert_allclose(answers, np.full(5, 5.0))


@pytest.mark.parametrize("mode", ["squash", "crop"])
def test_the_resize_has_the_same_pixels_at_every_size(mode: Literal["squash", "crop"]) -> None:
    resize = Resizes(mode)

    graph = trace(resize, make_images(2, 30, 40, 3), make_images(3, 50, 20, 3), ("images", "out"))

    for height, width in ((24, 24), (7, 90), (131, 64), (300, 411), (1, 1)):
        images = make_images(2, height, width, 3)
        np.testing.assert_array_equal(answer(graph, images), resize(images).numpy())


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("sequence", ["pooled", "rows", "spatial"])
@pytest.mark.parametrize("kind", ["linear", "rnn", "gru", "lstm", "bilstm"])
def test_heads_are_traced_for_any_number_of_images(kind: str, sequence: str, views: int) -> None:
    if kind == "linear" and sequence != "pooled":
        return
    spec = HeadSpec(kind=kind, units=8, sequence=sequence)
    head = HeadPredictor(build_head(spec, 5, 3).eval().requires_grad_(False), views)
    shape = (5,) if sequence == "pooled" else (5, 4, 4)
    features = torch.randn(11 * views, *shape, generator=torch.Generator().manual_seed(0))
    example, other, new = features.split([2 * views, 3 * views, 6 * views])

    graph = trace(head, example, other, ("features", "probs"))

    for batch in (new, new[:views]):
        np.testing.assert_allclose(answer(graph, batch), head(batch).numpy(), atol=1e-6)
