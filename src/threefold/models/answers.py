"""From a network's logits to probabilities."""

from __future__ import annotations

from torch import Tensor

from threefold.tasks import Task


def probabilities(logits: Tensor, task: Task) -> Tensor:
    """Map logits (..., k) to probabilities (..., k), in float32.

    Args:
        logits: one for each class.
        task: "multiclass" = a softmax, whose rows sum to 1; "multilabel" = a sigmoid for each
            label by itself.
    """
    logits = logits.float()
    return logits.sigmoid() if task == "multilabel" else logits.softmax(-1)
