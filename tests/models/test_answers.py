"""Logits become probabilities as the task says, in a predictor and in a head alike."""

from __future__ import annotations

import torch
from torch import nn

from threefold.models.answers import probabilities
from threefold.models.pipeline import Predictor
from threefold.models.shared import HeadPredictor
from threefold.models.views import Views
from threefold.recipe.schema import ViewSpec


class MeanColour(nn.Module):
    """The mean of each channel of pixels, in tens, as logits."""

    form = "pooled"

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map (b, 3, s, s) to (b, 3)."""
        return pixels.mean((2, 3)) / 10


def test_each_label_has_its_own_sigmoid() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0], [9.0, 9.0, 9.0]])

    several = probabilities(logits, "multilabel")
    one = probabilities(logits, "multiclass")

    torch.testing.assert_close(several, 1 / (1 + torch.exp(-logits)))
    torch.testing.assert_close(one.sum(-1), torch.ones(2))


def test_a_predictor_averages_the_sigmoids_of_its_views() -> None:
    pixels = 20 * torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    views = Views(ViewSpec(kind="five-crop", upsample=1.5), 8, seed=0)
    predictor = Predictor(MeanColour(), views, "multilabel")

    probs = predictor(pixels)

    each = torch.stack([MeanColour()(view).sigmoid() for view in views(pixels)])
    torch.testing.assert_close(probs, each.mean(0))
    assert len(each) > 1


def test_a_head_on_shared_features_answers_with_sigmoids() -> None:
    features = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    head = nn.Identity()
    head.form = "pooled"  # type: ignore[assignment]

    torch.testing.assert_close(
        HeadPredictor(head, 2, "multilabel")(features), features.sigmoid().mean(0, True)
    )
