"""The augmentation of a training batch: the paper's warp, then erasing and mixing by timm."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from threefold.recipe.schema import AugmentSpec
from threefold.training.distributed.sharing import Share
from threefold.training.steps.augment import Augment


class BatchAugmentation:
    """The recipe's augmentation of a batch of images and their targets.

    Args:
        spec: the `augment` table of a recipe.
        num_classes: number of classes k.
        seed: of the augmentation's own generator; erasing and mixing draw from the global ones.

    Attributes:
        generator: the source of randomness of the warp.
    """

    def __init__(self, spec: AugmentSpec, num_classes: int, seed: int) -> None:
        self.warp = Augment(spec)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_classes = num_classes
        self.erase = None
        if spec.erasing:
            self.erase = RandomErasing(spec.erasing, mode="const", device="cpu")
        self.mix = None
        if spec.mixup or spec.cutmix:
            self.mix = Mixup(spec.mixup, spec.cutmix, label_smoothing=0.0, num_classes=num_classes)

    def __call__(
        self, images: Tensor, labels: Tensor, soft: Tensor | None, share: Share | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Augment images; labels (as class shares) and soft targets are mixed alike.

        All ranks draw the same numbers. A share has both images of each pair that is mixed.

        Args:
            images: float (b, 3, h, w) in 0..255.
            labels: (b,) class numbers, or (b, k) shares of the classes, or targets of any number
                of labels, of which a mixture has the shares of its images.
            soft: (b, k) a teacher's softened probabilities, or None.
            share: what the images are a part of; None = they are the batch.

        Returns:
            Images, labels as they were or, where images are mixed, shares of the classes (b, k),
            and soft targets.
        """
        images = self.warp(images, self.generator, share)
        if self.erase is not None:
            images = self._erase(self.erase, images, share)
        if self.mix is None:
            return images, labels, soft
        # timm mixes pairs, so the last image of an odd batch stays unmixed. Each image counts as a
        # class of its own: the targets that timm returns are then the shares of the images.
        even = len(images) - len(images) % 2
        self.mix.num_classes = even
        mixed, shares = self.mix(images[:even], torch.arange(even, device=labels.device))
        images = torch.cat([mixed, images[even:]])
        classes = labels.to(shares.dtype)
        if labels.ndim == 1:
            classes = functional.one_hot(labels, self.num_classes).to(shares.dtype)
        classes = torch.cat([shares @ classes[:even], classes[even:]])
        if soft is not None:
            soft = torch.cat([shares @ soft[:even], soft[even:]])
        return images, classes, soft

    @staticmethod
    def _erase(erase: RandomErasing, images: Tensor, share: Share | None) -> Tensor:
        """Erase parts of images, with numbers for all images of the batch in their order."""
        if share is None:
            erased: Tensor = erase(images)
            return erased
        own = dict(zip(share.positions.tolist(), images, strict=True))
        other = torch.empty_like(images[0])
        for position in range(share.images):
            erase(own.get(position, other))
        return images
