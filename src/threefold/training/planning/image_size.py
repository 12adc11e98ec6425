"""Plan the image size: the usual one, unless probes do clearly better at another in time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from threefold.data.dataset import Sources
from threefold.errors import RecipeError
from threefold.models.member import fixed_size
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import MemberSpec
from threefold.training.checks import check_sizes
from threefold.training.features.cache import TIMED_PASSES, FeatureCache, ImageSeconds
from threefold.training.features.engines import BATCH
from threefold.training.features.probe import predict_fit_seconds
from threefold.training.planning.basis import (
    EXPORT_SECONDS,
    LEAST_FOLDS,
    Clock,
    DataSummary,
    Decision,
    Quality,
    finishing_seconds,
    relative_costs,
    usual_size,
)
from threefold.training.planning.measure import (
    PROBE_ROWS,
    SizeProbe,
    clearly_lower,
    probe_size,
    spread_over_classes,
)

SMALL_SIZES = (64, 96, 128, 160, 224)
"""Image sizes for images of at most 64 pixels: up to several times their own size."""

SIZES = (96, 128, 160, 224, 288, 384)
"""Image sizes for larger images, up to their own size and at least 224."""

FEATURE_SHARE = 0.4
"""Largest share of the time that reading the images leaves for the features of all members."""

PROBE_SHARE = 0.2
"""Largest share of the same time for comparing image sizes."""

GRACE = 1.5
"""Largest multiple of the budget that the least possible work may take."""

LEAST_SHARE = 0.7
"""Smaller than this share of the usual size, images are for a single member only."""

LEAST_PROBE_ROWS = 120
"""Fewer images than this do not tell sizes apart."""


@dataclass(frozen=True)
class ProbePlan:
    """What was measured for the plan.

    Attributes:
        img_size: side of the probes' images.
        costs: of the affordable members relative to the first, the fastest first.
        feature_seconds: per image, by the first member at that size.
        images: whose features are still to be computed.
        decision: the size with its reason.
        levels: which features heads read, with the reason; None if that was not compared.
        head_seconds: predicted for one linear head on all training images.
        export_seconds: predicted for the export of one member.
        read_seconds: to decode and resize an image, once for all members.
        wanted: members that there would be with more time.
    """

    img_size: int
    costs: list[float]
    feature_seconds: float
    images: float
    decision: Decision
    levels: Decision | None = None
    head_seconds: float = 0.0
    export_seconds: float = EXPORT_SECONDS
    read_seconds: float = 0.0
    wanted: int = 0

    @property
    def seconds(self) -> float:
        """Predicted for the features of all these members."""
        return self.images * (self.read_seconds + self.feature_seconds * sum(self.costs))

    def probe_seconds(self, folds: int) -> float:
        """Predict the seconds of all features, and of the heads in all folds and the refit.

        All folds together fit as many images as there are, times the folds less one.
        """
        return 1.2 * self.seconds + len(self.costs) * folds * self.head_seconds

    @property
    def decisions(self) -> list[Decision]:
        """What was decided, with the reasons."""
        size, members = self.decision, len(self.costs)
        if members < self.wanted:
            reason = f"the budget allows {members} of {self.wanted} members; {size.reason}"
            size = size._replace(reason=reason)
        return [size] if self.levels is None else [size, self.levels]


def _candidate_sizes(side: int, quality: Quality) -> tuple[int, ...]:
    """Image sizes to choose from."""
    if side <= 64:
        return SMALL_SIZES
    largest = 224 if side < 224 else 288
    if quality == "best":
        largest = 384 if side >= 288 else 288
    return tuple(size for size in SIZES if size <= largest)


def choose_size(
    draft: Recipe,
    summary: DataSummary,
    sources: Sources,
    cache: FeatureCache,
    clock: Clock,
    quality: Quality,
) -> ProbePlan:
    """Choose the usual size, or one at which probes do clearly better, as the time allows.

    Raises:
        RecipeError: a member cannot take images of its size, or the budget is too small.
    """
    check_sizes(draft)
    first = draft.members[0]
    costs = relative_costs(draft)
    sample = spread_over_classes(sources.train.truth, 32)
    only = fixed_size(first.backbone)
    if any(member.img_size != usual_size(member) for member in draft.members):
        times = cache.seconds_per_image("train", first, sample, summary.images)
        return _at_named_size(first.img_size, costs, times, summary.images)
    sizes = (only,) if only else _candidate_sizes(summary.side, quality)
    usual = only or max(size for size in sizes if size <= (128 if summary.side <= 64 else 224))
    at_usual = first.model_copy(update={"img_size": usual})
    began = time.monotonic()
    times = cache.seconds_per_image("train", at_usual, sample, summary.images)
    per_pixel = times.answer / usual**2
    # To build a network, to trace it and to check its answers takes as long each time.
    spent = time.monotonic() - began
    per_network = max(0.0, spent - (TIMED_PASSES + 1) * BATCH * times.read)
    export_seconds = max(EXPORT_SECONDS, per_network)

    def seconds(size: int) -> float:
        return summary.images * per_pixel * size**2 * sum(costs)

    # Every image is read, whatever is chosen: only the rest of the time can be shared out.
    reading = summary.images * times.read
    left, wanted = max(0.0, clock.left - reading), len(costs)
    # Fewer members rather than much smaller images, which cost more accuracy.
    least = min(size for size in sizes if size >= LEAST_SHARE * usual)
    while len(costs) > 1 and seconds(least) > _feature_room(left, len(costs), export_seconds):
        costs = costs[:-1]
    room = _feature_room(left, len(costs), export_seconds)
    affordable = [size for size in sizes if seconds(size) <= room] or [sizes[0]]
    if clock.budget:
        _check_budget(clock, reading + seconds(affordable[0]))
    choice = max([size for size in affordable if size <= usual] or affordable)
    levels = None
    reason = f"the images' median side is {summary.side} px"
    if only:
        reason = f"{first.backbone} is built for images of this size"
    close = affordable[-4:] if quality == "best" else affordable[-3:]
    per_row = per_pixel * sum(size**2 for size in close)
    rows = min(PROBE_ROWS, summary.n)
    if left < math.inf:
        rows = min(rows, int((PROBE_SHARE * left - per_network * len(close)) / per_row))
    if rows >= min(LEAST_PROBE_ROWS, summary.n) and len(close) > 1:
        results, figures = _compare_sizes(first, close, rows, sources, cache)
        best = _choose_probe(results, choice)
        choice = best.img_size
        levels = _compare_levels(first, best)
        reason += f"; {figures}"
    reason += f"; about {reading + seconds(choice):.0f} s for the features of all members"
    decision = Decision("img_size", choice, reason)
    return ProbePlan(
        choice,
        costs,
        per_pixel * choice**2,
        summary.images,
        decision,
        levels,
        export_seconds=export_seconds,
        read_seconds=times.read,
        wanted=wanted,
    )


def _at_named_size(
    img_size: int, costs: list[float], times: ImageSeconds, images: int
) -> ProbePlan:
    """Return the plan of the probes at the size that the user has named."""
    decision = Decision("img_size", img_size, "named by you")
    wanted = len(costs)
    return ProbePlan(
        img_size, costs, times.answer, images, decision, read_seconds=times.read, wanted=wanted
    )


def _compare_sizes(
    member: MemberSpec, sizes: Sequence[int], rows: int, sources: Sources, cache: FeatureCache
) -> tuple[list[SizeProbe], str]:
    """Cross-validate a probe at each size; returns what came out, and the same in words.

    Args:
        member: the one that is probed.
        sizes: in pixels.
        rows: number of training images.
        sources: the images.
        cache: of features.
    """
    probed = spread_over_classes(sources.train.truth, rows)
    at_sizes = [member.model_copy(update={"img_size": size}) for size in sizes]
    # All sizes in one pass, which decodes each image once.
    cache.prepare("train", at_sizes, probed, expected=len(sources.train))
    results = [probe_size(cache, at_size, probed, sources) for at_size in at_sizes]
    figures = ", ".join(f"{r.loss:.3f} at {r.img_size} px ({r.quality})" for r in results)
    scores = "mean average precision" if sources.train.is_multilabel else "accuracy"
    count = len(probed)
    return results, f"log loss and {scores} of a probe on {count} images, out of fold: {figures}"


def with_head_seconds(
    measured: ProbePlan, draft: Recipe, sources: Sources, cache: FeatureCache
) -> ProbePlan:
    """Add how long one linear head takes, measured on the features of a few images."""
    first, train = draft.members[0], sources.train
    if not first.head.is_linear:
        return measured
    sample = spread_over_classes(train.truth, LEAST_PROBE_ROWS)
    features = cache.rows("train", first, sample, expected=len(train)).features
    seconds = predict_fit_seconds(features, len(train.classes), len(train))
    return replace(measured, head_seconds=seconds)


def drop_late_members(measured: ProbePlan, clock: Clock) -> ProbePlan:
    """Drop the last members whose heads, scores and export do not fit into the time.

    Args:
        measured: with the time of a head.
        clock: the time budget.
    """
    fitting = measured
    while len(fitting.costs) > 1:
        members = len(fitting.costs)
        finishing = finishing_seconds(members, measured.export_seconds)
        if fitting.probe_seconds(LEAST_FOLDS) + finishing <= clock.left:
            break
        fitting = replace(fitting, costs=fitting.costs[:-1])
    return fitting


def _choose_probe(results: Sequence[SizeProbe], usual: int) -> SizeProbe:
    """Return the probe of the usual size, or of one whose log loss is clearly lower.

    On a few hundred images the lowest of several losses is often so by chance.
    """
    best = next((result for result in results if result.img_size == usual), results[-1])
    for result in results:
        if clearly_lower(result.losses, best.losses, result.groups):
            best = result
    return best


def _compare_levels(member: MemberSpec, result: SizeProbe) -> Decision | None:
    """Decide whether heads read several levels; None if the member's head does not."""
    if member.head.sequence != "levels":
        return None
    reason = (
        f"log loss {result.loss:.3f} with the features of several levels of the backbone, "
        f"{result.last_loss:.3f} with the last ones alone"
    )
    pooled = clearly_lower(result.last_losses, result.losses, result.groups)
    value = "pooled" if pooled else "levels"
    return Decision("head.sequence", value, reason)


def _feature_room(left: float, members: int, export_seconds: float) -> float:
    """Return the seconds that the features of so many members may take.

    Of several members it is at most what their ensemble, report and export leave. A single one is
    the least that there can be, even if it takes a little longer than the budget.

    Args:
        left: seconds that are left.
        members: how many there are.
        export_seconds: for one member.
    """
    share = FEATURE_SHARE * left
    if members == 1:
        return share
    return min(share, left - finishing_seconds(members, export_seconds))


def _check_budget(clock: Clock, seconds: float) -> None:
    """Refuse a budget that is far too small for the features of one member.

    Args:
        clock: the time budget.
        seconds: what these features take.

    Raises:
        RecipeError: the least that there can be would take much longer than the budget.
    """
    needed = clock.spent + seconds + finishing_seconds(1)
    if needed <= GRACE * clock.budget:
        return
    raise RecipeError(
        "the budget is too small",
        where="--budget",
        got=f"{clock.budget:g} s",
        expected=f"at least about {math.ceil(needed / 10) * 10} s for these images on this machine",
        fix="give more time, or fewer images with --set data.limit_per_class=N",
    )
