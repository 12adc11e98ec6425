"""Networks that share a frozen backbone: one pass of an image through it serves all their heads.

The folds of a member whose backbone was never trained differ in their heads only. So the pipeline
holds the backbone once, and so do members with other heads on the same backbone and input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from threefold.models.answers import probabilities
from threefold.models.heads import InputForm
from threefold.models.member import Member, head_inputs
from threefold.models.resize import resize_each, resize_square
from threefold.models.views import Views
from threefold.tasks import Task


class SharedBackbone(nn.Module):
    """A frozen backbone with its normalisation and test-time views: pixels to features.

    Args:
        member: a network on the backbone; its head is not used.
        views: the test-time views; its canvas is the side to which images are resized.
        resize: see `resize_square`.

    Attributes:
        forms: which features the heads take; see `require`.
    """

    backbone: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        member: Member,
        views: Views,
        resize: Literal["squash", "crop"],
    ) -> None:
        super().__init__()
        self.backbone, self.views = member.backbone, views
        self.canvas, self.resize = views.canvas, resize
        self.forms: tuple[InputForm, ...] = ()
        self.register_buffer("mean", member.mean, persistent=False)
        self.register_buffer("std", member.std, persistent=False)

    def require(self, form: InputForm) -> None:
        """Compute this form of the features, too."""
        if form not in self.forms:
            self.forms = (*self.forms, form)

    def forward(self, pixels: Tensor) -> dict[InputForm, Tensor]:
        """Map pixels (b, 3, canvas, canvas) in 0..255 to the features of all views.

        Returns:
            By form: float (v * b, c) or (v * b, c, h, w), all images of the first view first.
        """
        views = self.views(pixels).flatten(0, 1)
        return head_inputs(self.backbone, (views - self.mean) / self.std, self.forms)

    def features(self, images: Tensor) -> dict[InputForm, Tensor]:
        """Map uint8 (b, h, w, 3) to the features of all views, see `forward`."""
        return cast(
            "dict[InputForm, Tensor]", self(resize_square(images, self.canvas, self.resize))
        )


class HeadPredictor(nn.Module):
    """A head on the features of a shared backbone: softmaxes averaged over the views.

    Args:
        head: maps features to logits, see `heads.Head`.
        views: number of views v.
        task: "multilabel" = sigmoids in place of softmaxes.
    """

    def __init__(self, head: nn.Module, views: int = 1, task: Task = "multiclass") -> None:
        super().__init__()
        self.head, self.views, self.task = head, views, task
        self.form = cast("InputForm", head.form)

    def forward(self, features: Tensor) -> Tensor:
        """Map the features of all views (v * b, ...) to probabilities (b, k)."""
        probs = probabilities(self.head(features), self.task)
        if self.views == 1:
            return probs
        return probs.reshape(self.views, -1, probs.shape[-1]).mean(0)


class HeadsPipeline(nn.Module):
    """One member from uint8 images to probabilities: a shared backbone and a head for each fold.

    Args:
        shared: the backbone; several members may have the same.
        heads: of the fold models.
        task: see `HeadPredictor`.
    """

    def __init__(
        self, shared: SharedBackbone, heads: Sequence[nn.Module], task: Task = "multiclass"
    ) -> None:
        super().__init__()
        self.shared = shared
        predictors = [HeadPredictor(head, shared.views.count, task) for head in heads]
        for predictor in predictors:
            shared.require(predictor.form)
        self.heads = nn.ModuleList(predictors)

    @property
    def canvas(self) -> int:
        """Side in pixels to which images are resized."""
        return self.shared.canvas

    @property
    def resize(self) -> Literal["squash", "crop"]:
        """How images are resized, see `resize_square`."""
        return self.shared.resize

    @property
    def views(self) -> Views:
        """The test-time views."""
        return self.shared.views

    @property
    def networks(self) -> int:
        """Number of fold models."""
        return len(self.heads)

    @property
    def sample(self) -> nn.Module:
        """A module with the normalisation of every fold model."""
        return self.shared

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (b, h, w, 3) to probabilities (b, k)."""
        return self.per_fold(images).mean(0)

    def per_fold(self, images: Tensor) -> Tensor:
        """Map uint8 (b, h, w, 3) to the probabilities of each fold model (f, b, k)."""
        return self.answers(self.shared.features(images))

    def answers(self, features: dict[InputForm, Tensor]) -> Tensor:
        """Map the features of the shared backbone to the probabilities of each fold model."""
        heads = [cast("HeadPredictor", head) for head in self.heads]
        return torch.stack([head(features[head.form]) for head in heads])

    def pixels(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Resize uint8 images (h, w, 3) of any sizes, see `resize_each`."""
        return resize_each(images, self.canvas, self.resize)
