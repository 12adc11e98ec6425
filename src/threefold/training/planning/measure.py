"""What a plan measures: probes at several image sizes, and the speed of training."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from threefold.data.dataset import Sources
from threefold.data.label_folds import stratify
from threefold.models.backbones import resolve_backbone
from threefold.models.heads import InputForm
from threefold.models.member import Member, build_member, has_token_grid, last_level
from threefold.models.split import EarlyBlocks, LateBlocks
from threefold.recipe.schema import MemberSpec, StageSpec
from threefold.training.features.activations import cached_blocks
from threefold.training.features.cache import FeatureCache
from threefold.training.features.probe import Targets, fit_penalties
from threefold.training.steps.allocator import reuse_freed_memory
from threefold.training.steps.optimizers import set_trainable, train_mode
from threefold.training.truth import describe_quality, row_losses

PROBE_ROWS = 500
"""Most images on which image sizes, or candidate backbones, are compared."""

COMPARISON_FOLDS = 3
"""Folds of such a comparison, where classes are large enough."""

PROBE_L2 = (1e4, 1e3, 1e2, 1e1)
"""Penalties that a comparison tries for each probe."""


class Speed(NamedTuple):
    """Seconds per image: a fixed part and a part that grows with the area."""

    fixed: float
    per_pixel: float

    def per_image(self, img_size: int) -> float:
        """Seconds per image of a size."""
        return self.fixed + self.per_pixel * img_size * img_size


class SizeProbe(NamedTuple):
    """A probe at one image size, cross-validated.

    Attributes:
        img_size: side in pixels.
        losses: (n,) log loss of each image, out of fold.
        quality: accuracy out of fold, or mean average precision of any number of labels, in words.
        last_losses: (n,) the same if the head reads the last level only.
        groups: (n,) group of each image, or None.
    """

    img_size: int
    losses: np.ndarray
    quality: str
    last_losses: np.ndarray
    groups: Sequence[str] | None = None

    @property
    def loss(self) -> float:
        """Mean log loss."""
        return float(self.losses.mean())

    @property
    def last_loss(self) -> float:
        """Mean log loss if the head reads the last level only."""
        return float(self.last_losses.mean())


def spread_over_classes(labels: np.ndarray, limit: int) -> np.ndarray:
    """Return at most `limit` rows, of each class the same share and at least three.

    Args:
        labels: (n,) class numbers, or targets (n, k), of which each label has at least three.
        limit: of the rows.
    """
    if labels.ndim == 2:
        return _spread_over_labels(labels, limit)
    share = min(1.0, limit / len(labels))
    rows = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(len(members), max(COMPARISON_FOLDS, round(share * len(members))))
        rows.append(members[np.linspace(0, len(members) - 1, count).astype(int)])
    return np.sort(np.concatenate(rows))


def _spread_over_labels(targets: np.ndarray, limit: int) -> np.ndarray:
    """Return rows evenly spaced, and more of labels that fewer than three of them have or lack."""
    n = len(targets)
    rows = set(np.linspace(0, n - 1, min(n, limit)).astype(int).tolist())
    for column in targets.T:
        for value in (0, 1):
            known = np.flatnonzero(column == value)
            short = COMPARISON_FOLDS - sum(column[row] == value for row in rows)
            if short > 0:
                rows |= set(np.setdiff1d(known, list(rows))[:short].tolist())
    return np.array(sorted(rows))


def probe_size(
    cache: FeatureCache, spec: MemberSpec, rows: np.ndarray, sources: Sources
) -> SizeProbe:
    """Cross-validate a linear head on the features of some training rows.

    Args:
        cache: of features.
        spec: the member, whose `img_size` is probed.
        rows: (n,) row numbers.
        sources: the images, for groups.
    """
    features, labels = cache.rows("train", spec, rows, expected=len(sources.train))
    groups = sources.train.groups
    row_groups = None if groups is None else [groups[row] for row in rows]
    num_classes = len(sources.train.classes)
    probs = cross_validated_probe(features, labels, num_classes, row_groups)
    last_losses = losses = row_losses(probs, labels)
    if spec.head.sequence == "levels":
        last = last_level(cache.backbone(spec), features)
        last_probs = cross_validated_probe(last, labels, num_classes, row_groups)
        last_losses = row_losses(last_probs, labels)
    quality = describe_quality(probs, labels)
    return SizeProbe(spec.img_size, losses, quality, last_losses, row_groups)


def clearly_lower(
    losses: np.ndarray, others: np.ndarray, groups: Sequence[str] | None = None
) -> bool:
    """Whether losses are lower than others by more than a standard error of the paired difference.

    Args:
        losses: (n,).
        others: (n,) of the same images.
        groups: (n,) images of one group count as one observation; None = each image does.
    """
    differences = others - losses
    mean = differences.mean()
    codes = np.arange(len(losses))
    if groups is not None:
        codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(codes, differences - mean)
    count = max(2, len(sums))
    error = np.sqrt((sums**2).sum() * count / (count - 1)) / len(losses)
    return bool(mean > error)


def cross_validated_probe(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    groups: Sequence[str] | None = None,
) -> np.ndarray:
    """Return out-of-fold probabilities of linear heads, at the penalty with the least log loss.

    The penalty is chosen on the rows that it is scored on. That hardly matters for a comparison,
    but makes the result unfit for a report.

    Args:
        features: (n, d).
        labels: (n,) int64, or targets (n, k).
        num_classes: classes k.
        groups: (n,) rows of one group stay together; None = no groups.

    Returns:
        float64 (n, k).
    """
    probs = np.zeros((len(PROBE_L2), len(labels), num_classes))
    for fit, score in _split(features, labels, groups):
        heads = fit_penalties(features[fit], Targets(labels[fit], num_classes), PROBE_L2)
        for number, head in enumerate(heads):
            probs[number, score] = head.probs(features[score])
    best = int(np.argmin([row_losses(answers, labels).mean() for answers in probs]))
    return np.asarray(probs[best])


def _split(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str] | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the fit and score rows of stratified folds, which keep groups whole if they can."""
    if labels.ndim == 2:
        whole = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        if whole is not None and len(np.unique(whole)) < COMPARISON_FOLDS:
            whole = None
        rng = np.random.default_rng(0)
        parts = stratify(
            labels.astype(np.int64), whole, [1 / COMPARISON_FOLDS] * COMPARISON_FOLDS, rng
        )
        for part in range(COMPARISON_FOLDS):
            yield np.flatnonzero(parts != part), np.flatnonzero(parts == part)
        return
    folds = max(2, min(COMPARISON_FOLDS, int(np.bincount(labels)[np.unique(labels)].min())))
    splitter: Any = StratifiedKFold(folds, shuffle=True, random_state=0)
    if groups is not None and len(set(groups)) >= folds:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    yield from splitter.split(features, labels, groups)


def measure_speed(
    spec: MemberSpec, num_classes: int, device: torch.device, frozen: str, *, cached: bool = False
) -> Speed:
    """Measure how fast a member trains: a few steps on noise, at two sizes.

    Args:
        spec: the member.
        num_classes: outputs of its head.
        device: where to train.
        frozen: regex of the parameters that are not trained.
        cached: train from the activations of the frozen first blocks.
    """
    member = build_member(spec.model_copy(update={"weights": "none"}), num_classes)
    member.to(device=device).to(memory_format=torch.channels_last)
    if has_token_grid(resolve_backbone(spec.backbone)):  # it takes images of one size only
        return Speed(_step_seconds(member, frozen, spec.img_size, cached), 0.0)
    small, large = 64, 128
    at_small, at_large = (_step_seconds(member, frozen, s, cached) for s in (small, large))
    per_pixel = max(0.0, (at_large - at_small) / (large**2 - small**2))
    return Speed(max(0.0, at_small - per_pixel * small**2), per_pixel)


def _step_seconds(member: Member, frozen: str, size: int, cached: bool) -> float:
    """Least seconds per image of three training steps after a warm-up."""
    batch_size, device = 16, next(member.parameters()).device
    stage = StageSpec(name="speed", epochs=1, lr=1e-3, frozen=frozen)
    inputs = 255 * torch.rand(batch_size, 3, size, size, device=device)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    network: torch.nn.Module = member
    if cached:
        count = cached_blocks(member, stage)
        with torch.inference_mode():
            form = cast("InputForm", member.head.form)
            early = EarlyBlocks(copy.deepcopy(member.backbone), count, form).to(device)
            activations = early(inputs)
        inputs, network = activations.clone(), LateBlocks(member, count)
    set_trainable(member, stage)
    optimizer = torch.optim.AdamW([p for p in member.parameters() if p.requires_grad], fused=True)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    train_mode(member, fixed_norms=True)
    times = []
    with reuse_freed_memory():
        for _ in range(4):
            began = time.perf_counter()
            loss = torch.nn.functional.cross_entropy(network(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return min(times[1:]) / batch_size
