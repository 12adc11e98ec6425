"""Predictions on many images: onnxruntime's are torch's, and torch answers where they are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.images import random_images
from torch import Tensor, nn

from threefold.models.member import build_member
from threefold.models.pipeline import FirstViews, Predictor, predict_probs
from threefold.models.views import Views
from threefold.recipe.schema import HeadSpec, MemberSpec, ViewSpec
from threefold.training import predict
from threefold.training.features.engines import BATCH
from threefold.training.predict import predict_images


@pytest.fixture(autouse=True)
def few_pixels_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "WORTH_PIXELS", 1)


def make_predictor(head: str = "linear", views: str = "center") -> Predictor:
    """A small network with random weights whose answers differ from image to image."""
    torch.manual_seed(0)
    spec = MemberSpec(
        name="m",
        backbone="test_efficientnet",
        img_size=32,
        weights="none",
        head=HeadSpec(kind=head, units=16),
    )
    member = build_member(spec, 3, pretrained=False)
    return Predictor(member, Views(ViewSpec(kind=views, upsample=1.25), 32, seed=0))


def make_pixels(n: int) -> np.ndarray:
    return random_images(n, 40, 40).numpy()


def watch_torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the images that torch answers."""
    counts: list[int] = []

    def count_images(predictor: nn.Module, pixels: np.ndarray) -> np.ndarray:
        counts.append(len(pixels))
        return predict_probs(predictor, pixels)

    monkeypatch.setattr(predict, "predict_probs", count_images)
    return counts


@pytest.mark.parametrize("head", ["linear", "bilstm"])
@pytest.mark.parametrize("views", ["center", "flip", "five-crop"])
def test_onnxruntime_answers_as_torch(
    head: str, views: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, pixels = make_predictor(head, views), make_pixels(BATCH + 5)
    expected = predict_probs(predictor, pixels)
    answered_by_torch = watch_torch(monkeypatch)

    probs = predict_images(predictor, pixels)

    assert answered_by_torch == [BATCH]
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, expected, atol=1e-5)


def test_several_numbers_of_views_at_once() -> None:
    predictor, pixels = make_predictor(views="ten-crop"), make_pixels(3)
    first_views = FirstViews(predictor, [1, 5])

    probs = predict_images(first_views, pixels)

    np.testing.assert_allclose(probs, predict_probs(first_views, pixels), atol=1e-5)


def test_few_images_are_answered_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, pixels = make_predictor(), make_pixels(3)
    monkeypatch.setattr(predict, "WORTH_PIXELS", 3 * 40 * 40 + 1)
    monkeypatch.setattr(predict, "trace_network", None)

    probs = predict_images(predictor, pixels)

    np.testing.assert_array_equal(probs, predict_probs(predictor, pixels))


def test_torch_answers_where_the_graph_answers_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, pixels = make_predictor(), make_pixels(5)
    other = make_predictor("bilstm")
    monkeypatch.setattr(predict, "simplify", lambda network, size: other.eval())

    probs = predict_images(predictor, pixels)

    np.testing.assert_array_equal(probs, predict_probs(predictor, pixels))


def test_torch_answers_what_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(nn.Module):
        """Its answers depend on the number of images, which tracing takes for a constant."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, pixels: Tensor) -> Tensor:
            return self.scale * pixels.mean((2, 3)) * len(pixels)

    pixels = make_pixels(5)

    probs = predict_images(Counts(), pixels)

    np.testing.assert_array_equal(probs, predict_probs(Counts(), pixels))
