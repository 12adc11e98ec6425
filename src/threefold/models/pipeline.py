"""Inference as one module: uint8 images in, calibrated probabilities out.

Resize, normalisation, views, members, ensemble and calibration are inside, so the same computation
is evaluated, exported and served. Only `images.decode` (file -> RGB uint8) is outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from threefold.errors import RecipeError, is_out_of_memory
from threefold.models.answers import probabilities
from threefold.models.heads import InputForm
from threefold.models.resize import resize_each, resize_square
from threefold.models.shared import HeadsPipeline
from threefold.models.views import Views
from threefold.tasks import Task

BATCH: Final = 16
"""Largest number of images of one size that `Pipeline.predict_proba` puts into a batch."""

BATCH_PIXELS: Final = 4_000_000
"""Largest number of their pixels together, above which each is alone: as floats they take 48 MB."""


class ImageRows(Protocol):
    """Images of one size, uint8 (n, s, s, 3): an array, or a file whose rows are read on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (n, s, s, 3)."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


class Predictor(nn.Module):
    """A member with its test-time views: softmaxes averaged over the views (paper section 4.3).

    Scoring and the exported pipeline both run this module.

    Args:
        member: maps pixels to logits, see `Member`.
        views: None = the whole image.
        task: "multilabel" = sigmoids in place of softmaxes.
    """

    def __init__(
        self, member: nn.Module, views: Views | None = None, task: Task = "multiclass"
    ) -> None:
        super().__init__()
        self.member = member
        self.views = views
        self.task = task

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (b, 3, canvas, canvas) in 0..255 to probabilities (b, k)."""
        if self.views is not None and self.views.count > 1:
            return self.per_view(pixels).mean(0)
        view = pixels if self.views is None else self.views(pixels)[0]
        return probabilities(self.member(view), self.task)

    def per_view(self, pixels: Tensor) -> Tensor:
        """Map pixels (b, 3, canvas, canvas) to the probabilities of each view (v, b, k)."""
        views = pixels[None] if self.views is None else self.views(pixels)
        logits: Tensor = self.member(views.flatten(0, 1))
        probs = probabilities(logits, self.task)
        return probs.reshape(len(views), -1, logits.shape[-1])


class FirstViews(nn.Module):
    """A predictor with only its first n views, for several n at once.

    Args:
        predictor: the predictor with all its views.
        counts: the numbers of views.
    """

    def __init__(self, predictor: Predictor, counts: Sequence[int]) -> None:
        super().__init__()
        self.predictor, self.counts = predictor, counts

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (b, 3, canvas, canvas) to probabilities (b, len(counts), k)."""
        per_view = self.predictor.per_view(pixels)
        return torch.stack([per_view[:n].mean(0) for n in self.counts], 1)


class MemberPipeline(nn.Module):
    """One member from uint8 images to probabilities, averaged over its fold models.

    Args:
        predictors: one for each fold model.
        canvas: side in pixels to which images are resized.
        resize: see `resize_square`.
    """

    def __init__(
        self, predictors: list[Predictor], canvas: int, resize: Literal["squash", "crop"]
    ) -> None:
        super().__init__()
        self.predictors = nn.ModuleList(predictors)
        self.canvas, self.resize = canvas, resize

    @property
    def views(self) -> Views | None:
        """The test-time views; None = the whole image."""
        return cast("Predictor", self.predictors[0]).views

    @property
    def networks(self) -> int:
        """Number of fold models."""
        return len(self.predictors)

    @property
    def sample(self) -> nn.Module:
        """A module with the normalisation of every fold model."""
        return self.predictors[0]

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (b, h, w, 3) to probabilities (b, k)."""
        return self.per_fold(images).mean(0)

    def per_fold(self, images: Tensor) -> Tensor:
        """Map uint8 (b, h, w, 3) to the probabilities of each fold model (f, b, k)."""
        pixels = resize_square(images, self.canvas, self.resize)
        return torch.stack([predictor(pixels) for predictor in self.predictors])

    def pixels(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Resize uint8 images (h, w, 3) of any sizes, see `resize_each`."""
        return resize_each(images, self.canvas, self.resize)


def mix(nets: Tensor, mixing: Tensor) -> Tensor:
    """Average networks into members.

    Args:
        nets: probabilities of all networks (b, j, k).
        mixing: weights (m, j).

    Returns:
        Probabilities of the members (b, m, k).
    """
    return (mixing[None, :, :, None] * nets[:, None]).sum(2)


class Combiner(nn.Module):
    """Ensemble and calibration: member probabilities (b, m, k) to probabilities (b, k).

    Args:
        ensemble: (b, m, k) to (b, k), an ensemble's `to_module()`.
        calibration: (b, k) to (b, k), a calibration's `to_module()`; None = no calibration.
    """

    def __init__(self, ensemble: nn.Module, calibration: nn.Module | None = None) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.calibration = nn.Identity() if calibration is None else calibration

    def forward(self, member_probs: Tensor) -> Tensor:
        """Map member probabilities (b, m, k) to probabilities (b, k)."""
        return cast("Tensor", self.calibration(self.ensemble(member_probs)))


class Pipeline(nn.Module):
    """The deployable ensemble, always in eval mode.

    Args:
        members: the networks, by member; members with the same `SharedBackbone` share its pass.
        combiner: ensemble and calibration.
        classes: names of the classes, in the order of the last axis.
        names: names of the members in the second output; None = those of `members`.
        mixing: weights (m, networks) of all fold models in each member's answer, for members that
            are not trained in every fold; None = each member is the mean of its own fold models.
    """

    mixing: Tensor | None

    def __init__(
        self,
        members: Mapping[str, MemberPipeline | HeadsPipeline],
        combiner: Combiner,
        classes: tuple[str, ...],
        names: Sequence[str] | None = None,
        mixing: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members.values())
        # Numbers, because torch.export copies a module that two members have in common.
        self.shared = [id(getattr(member, "shared", None)) for member in members.values()]
        self.combiner = combiner
        self.names, self.classes = tuple(members if names is None else names), classes
        weights = None if mixing is None else torch.tensor(mixing, dtype=torch.float32)
        self.register_buffer("mixing", weights)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map uint8 (b, h, w, 3) to probabilities (b, k) and each member's (b, m, k)."""
        nets = self.per_fold(images)
        if self.mixing is None:
            member_probs = torch.stack([net.mean(0) for net in nets], 1)
        else:
            member_probs = mix(torch.cat(nets).transpose(0, 1), self.mixing)
        return self.combiner(member_probs), member_probs

    def per_fold(self, images: Tensor) -> list[Tensor]:
        """Map uint8 (b, h, w, 3) to the probabilities of each member's fold models (f, b, k).

        Each shared backbone runs once.
        """
        features: dict[int, dict[InputForm, Tensor]] = {}
        probs = []
        for member, shared in zip(self.parts, self.shared, strict=True):
            if isinstance(member, HeadsPipeline):
                if shared not in features:
                    features[shared] = member.shared.features(images)
                probs.append(member.answers(features[shared]))
            else:
                probs.append(member.per_fold(images))
        return probs

    @property
    def parts(self) -> list[MemberPipeline | HeadsPipeline]:
        """The networks of each member, in order."""
        return [cast("MemberPipeline | HeadsPipeline", member) for member in self.members]

    @torch.inference_mode()
    def predict_proba(self, images: list[np.ndarray]) -> np.ndarray:
        """Predict probabilities for images of any sizes; neighbours of one size share a batch.

        Args:
            images: uint8 (h, w, 3).

        Returns:
            float32 (n, k).
        """
        probs = []
        for _, group in itertools.groupby(images, key=np.shape):
            same_size = list(group)
            height, width = same_size[0].shape[:2]
            size = max(1, min(BATCH, BATCH_PIXELS // (height * width)))
            for begin in range(0, len(same_size), size):
                batch = np.stack(same_size[begin : begin + size])
                probs.append(self(torch.from_numpy(batch))[0].numpy())
        return np.concatenate(probs)


def describe_preprocessing(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Describe the resize, pixels, normalisation and views of each member as plain values."""
    descriptions = []
    for member in pipeline.parts:
        norms = [m for m in member.sample.modules() if hasattr(m, "mean") and hasattr(m, "std")]
        description: dict[str, Any] = {
            "input": "uint8 RGB (height, width, 3), upright",
            "resize": member.resize,
            "filter": "triangle, antialiased",
            "pixels": member.canvas,
            "mean": [cast("Tensor", m.mean).flatten().tolist() for m in norms],
            "std": [cast("Tensor", m.std).flatten().tolist() for m in norms],
            "scale": "0..255",
            "views": None,
        }
        views = member.views
        if views is not None:
            description["views"] = {
                "kind": views.kind,
                "count": views.count,
                "pixels": views.img_size,
            }
        descriptions.append(description)
    return descriptions


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `auto` prefers CUDA, then MPS, then the CPU.

    Raises:
        RecipeError: the device does not exist.
    """
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            "no such device here",
            where="train.device",
            got=f"{name} ({str(error).splitlines()[0][:80]})",
            fix="use auto or cpu",
        ) from None


def to_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """Convert uint8 (b, s, s, 3) to float (b, 3, s, s) in 0..255, channels last in memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).to(device, non_blocking=True)
    return tensor.permute(0, 3, 1, 2).float()


@torch.no_grad()  # inference mode would leave tensors behind with which FSDP cannot train
def predict_probs(predictor: nn.Module, pixels: ImageRows, batch_size: int = 128) -> np.ndarray:
    """Run a predictor on many images, in float32 as in an exported file; it is left in eval mode.

    Args:
        predictor: maps pixels (b, 3, canvas, canvas) to probabilities.
        pixels: uint8 (n, canvas, canvas, 3).
        batch_size: number of images in a batch; halved where the memory is too small for them.

    Returns:
        float32 (n, k).

    Raises:
        OutOfMemoryError: not even one image fits into memory; torch's, or Python's MemoryError.
    """
    predictor.eval()
    device = next(predictor.parameters()).device
    probs: list[np.ndarray] = []
    begin, size = 0, min(batch_size, len(pixels))
    while begin < len(pixels):
        try:
            images = to_pixels(pixels[begin : begin + size], device)
            outputs = predictor(images.contiguous(memory_format=torch.channels_last))
            probs.append(outputs.float().cpu().numpy())
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            is_short = True
        else:
            begin, is_short = begin + size, False
        if is_short:  # outside of the handler, whose traceback keeps the tensors
            size = (size + 1) // 2
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return np.concatenate(probs)
