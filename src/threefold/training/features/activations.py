"""Training on cached activations: what the frozen first blocks of a backbone answer.

In a stage whose first blocks are frozen, the activations of an augmented image depend neither on
the fold nor on the epoch that it is drawn in. So each epoch has its own augmented copy of every
image, whose activations all folds share (`features.FeatureCache.blocks`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.models.heads import InputForm
from threefold.models.member import Member
from threefold.models.split import count_frozen_blocks
from threefold.recipe.schema import MemberSpec, StageSpec
from threefold.tasks import Task
from threefold.training.features.cache import FeatureCache
from threefold.training.features.heads import predict_cached, to_features
from threefold.training.steps.optimizers import set_trainable

_NONE: Final = np.empty(0, np.int64)

BATCH: Final = 128
"""Images whose activations are answered at a time."""


@dataclass(frozen=True)
class Activations:
    """What the frozen first blocks answer, in place of pixels.

    Attributes:
        count: number of these blocks, see `models.split`.
        fit: maps an epoch to the activations of its augmented copies of the fit rows, float16
            (n, c, h, w), or (n, l + c * h * w) for a head on levels; those of unlabelled images
            follow.
        select: those of the select rows, not augmented.
    """

    count: int
    fit: Callable[[int], np.ndarray]
    select: np.ndarray


def cached_blocks(member: nn.Module, stage: StageSpec) -> int:
    """Count the first blocks that a cached stage leaves as they are.

    Raises:
        RecipeError: there are none, or the backbone cannot be divided into blocks.
    """
    trainable = set_trainable(member, stage)
    count = 0
    if isinstance(member, Member):
        names = [name.removeprefix("backbone.") for name in trainable if "backbone." in name]
        form = cast("InputForm", member.head.form)
        count = count_frozen_blocks(member.backbone, names, form)
    if not count:
        raise RecipeError(
            "no frozen blocks to cache",
            where=f"stage {stage.name}",
            got=f"trainable = {stage.trainable!r}, frozen = {stage.frozen!r}",
            fix="freeze the stem and the first blocks of an EfficientNet, ResNet or ConvNeXt with "
            "`frozen`, or set cached = false",
        )
    return count


def cached_activations(
    cache: FeatureCache,
    spec: MemberSpec,
    count: int,
    fit: np.ndarray,
    select: np.ndarray,
    epochs: int,
    unlabelled: np.ndarray = _NONE,
) -> Activations:
    """Return the activations of a fold; each epoch's copies are computed when it begins.

    Args:
        cache: of features.
        spec: the member.
        count: number of frozen blocks.
        fit: (n,) row numbers.
        select: (m,) row numbers.
        epochs: of the stage.
        unlabelled: (u,) numbers of unlabelled images, which follow the fit rows.
    """
    expected = (epochs + 1) * (len(fit) + len(select) + len(unlabelled))
    return Activations(
        count,
        partial(_copy, cache, spec, count, fit, unlabelled),
        cache.blocks("train", spec, select, count, expected=expected),
    )


def _copy(
    cache: FeatureCache,
    spec: MemberSpec,
    count: int,
    fit: np.ndarray,
    unlabelled: np.ndarray,
    epoch: int,
) -> np.ndarray:
    """The activations of an epoch's augmented copies."""
    activations = cache.blocks("train", spec, fit, count, copy=epoch + 1)
    if not len(unlabelled):
        return activations
    more = cache.blocks("unlabelled", spec, unlabelled, count, copy=epoch + 1)
    return np.concatenate([activations, more])


def to_activations(activations: np.ndarray, device: torch.device) -> Tensor:
    """Convert float16 activations to float32 on a device; maps are channels last in memory."""
    features = to_features(activations, device)
    if features.ndim != 4:
        return features
    return features.contiguous(memory_format=torch.channels_last)


def predict_late(late: nn.Module, activations: np.ndarray, task: Task = "multiclass") -> np.ndarray:
    """Run what follows the frozen blocks on many activations; it is left in eval mode.

    Args:
        late: maps activations to logits.
        activations: float16 (n, ...).
        task: what logits become, see `probabilities`.

    Returns:
        Probabilities, float32 (n, k).
    """
    return predict_cached(late, activations, to_activations, BATCH, task)
