"""Traced graphs answer as the networks do, and what cannot be traced is found out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from threefold.exporting.onnx_networks import Tracer
from threefold.models.features import FeatureExtractor
from threefold.models.member import create_backbone
from threefold.models.tracing import TracingError, simplify, trace_network
from threefold.recipe_schema import MemberSpec

NAMES = ("pixels", "features")


class CountsImages(nn.Module):
    """Adds the number of images, which tracing takes for a constant."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3)) + len(pixels)


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

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for batch in (pixels, pixels[:1]):
        answers = session.run(None, {"pixels": batch.numpy()})[0]
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

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    answers = session.run(None, {"pixels": np.zeros((5, 3, 8, 8), np.float32)})[0]
    np.testing.assert_allclose(answers, np.full(5, 5.0))
