"""The memory that a run takes at its peak, predicted before it begins."""

from __future__ import annotations

from typing import Final

from threefold.data.dataset import Sources
from threefold.machine import available_memory, peak_memory
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import MemberSpec
from threefold.training.features.cache import FeatureCache
from threefold.training.features.store import check_memory

COPIES_OF_LINEAR: Final = 3
"""Features that a linear head needs at once, in float16's bytes: as read, and as float32."""


def predict_memory(recipe: Recipe, sources: Sources, cache: FeatureCache) -> str:
    """Predict what a process of the run takes at its peak, in one line.

    The plan has run the networks on a few images already, and trained one of them if the recipe
    tunes, so its own peak stands for that. Added are the features of all training images, which a
    head reads at once.

    Args:
        recipe: the planned one.
        sources: the images.
        cache: of the features that the plan has computed.

    Returns:
        The line; empty where the system does not say what a process has taken.

    Raises:
        OutOfMemoryError: the features of one member do not fit.
    """
    needed = max((_feature_bytes(member, sources, cache) for member in _heads(recipe)), default=0)
    check_memory(needed, f"the features of {len(sources.train):,} images")
    taken = peak_memory()
    if not taken:
        return ""
    free = available_memory()
    line = f"memory: about {(taken + needed) / 1e9:.1f} GB at its peak"
    return line if free >= 2**60 else f"{line}; {free / 1e9:.1f} GB are free"


def _heads(recipe: Recipe) -> list[MemberSpec]:
    """Members whose head is trained on the features of all images."""
    return [m for m in recipe.members if recipe.stages_of(m.name)[0].kind == "head"]


def _feature_bytes(member: MemberSpec, sources: Sources, cache: FeatureCache) -> int:
    """Bytes of the features of all training images while a head is trained on them."""
    copies = COPIES_OF_LINEAR if member.head.is_linear else 1
    return copies * cache.bytes_per_image(member) * len(sources.train)
