"""Choose the members by measurement: screen candidate backbones by their probes, and take three.

The paper trains many networks and ensembles the best three, chosen on test images. Here a linear
head on each candidate's frozen features is cross-validated on a few hundred training images, and
the members are chosen for what they add to the mean of the others, at their cost (`choose`).

The choice uses labels of training rows, so it is part of the fit, like the choice of an image size.
How much it flatters itself is measured: `halves_loss` repeats the choice on one half of the rows
and scores it on the other.

Near copies of one scene in several folds of a probe flatter all candidates, most of all those that
recognize single images, unless the data name groups. A download is never cut short, however slow it
is, but no further candidate begins once the time for screening is over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import torch

from threefold.data.dataset import Sources
from threefold.errors import RecipeError
from threefold.models.backbones import resolve_backbone
from threefold.models.flops import count_macs
from threefold.models.hub import (
    has_local_weights,
    has_published_weights,
    hub_problem,
    weights_licence,
)
from threefold.models.member import create_backbone, fixed_size, has_token_grid
from threefold.names import plain_backbone
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import HeadSpec, MemberSpec
from threefold.training.features.cache import FeatureCache
from threefold.training.planning.basis import Clock, Quality, widest_input
from threefold.training.planning.image_size import FEATURE_SHARE, ProbePlan
from threefold.training.planning.measure import (
    PROBE_ROWS,
    cross_validated_probe,
    spread_over_classes,
)
from threefold.training.progress.watcher import Watcher
from threefold.training.truth import row_losses

AUTO = "auto"
"""In place of the members' names: choose them. Names after it are candidates, too."""

MOST = 3
"""Members to choose."""

PRICE = 0.02
"""What a doubling of the ensemble's cost has to take off its log loss: 2 %."""

NEGLIGIBLE = 0.01
"""A log loss to which nothing needs to be added; shares are of what is above it."""

SCREEN_SHARE = 0.2
"""Largest share of the time for screening."""

FIRST_ROWS = 150
"""Images on which all candidates are compared where the time is short; the better half goes on."""

SizeClass = Literal["small", "medium", "large"]


class Candidate(NamedTuple):
    """A pretrained backbone that may become a member."""

    backbone: str
    """A name of timm with its tag, or of the paper."""
    size: SizeClass
    """Multiply-adds at 224 pixels: small below 2 billion, medium below 8 billion, or large."""
    licence: str
    """Of the weights, as timm states it."""
    img_size: int = 0
    """Side in pixels of backbones with a fixed grid of tokens; 0 = that of the plan."""
    weights: str = "pretrained"
    """As `members.weights`."""


CANDIDATES = (
    Candidate("tf_efficientnet_lite0.in1k", "small", "apache-2.0"),
    Candidate("tf_efficientnet_lite1.in1k", "small", "apache-2.0"),
    Candidate("tf_efficientnet_lite2.in1k", "small", "apache-2.0"),
    Candidate("tf_efficientnetv2_b0.in1k", "small", "apache-2.0"),
    Candidate("mobilenetv4_conv_medium.e250_r384_in12k_ft_in1k", "small", "apache-2.0"),
    Candidate("mobilenetv4_hybrid_medium.e200_r256_in12k_ft_in1k", "small", "apache-2.0"),
    Candidate("tf_efficientnetv2_b3.in21k_ft_in1k", "small", "apache-2.0"),
    Candidate("convnext_nano.in12k_ft_in1k", "medium", "apache-2.0"),
    Candidate("tf_efficientnetv2_s.in21k_ft_in1k", "medium", "apache-2.0"),
    Candidate("convnext_tiny.in12k_ft_in1k", "medium", "apache-2.0"),
    Candidate("vit_small_patch14_reg4_dinov2.lvd142m", "medium", "apache-2.0", 224),
    Candidate("convnext_small.in12k_ft_in1k", "large", "apache-2.0"),
    Candidate("convnext_base.clip_laion2b_augreg_ft_in12k_in1k", "large", "apache-2.0"),
    Candidate("eva02_base_patch16_clip_224.merged2b", "large", "mit", 224),
    Candidate("vit_base_patch16_siglip_gap_224.v2_webli", "large", "apache-2.0", 224),
    Candidate("vit_base_patch14_reg4_dinov2.lvd142m", "large", "apache-2.0", 224),
)
"""Families that do well as frozen features: EfficientNet-Lite, EfficientNetV2, MobileNetV4,
ConvNeXt, EVA-02, SigLIP 2 and DINOv2, all with permissive licences.

Left out, for whoever accepts their terms to name: ConvNeXt V2, Hiera (non-commercial), DINOv3 and
FastViT (licences of their own). The first three need no hub. DINOv2 was trained at 224 and then at
518 pixels; timm fits its grid of tokens to 224.
"""


class Screened(NamedTuple):
    """A candidate's cross-validated answers."""

    candidate: Candidate
    cost: float
    """Multiply-adds of one image at its size."""
    probs: np.ndarray
    """float64 (n, k), out of fold."""
    loss: float
    """Mean log loss on these n rows."""


@dataclass
class Screening:
    """What was screened, and what was chosen from it.

    Attributes:
        chosen: the members, the fastest first.
        measured: their size, costs and predicted seconds, for the plan.
        screened: every candidate that was compared on all rows.
        rows: how many images that were.
        loss: log loss of the chosen members' mean on them.
        halves: the same where the members are chosen on the other half of the rows.
        notes: what was left out, and why.
    """

    chosen: list[Candidate]
    measured: ProbePlan
    screened: list[Screened]
    rows: int
    loss: float
    halves: float
    notes: list[str] = field(default_factory=list)

    def explain(self) -> str:
        """Say what was compared and chosen, with log losses and licences, for the plan."""
        figures = ", ".join(
            f"{s.candidate.backbone} {s.loss:.3f} ({s.candidate.licence})" for s in self.screened
        )
        parts = [
            f"screened {len(self.screened)}, took {len(self.chosen)}; log losses of probes on "
            f"{self.rows} training images, out of fold: {figures}; mean of those taken "
            f"{self.loss:.3f}, and {self.halves:.3f} on images that did not choose: out-of-fold "
            "scores are flattered by about that difference at most",
            *self.notes,
        ]
        return "; ".join(parts)


def is_auto(members: Sequence[str]) -> bool:
    """Whether the members are to be chosen: the first name is `auto`."""
    return tuple(members[:1]) == (AUTO,)


def choose(
    probs: np.ndarray,
    labels: np.ndarray,
    costs: Sequence[float],
    limit: float = math.inf,
    most: int = MOST,
) -> list[int]:
    """Choose members one by one for the log loss of their mean at its cost.

    The rule: minimize ln(log loss + `NEGLIGIBLE`) + `PRICE` * log2(cost), where cost is the sum
    over the members. So each doubling of the cost has to lower the log loss by 2 %. The first
    member is the best alone, and each further one is the one that lowers the value most. The choice
    ends when none lowers it, so there may be fewer than `most`. (Greedy forward selection: Caruana
    et al., 2004.)

    Args:
        probs: (m, n, k), out of fold.
        labels: (n,) int64, or targets (n, k).
        costs: (m,) of any unit.
        limit: the sum of the costs of the chosen members may not exceed it.
        most: how many to choose at most.

    Returns:
        Indices of the chosen members in the order of the choice; empty if none is within the limit.
    """
    chosen: list[int] = []
    best = math.inf
    for _ in range(most):
        values = {}
        for index in range(len(probs)):
            members = [*chosen, index]
            cost = sum(costs[i] for i in members)
            if index not in chosen and cost <= limit:
                loss = _loss(probs[members].mean(0), labels)
                values[index] = _value(loss, cost)
        if min(values.values(), default=math.inf) >= best:
            break
        index = min(values, key=lambda i: values[i])
        best = values[index]
        chosen.append(index)
    return chosen


def halves_loss(
    probs: np.ndarray, labels: np.ndarray, costs: Sequence[float], limit: float = math.inf
) -> float:
    """Log loss of the chosen members' mean on rows that had no part in the choice.

    Members are chosen on one half of the rows and scored on the other, and the other way round.
    Only half the rows choose, so the result is more likely too high than too low. A half is the
    first or the last half of each class, so that similar images, which often follow each other,
    stay together.

    Args:
        probs: (m, n, k), out of fold.
        labels: (n,) int64, or targets (n, k).
        costs: (m,) see `choose`.
        limit: see `choose`.
    """
    first = np.zeros(len(labels), dtype=bool)
    # Images with any number of labels are halved as they are listed.
    codes = np.zeros(len(labels), int) if labels.ndim == 2 else labels
    for label in np.unique(codes):
        rows = np.flatnonzero(codes == label)
        first[rows[: len(rows) // 2]] = True
    answers = np.zeros(probs.shape[1:])
    for half in (first, ~first):
        members = choose(probs[:, half], labels[half], costs, limit) if half.any() else []
        answers[~half] = probs[members or slice(None)][:, ~half].mean(0)
    return _loss(answers, labels)


def gather_candidates(
    extra: Sequence[str], device: torch.device, quality: Quality
) -> tuple[list[Candidate], list[str]]:
    """Return the candidates whose weights are within reach here, and notes on what limits them.

    Large ones are for accelerators, or quality best. Without a hub, those remain whose weights are
    in a package or in the hub's cache.

    Args:
        extra: further candidates, named by the user.
        device: where features are computed.
        quality: of the plan.

    Raises:
        RecipeError: an extra name is unknown.
    """
    with_large = device.type != "cpu" or quality == "best"
    wanted = [c for c in CANDIDATES if with_large or c.size != "large"]
    wanted = [c for c in wanted if has_published_weights(c.backbone)]
    wanted += [_named(plain_backbone(name)) for name in extra]
    local = [c for c in wanted if has_local_weights(c.backbone)]
    if len(local) == len(wanted):
        return wanted, []
    remote = next(c for c in wanted if c not in local)
    problem = hub_problem(remote.backbone)
    if not problem:
        return wanted, []
    count = f"{len(local)} of {len(wanted)} candidates, whose weights are on this machine"
    return local, [f"no model hub: {problem}; screened from {count}"]


def _named(name: str) -> Candidate:
    """Make a candidate of a user's name.

    Raises:
        RecipeError: there is no such backbone.
    """
    spec = MemberSpec(name="auto", backbone=name, weights="none")
    with torch.device("meta"):
        config = create_backbone(spec, pretrained=False).pretrained_cfg
    side = fixed_size(name)
    if has_token_grid(resolve_backbone(name)):
        side = int(config["input_size"][1])
    macs = count_macs(name, side or 224)
    size: SizeClass = "small" if macs < 2e9 else "medium" if macs < 8e9 else "large"
    return Candidate(name, size, weights_licence(name), side)


def screen(
    candidates: Sequence[Candidate],
    draft: Recipe,
    sources: Sources,
    measured: ProbePlan,
    clock: Clock,
    notes: Sequence[str] = (),
    watcher: Watcher | None = None,
) -> Screening:
    """Compare candidates by cross-validated probes on at most 500 rows, and choose three.

    Where the time is short, all are compared on 150 rows and the better half on 500; where even
    that is too long, the largest are left out. A candidate that cannot be loaded or computed is
    skipped with a note.

    Args:
        candidates: what to compare.
        draft: engine, device and seed; its first member was measured.
        sources: the images.
        measured: the size for candidates without a fixed one, and the speed of the first member,
            from which that of the candidates follows by their multiply-adds.
        clock: the time that there is.
        notes: of what is left out already.
        watcher: receives notes.

    Raises:
        RecipeError: no candidate could be compared.
    """
    job = _Job(draft, sources, measured.img_size, notes, watcher or Watcher())
    first = count_macs(draft.members[0].backbone, measured.img_size)
    seconds_per_mac = measured.feature_seconds / first
    labels, images = sources.train.truth, sources.num_images

    def affordable_cost() -> float:
        left = max(0.0, clock.left - images * measured.read_seconds)
        return FEATURE_SHARE * left / (images * seconds_per_mac)

    deadline = time.monotonic() + SCREEN_SHARE * clock.left
    rows = spread_over_classes(labels, PROBE_ROWS)
    entries = job.affordable(candidates, affordable_cost())
    possible = (deadline - time.monotonic()) / seconds_per_mac
    if sum(entry.cost for entry in entries) * len(rows) > possible:
        few = rows[spread_over_classes(labels[rows], FIRST_ROWS)]
        entries = job.cheapest(entries, possible / (len(few) + len(rows) / 2))
        compared = job.compare(entries, few, deadline)
        entries = _better_half(compared)
    screened = job.compare(entries, rows, deadline)
    probs = np.stack([entry.probs for entry in screened])
    costs = [entry.cost for entry in screened]
    limit = max(min(costs), affordable_cost())
    chosen = sorted(choose(probs, labels[rows], costs, limit))
    return Screening(
        chosen=[screened[i].candidate for i in chosen],
        measured=replace(
            measured,
            costs=[costs[i] / costs[chosen[0]] for i in chosen],
            feature_seconds=costs[chosen[0]] * seconds_per_mac,
            wanted=len(chosen),
        ),
        screened=screened,
        rows=len(rows),
        loss=_loss(probs[chosen].mean(0), labels[rows]),
        halves=halves_loss(probs, labels[rows], costs, limit),
        notes=job.notes,
    )


class _Job:
    """One screening: its images, and what it had to leave out."""

    def __init__(
        self,
        draft: Recipe,
        sources: Sources,
        img_size: int,
        notes: Sequence[str],
        watcher: Watcher,
    ) -> None:
        self.draft, self.sources, self.watcher = draft, sources, watcher
        self.img_size = img_size
        self.notes: list[str] = []
        for note in notes:
            self._note(note)

    def affordable(self, candidates: Sequence[Candidate], limit: float) -> list[Screened]:
        """Count each candidate's cost; return those within a limit, the cheapest first."""
        entries = []
        for candidate in candidates:
            try:
                cost = count_macs(candidate.backbone, candidate.img_size or self.img_size)
            except RecipeError as error:
                self._skip(candidate, error)
                continue
            entries.append(Screened(candidate, cost, np.empty(0), math.inf))
        entries.sort(key=lambda entry: entry.cost)
        if not entries:
            self._refuse()
        fitting = [entry for entry in entries if entry.cost <= limit] or entries[:1]
        self._leave_out(entries[len(fitting) :], "too slow for the budget")
        return fitting

    def cheapest(self, entries: list[Screened], total: float) -> list[Screened]:
        """Keep the cheapest candidates whose costs sum to at most `total`, at least `MOST`."""
        sums = np.cumsum([entry.cost for entry in entries])
        count = max(MOST, int((sums <= total).sum()))
        self._leave_out(entries[count:], "no time to screen")
        return entries[:count]

    def compare(
        self, entries: Sequence[Screened], rows: np.ndarray, deadline: float
    ) -> list[Screened]:
        """Cross-validate a probe of each candidate on some rows.

        Once `MOST` have been compared, no further candidate begins after the deadline.

        Raises:
            RecipeError: no candidate works.
        """
        compared: list[Screened] = []
        for number, entry in enumerate(entries):
            if len(compared) >= MOST and time.monotonic() > deadline:
                self._leave_out(entries[number:], "no time to screen")
                break
            try:
                probs = self._answers(entry.candidate, rows)
            except Exception as error:  # missing, gated or broken weights, memory: all end here
                self._skip(entry.candidate, error)
                continue
            loss = _loss(probs, self.sources.train.truth[rows])
            compared.append(entry._replace(probs=probs, loss=loss))
        if not compared:
            self._refuse()
        return compared

    def _answers(self, candidate: Candidate, rows: np.ndarray) -> np.ndarray:
        """Out-of-fold probabilities of a candidate's probe."""
        spec = MemberSpec(
            name="auto",
            backbone=candidate.backbone,
            weights=candidate.weights,
            img_size=candidate.img_size or self.img_size,
            resize=self.draft.members[0].resize,
            head=HeadSpec(sequence=widest_input(candidate.backbone)),
        )
        # A cache of its own, so that only one backbone is in memory; the features stay on disk.
        cache = FeatureCache(self.sources, self.draft, self.watcher)
        features, labels = cache.rows("train", spec, rows)
        if not np.isfinite(features).all():
            raise RecipeError("features are not finite")
        train = self.sources.train
        groups = None if train.groups is None else [train.groups[row] for row in rows]
        return cross_validated_probe(features, labels, len(train.classes), groups)

    def _skip(self, candidate: Candidate, error: Exception) -> None:
        text = " ".join(str(error).split())[:200]
        self._note(f"candidate {candidate.backbone} skipped: {text or type(error).__name__}")

    def _leave_out(self, entries: Sequence[Screened], why: str) -> None:
        if entries:
            names = ", ".join(entry.candidate.backbone for entry in entries)
            self._note(f"{why}: {names}")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.watcher.note(text)

    def _refuse(self) -> NoReturn:
        raise RecipeError(
            "no candidate can be used",
            where="--members auto",
            got=self.notes[-1] if self.notes else "no candidate",
            fix="name backbones with --members, or connect to the hub",
        )


def _better_half(compared: list[Screened]) -> list[Screened]:
    """Return the better half at its cost, at least `MOST`, the cheapest first."""
    ranked = sorted(compared, key=lambda entry: _value(entry.loss, entry.cost))
    kept = ranked[: max(MOST, math.ceil(len(ranked) / 2))]
    return sorted(kept, key=lambda entry: entry.cost)


def _loss(probs: np.ndarray, truth: np.ndarray) -> float:
    """Mean log loss of answers (n, k) to labels (n,) or targets (n, k)."""
    return float(row_losses(probs, truth).mean())


def _value(loss: float, cost: float) -> float:
    """What `choose` minimizes."""
    return math.log(loss + NEGLIGIBLE) + PRICE * math.log2(cost)
