"""The distillation loss: how far a student's softened probabilities are from its teacher's.

Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from threefold.predictions.checks import FLOOR


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
