"""What the network of a stage is given: images, cached activations, or features, and their targets.

The loop draws rows; here they become tensors on the device, with what is learned of them. The
answers on the select rows are given here, too, because they depend on the same form.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from threefold.models.member import Member
from threefold.models.pipeline import Predictor, predict_probs
from threefold.models.split import LateBlocks
from threefold.training.distributed.ranks import current_ranks
from threefold.training.distributed.sharing import Share
from threefold.training.features.activations import predict_late, to_activations
from threefold.training.features.cache import FeatureRows
from threefold.training.features.heads import head_probs, to_features
from threefold.training.pixel_cache import slice_rows
from threefold.training.stages.task import StageTask, features_of, pixels_of
from threefold.training.steps.batch_augmentation import BatchAugmentation
from threefold.training.steps.batches import Batch
from threefold.training.steps.device_pixels import PixelReader, pixel_reader
from threefold.training.steps.losses import BatchLoss, smooth_targets, teacher_targets


def stage_inputs(task: StageTask, device: torch.device) -> StageInputs:
    """Return the inputs of a stage: images or activations of a network, or features of a head."""
    if isinstance(task.fit, FeatureRows):
        return HeadInputs(task, device)
    return StageInputs(task, device)


class StageInputs:
    """Images, or activations of the frozen first blocks, with what is learned of them.

    Args:
        task: the stage.
        device: where the network is.

    Attributes:
        augment: the augmentation of batches of images.
        loss: the loss of a batch.
        reads_features: whether a head is trained, on cached features.
    """

    reads_features = False

    def __init__(self, task: StageTask, device: torch.device) -> None:
        spec = task.recipe.train
        self.task, self.device = task, device
        self.ranks = current_ranks()
        self.augment = BatchAugmentation(task.recipe.augment, task.num_classes, task.seed + 1)
        self._copies: np.ndarray = np.zeros(0)  # the epoch's activations, where these are cached
        self._targets: Tensor | None = None
        smoothing = spec.label_smoothing
        if task.targets is not None:
            targets = torch.from_numpy(task.targets).to(device)
            self._targets, smoothing = smooth_targets(targets, smoothing), 0.0
        self.loss = BatchLoss(
            spec.model_copy(update={"label_smoothing": smoothing}),
            task.fit.labels,
            task.num_classes,
            device,
            task.recipe.distill,
        )
        self._soft_targets = teacher_targets(task.teacher_probs, task.recipe.distill, device)

    def network(self, member: nn.Module) -> nn.Module:
        """Return the part of a member that is trained: all, or what follows cached activations."""
        if self.task.activations is None:
            return member
        return LateBlocks(cast("Member", member), self.task.activations.count)

    def begin_epoch(self, epoch: int) -> None:
        """Get the activations of the augmented copies of an epoch, where these are cached."""
        if self.task.activations is not None:
            self._copies = self.task.activations.fit(epoch)

    def sample(self, count: int) -> tuple[Tensor, str]:
        """Return what the network is given of some rows, unaugmented, and what to call it."""
        task = self.task
        if task.activations is not None:
            inputs = to_activations(task.activations.select[:count], self.device)
            return inputs, f"{task.network} from block {task.activations.count}"
        inputs = self._read_pixels(np.arange(min(count, len(task.fit.labels))))
        return inputs, f"{task.network} at {inputs.shape[-1]} px"

    def announce(self, parts: Sequence[np.ndarray]) -> None:
        """Let the images of the next micro-batches be read while others are trained on."""
        if self.task.activations is None:
            self._read_pixels.announce([self._own(rows)[0] for rows in parts])

    def batch(self, rows: np.ndarray) -> Batch:
        """Return what the network is given of some fit rows, or of this rank's share of them."""
        own, share = self._own(rows)
        images, labels, soft = self._read(own, *self._learned(own), share)
        if share is None:
            return Batch(images, labels, soft)
        whole = self.loss.whole(self.task.fit.labels[rows], labels, share)
        return Batch(images, labels, soft, whole)

    def answer(self, member: nn.Module, rows: slice) -> np.ndarray:
        """Return a member's probabilities (r, k) of some of the select rows."""
        if self.task.activations is not None:
            activations = self.task.activations.select[rows]
            return predict_late(self.network(member), activations, self.loss.task)
        predictor = Predictor(member, None, self.loss.task)
        return predict_probs(predictor, slice_rows(pixels_of(self.task.select), rows))

    def _own(self, rows: np.ndarray) -> tuple[np.ndarray, Share | None]:
        """Return this rank's share of the rows of a micro-batch; None = all of it."""
        share = self.ranks.share(len(rows))
        return (rows if share is None else rows[share.positions]), share

    @cached_property
    def _read_pixels(self) -> PixelReader:
        return pixel_reader(pixels_of(self.task.fit), self.device)

    def _learned(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Labels, or targets, and soft targets of some fit rows."""
        labels = torch.from_numpy(self.task.fit.labels[rows]).to(self.device)
        if self._targets is not None:
            labels = self._targets[torch.from_numpy(rows)]
        if self._soft_targets is None:
            return labels, None
        return labels, self._soft_targets[torch.from_numpy(rows)]

    def _read(
        self, rows: np.ndarray, labels: Tensor, soft: Tensor | None, share: Share | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Augmented images (or their activations), labels and soft targets."""
        if self.task.activations is not None:
            return to_activations(self._copies[rows], self.device), labels, soft
        images, labels, soft = self.augment(self._read_pixels(rows), labels, soft, share)
        return images.contiguous(memory_format=torch.channels_last), labels, soft


class HeadInputs(StageInputs):
    """Cached features, with what is learned of them; their copies are the augmentation."""

    reads_features = True

    def announce(self, parts: Sequence[np.ndarray]) -> None:
        """Do nothing: the features are in memory, or mapped."""

    def answer(self, member: nn.Module, rows: slice) -> np.ndarray:
        """Return a head's probabilities (r, k) of some of the select rows."""
        return head_probs(member, features_of(self.task.select)[rows], self.loss.task)

    def _read(
        self, rows: np.ndarray, labels: Tensor, soft: Tensor | None, share: Share | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return to_features(features_of(self.task.fit)[rows], self.device), labels, soft
