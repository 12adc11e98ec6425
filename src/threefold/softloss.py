"""The loss of a student: how far its softened answer is from its teacher's (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from threefold.predictions__checks import FLOOR


def soften(probs: np.ndarray, temperature: float, device: torch.device) -> Tensor:
    """A teacher's probabilities at a temperature: softmax(log(p) / temperature), float32 (n, k) on the device."""
    logs = torch.from_numpy(np.log(np.maximum(probs.astype(np.float64), FLOOR))) / temperature
    return logs.softmax(-1).to(device=device, dtype=torch.float32)


def soft_loss(logits: Tensor, softened: Tensor, temperature: float) -> Tensor:
    """Mean Kullback-Leibler divergence from the teacher's softened probabilities to the student's, times temperature squared.

    The factor keeps the size of the gradients beside the cross-entropy's (Hinton et al., section 2.1). At temperature 1 the
    gradient is that of cross-entropy with the teacher's probabilities.

    Args:
        logits: (b, k), the student's.
        softened: (b, k), of `soften`, or a mixture of such rows.
        temperature: the one that they were softened at.
    """
    own = functional.log_softmax(logits / temperature, -1)
    return functional.kl_div(own, softened, reduction="batchmean") * temperature**2
