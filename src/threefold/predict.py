"""A trained member on many images: pixels in, probabilities out, views averaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from threefold.augment import Views
from threefold.errors import RecipeError


class Predictor(nn.Module):
    """A member behind its test-time views: softmaxes averaged over the views (paper section 4.3).

    `forward` maps pixels (b, 3, canvas, canvas) in 0..255 to probabilities (b, k). Scoring and the exported pipeline
    both run this module.
    """

    def __init__(self, member: nn.Module, views: Views | None = None) -> None:
        super().__init__()
        self.member = member
        self.views = views

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities (b, k)."""
        if self.views is None or self.views.count == 1:
            seen = pixels if self.views is None else self.views(pixels)[0]
            probs: Tensor = self.member(seen).float().softmax(-1)
            return probs
        return self.per_view(pixels).mean(0)

    def per_view(self, pixels: Tensor) -> Tensor:
        """Probabilities (v, b, k) of each view by itself."""
        views = pixels[None] if self.views is None else self.views(pixels)
        logits: Tensor = self.member(views.flatten(0, 1)).float()
        return logits.softmax(-1).reshape(len(views), -1, logits.shape[-1])


class FirstViews(nn.Module):
    """What a predictor would answer with its first n views only, for several n at once: (b, len(counts), k)."""

    def __init__(self, predictor: Predictor, counts: Sequence[int]) -> None:
        super().__init__()
        self.predictor, self.counts = predictor, counts

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities (b, len(counts), k) of pixels (b, 3, canvas, canvas)."""
        per_view = self.predictor.per_view(pixels)
        return torch.stack([per_view[:n].mean(0) for n in self.counts], 1)


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` takes CUDA, then Apple's, then the CPU.

    Raises:
        RecipeError: no such device here.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            "no such device here",
            where="train.device",
            got=f"{name} ({str(error).splitlines()[0][:80]})",
            fix="use auto or cpu",
        ) from None


def pick_precision(name: str, device: torch.device) -> str:
    """float32 or bfloat16; `auto` takes bfloat16 only where the hardware multiplies it (measured: emulation is 10 x slower)."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if device.type == "cpu" and native() else "float32"


def to_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (b, s, s, 3) -> float (b, 3, s, s) in 0..255 on the device, channels last in memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).to(device, non_blocking=True)
    return tensor.permute(0, 3, 1, 2).float()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The mixed-precision context of a run."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@torch.inference_mode()
def predict_probs(
    predictor: nn.Module, pixels: np.ndarray, precision: str = "float32", batch_size: int = 128
) -> np.ndarray:
    """What a predictor answers on pixels uint8 (n, canvas, canvas, 3): float32 (n, k); leaves it in eval mode."""
    predictor.eval()
    device = next(predictor.parameters()).device
    parts = []
    for begin in range(0, len(pixels), batch_size):
        images = to_pixels(pixels[begin : begin + batch_size], device).contiguous(
            memory_format=torch.channels_last
        )
        with autocast(precision, device):
            parts.append(predictor(images).float().cpu().numpy())
    return np.concatenate(parts)
