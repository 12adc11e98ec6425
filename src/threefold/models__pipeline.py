"""Everything that happens at inference, as one module: uint8 images in, calibrated probabilities out.

Resize, normalisation, views, members, ensemble and calibration are inside, so what is evaluated is what is exported is
what is served. Only `images.decode` (file -> RGB uint8) stays outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.models__resize import resize_square
from threefold.models__views import Views

BATCH: Final = 16
"""Images of one size that `predict_proba` gives to the networks at once."""


class MemberPipeline(nn.Module):
    """One member's way from uint8 (b, h, w, 3) to probabilities (b, k), averaged over its fold models."""

    def __init__(
        self, predictors: list[Predictor], canvas: int, resize: Literal["squash", "crop"]
    ) -> None:
        super().__init__()
        self.predictors = nn.ModuleList(predictors)
        self.canvas, self.resize = canvas, resize

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities (b, k)."""
        return self.per_fold(images).mean(0)

    def per_fold(self, images: Tensor) -> Tensor:
        """Probabilities (f, b, k) of each fold model."""
        pixels = resize_square(images, self.canvas, self.resize)
        return torch.stack([predictor(pixels) for predictor in self.predictors])

    @torch.inference_mode()
    def pixels(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """What the networks see of uint8 images (h, w, 3) of any sizes: float32 (n, 3, canvas, canvas) in 0..255."""
        seen = [
            resize_square(torch.from_numpy(image[None].copy()), self.canvas, self.resize).numpy()
            for image in images
        ]
        return (
            np.concatenate(seen) if seen else np.zeros((0, 3, self.canvas, self.canvas), np.float32)
        )


def mix(nets: Tensor, mixing: Tensor) -> Tensor:
    """Answers of members (b, m, k) from those of all networks (b, j, k) and weights (m, j)."""
    return (mixing[None, :, :, None] * nets[:, None]).sum(2)


class Combiner(nn.Module):
    """Ensemble and calibration: member probabilities (b, m, k) to probabilities (b, k).

    Args:
        ensemble: (b, m, k) to (b, k), an ensemble's `to_module()`.
        calibration: (b, k) to (b, k), a calibration's `to_module()`, or `temperature_module(t)`; None = as they are.
    """

    def __init__(self, ensemble: nn.Module, calibration: nn.Module | None = None) -> None:
        super().__init__()
        self.ensemble, self.calibration = (
            ensemble,
            calibration if calibration is not None else nn.Identity(),
        )

    def forward(self, member_probs: Tensor) -> Tensor:
        """Probabilities (b, k)."""
        return cast(Tensor, self.calibration(self.ensemble(member_probs)))


class Pipeline(nn.Module):
    """The deployable whole; always in eval mode.

    Args:
        members: the networks, by member.
        combiner: ensemble and calibration.
        classes: the class names.
        names: the members of the second output, where they are not those of `members`.
        mixing: (m, networks) weights that make the members' answers of all fold models, where members are not in every
            fold; None = each member is the mean of its own.

    Attributes:
        names: the members' names, in the order of the second output.
        classes: the class names, in the order of the last axis.
    """

    mixing: Tensor | None

    def __init__(
        self,
        members: dict[str, MemberPipeline],
        combiner: Combiner,
        classes: tuple[str, ...],
        names: Sequence[str] | None = None,
        mixing: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members.values())
        self.combiner = combiner
        self.names, self.classes = tuple(names if names is not None else members), classes
        self.register_buffer(
            "mixing", None if mixing is None else torch.tensor(mixing, dtype=torch.float32)
        )
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (b, h, w, 3) to probabilities (b, k) and each member's (b, m, k)."""
        if self.mixing is None:
            member_probs = torch.stack([member(images) for member in self.members], 1)
        else:
            nets = torch.cat(
                [cast(MemberPipeline, member).per_fold(images) for member in self.members]
            )
            member_probs = mix(nets.transpose(0, 1), self.mixing)
        return self.combiner(member_probs), member_probs

    @torch.inference_mode()
    def predict_proba(self, images: list[np.ndarray]) -> np.ndarray:
        """Probabilities float32 (n, k) of uint8 images (h, w, 3) of any sizes; neighbours of one size go together."""
        runs = (list(same) for _, same in itertools.groupby(images, key=np.shape))
        stacks = (np.stack(run[i : i + BATCH]) for run in runs for i in range(0, len(run), BATCH))
        return np.concatenate([self(torch.from_numpy(stack))[0].numpy() for stack in stacks])


def describe_preprocessing(pipeline: Pipeline) -> list[dict[str, Any]]:
    """What happens to an image before each member's networks, as plain values: resize, pixels, normalisation, views."""
    told = []
    for member in cast(Iterable[MemberPipeline], pipeline.members):
        predictor = cast(Predictor, member.predictors[0])
        norms = [m for m in predictor.modules() if hasattr(m, "mean") and hasattr(m, "std")]
        views = predictor.views
        told.append(
            {
                "input": "uint8 RGB (height, width, 3), upright",
                "resize": member.resize,
                "filter": "triangle, antialiased",
                "pixels": member.canvas,
                "mean": [cast(Tensor, m.mean).flatten().tolist() for m in norms],
                "std": [cast(Tensor, m.std).flatten().tolist() for m in norms],
                "scale": "0..255",
                "views": {"kind": views.kind, "count": views.count, "pixels": views.img_size}
                if views
                else None,
            }
        )
    return told


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
