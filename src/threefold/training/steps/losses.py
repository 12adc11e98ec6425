"""The training loss: cross-entropy with the labels, and for a student distance from its teacher.

Images with any number of labels have the binary cross-entropy, as a mean over the labels.

Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from threefold.predictions.checks import FLOOR
from threefold.recipe.schema import DistillSpec, TrainSpec
from threefold.training.distributed.sharing import Share
from threefold.training.truth import task_of


class Whole(NamedTuple):
    """A micro-batch that several ranks have a share of."""

    images: int
    """Their number."""
    weight: float
    """Sum of the class weights of its labels, by which the cross-entropy is divided."""
    idle: bool
    """Whether the share only repeats images of another rank: its loss is 0."""


class BatchLoss:
    """The recipe's loss of a batch.

    Args:
        spec: class weights and label smoothing.
        labels: (n,) of all rows to train on, whose counts make the class weights; or targets
            (n, k), for any number of labels.
        num_classes: number of classes k.
        device: where the logits are.
        distill: how a student learns; None = from labels only.
    """

    def __init__(
        self,
        spec: TrainSpec,
        labels: np.ndarray,
        num_classes: int,
        device: torch.device,
        distill: DistillSpec | None = None,
    ) -> None:
        self.label_smoothing = spec.label_smoothing
        self.distill = distill
        self.task = task_of(labels)
        self.class_weights = None
        if spec.class_weights == "balanced":
            self.class_weights = _class_weights(labels, num_classes, device)

    def whole(self, labels: np.ndarray, own: Tensor, share: Share) -> Whole:
        """Describe the micro-batch that a share is of.

        Args:
            labels: of all its images, (n,) class numbers or targets (n, k).
            own: those of the share as the loss takes them; mixed images have shares of classes.
            share: the share.
        """
        weight = float(len(labels))
        if self.class_weights is not None and own.ndim == 1:
            weight = float(self.class_weights[torch.from_numpy(labels)].sum())
        return Whole(len(labels), weight, share.idle)

    def __call__(
        self, logits: Tensor, labels: Tensor, soft: Tensor | None, whole: Whole | None = None
    ) -> Tensor:
        """Mean loss of a batch; of a share, its part of the mean, which all shares' parts sum to.

        Args:
            logits: (b, k).
            labels: (b,) class numbers, or (b, k) shares of the classes, which may sum to the weight
                of the image; or targets (b, k), whose smoothing is towards one half.
            soft: (b, k) the teacher's softened probabilities, or None.
            whole: what the images are a share of; None = they are the batch.
        """
        loss = self._label_loss(logits, labels, whole)
        if soft is not None and self.distill is not None and self.task != "multilabel":
            distance = soft_loss(logits, soft, self.distill.temperature)
            if whole is not None:
                distance = distance * (len(logits) / whole.images)
            loss = (1 - self.distill.alpha) * loss + self.distill.alpha * distance
        return loss * 0.0 if whole is not None and whole.idle else loss

    def _label_loss(self, logits: Tensor, labels: Tensor, whole: Whole | None) -> Tensor:
        """The cross-entropy with the labels."""
        reduction = "mean" if whole is None else "sum"
        if self.task == "multilabel":
            smooth = labels.float() * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
            loss = functional.binary_cross_entropy_with_logits(logits, smooth, reduction=reduction)
            return loss if whole is None else loss / (whole.images * logits.shape[-1])
        loss = functional.cross_entropy(
            logits,
            labels,
            weight=self.class_weights,
            label_smoothing=self.label_smoothing,
            reduction=reduction,
        )
        return loss if whole is None else loss / whole.weight


def _class_weights(labels: np.ndarray, num_classes: int, device: torch.device) -> Tensor:
    """n / (k * count) for each class, scikit-learn's `balanced`."""
    counts = np.bincount(labels, minlength=num_classes).clip(min=1)
    return torch.tensor(len(labels) / (num_classes * counts), dtype=torch.float32, device=device)


def smooth_targets(targets: Tensor, smoothing: float) -> Tensor:
    """Smooth targets and leave their sums as they are, which are the weights of their rows.

    (The label smoothing of torch's cross-entropy adds the same to every row.)

    Args:
        targets: (n, k) shares of the classes, each times the weight of its row.
        smoothing: share of a row that is spread evenly over the classes.
    """
    return (1 - smoothing) * targets + smoothing * targets.mean(1, keepdim=True)


def soften(probs: np.ndarray, temperature: float, device: torch.device) -> Tensor:
    """Soften a teacher's probabilities: softmax(log(p) / temperature).

    Args:
        probs: (n, k), the teacher's.
        temperature: above 1 flattens, below 1 sharpens.
        device: where to put the result.

    Returns:
        (n, k) float32.
    """
    logs = torch.from_numpy(np.log(np.maximum(probs.astype(np.float64), FLOOR))) / temperature
    return logs.softmax(-1).to(device=device, dtype=torch.float32)


def teacher_targets(
    probs: np.ndarray | None, distill: DistillSpec | None, device: torch.device
) -> Tensor | None:
    """Return a teacher's softened probabilities (n, k) for a student; None for other members."""
    if probs is None or distill is None:
        return None
    return soften(probs, distill.temperature, device)


def soft_loss(logits: Tensor, softened: Tensor, temperature: float) -> Tensor:
    """Mean Kullback-Leibler divergence from teacher to student, times the squared temperature.

    The factor keeps the gradients as large as those of the cross-entropy (Hinton et al., section
    2.1). At temperature 1 the gradient is that of cross-entropy with the teacher's probabilities.

    Args:
        logits: (b, k), the student's.
        softened: (b, k), from `soften`, or mixtures of such rows.
        temperature: the one given to `soften`.
    """
    log_probs = functional.log_softmax(logits / temperature, -1)
    return functional.kl_div(log_probs, softened, reduction="batchmean") * temperature**2
