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

from threefold.augment import resize_square
from threefold.predict import Predictor

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
        calibration: (b, k) to (b, k), a calibration's `to_module()`, or `TemperatureModule(t)`; None = as they are.
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
