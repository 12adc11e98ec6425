"""Plan the tuning: how much of it the time after the probes allows, at measured speed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from threefold.models.backbones import CPU_FROZEN, EARLY_BLOCKS, resolve_backbone
from threefold.models.heads import input_form
from threefold.models.member import HEAD, create_backbone, fixed_size, has_token_grid
from threefold.models.split import count_frozen_blocks
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import HeadSpec, MemberSpec
from threefold.training.planning.basis import (
    EXPORT_SECONDS,
    LEAST_FOLDS,
    Clock,
    DataSummary,
    Decision,
    Quality,
    finishing_seconds,
)
from threefold.training.planning.image_size import ProbePlan
from threefold.training.planning.measure import Speed, measure_speed
from threefold.training.squares import LARGE

KEY = "stages.tune1, tune2"
"""Key of a decision about tuning."""

HEAD_PARAMETERS = f"^{re.escape(HEAD)}"
"""Parameters of a member's head."""


class Tuning(NamedTuple):
    """How thoroughly to tune."""

    members: int
    """How many members, the fastest first."""
    size: float
    """Training size as a share of the probes' size."""
    last: int
    """Epochs of the last blocks."""
    deeper: int
    """Epochs of deeper blocks after that."""
    folds: int
    """Folds; 1 = one split (`folds.scheme = "holdout"`)."""


TUNINGS: tuple[Tuning, ...] = (
    Tuning(1, 0.75, 3, 0, 3),
    Tuning(1, 1.0, 3, 0, 3),
    Tuning(1, 1.0, 4, 0, 3),
    Tuning(1, 1.0, 6, 0, 3),
    Tuning(2, 1.0, 3, 0, 3),
    Tuning(2, 1.0, 4, 0, 3),
    Tuning(3, 1.0, 3, 0, 3),
    Tuning(3, 1.0, 4, 0, 3),
    Tuning(3, 1.0, 6, 0, 3),
    Tuning(3, 1.0, 8, 0, 3),
    Tuning(3, 1.0, 8, 0, 5),
    Tuning(3, 1.0, 8, 4, 5),
    Tuning(3, 1.0, 8, 8, 5),
)
"""What to choose from, the least thorough first."""

BEST_TUNINGS = (*TUNINGS, Tuning(3, 1.2, 8, 8, 5), Tuning(3, 1.2, 8, 16, 5))
"""The same for `--quality best`."""

MANY = 8000
"""Images from which deep tuning pays before more members and folds do."""

TUNINGS_OF_MANY = (
    Tuning(1, 0.5, 1, 0, 2),
    Tuning(1, 0.5, 1, 1, 2),
    Tuning(1, 0.75, 1, 1, 2),
    Tuning(1, 0.75, 1, 3, 2),
    Tuning(1, 0.75, 1, 5, 2),
    Tuning(2, 0.75, 1, 5, 2),
    Tuning(3, 0.75, 1, 5, 2),
    Tuning(3, 0.75, 1, 5, 3),
    Tuning(3, 1.0, 1, 8, 3),
)
"""What to choose from for many images."""

HOLDOUT_FROM = 20_000
"""Images from which a tenth of them is enough to choose and score on."""

TUNINGS_WITH_HOLDOUT = (
    Tuning(1, 0.5, 1, 0, 1),
    Tuning(1, 0.5, 1, 1, 1),
    Tuning(1, 0.75, 1, 1, 1),
    Tuning(1, 0.75, 1, 3, 1),
    Tuning(1, 0.75, 1, 5, 1),
    Tuning(1, 0.75, 1, 8, 1),
    Tuning(2, 0.75, 1, 8, 1),
    Tuning(3, 0.75, 1, 8, 1),
    Tuning(3, 1.0, 1, 8, 1),
    Tuning(3, 1.0, 1, 12, 1),
)
"""What to choose from for so many images, with one split in place of folds and a refit."""


def choose_tuning(
    draft: Recipe,
    summary: DataSummary,
    measured: ProbePlan,
    device: torch.device,
    clock: Clock,
    quality: Quality,
) -> tuple[Tuning | None, list[Decision]]:
    """Choose the most thorough tuning that the time after the probes allows at measured speed."""
    if quality == "fast":
        return None, [Decision(KEY, "none", "quality fast: heads on frozen features only")]
    finishing = finishing_seconds(len(measured.costs), measured.export_seconds)
    if clock.left - measured.probe_seconds(LEAST_FOLDS) - finishing < 3 * EXPORT_SECONDS:
        why = "the probes take the time that there is; give a larger --budget to tune"
        return None, [Decision(KEY, "none", why)]
    names_folds = not draft.folds.model_fields_set.isdisjoint(("k", "scheme", "final"))
    options = _tunings(summary, len(measured.costs), quality, names_folds=names_folds)
    if math.isinf(clock.left):
        return options[-1], [_decide(options[-1], measured, "no time budget")]
    speeds = _measure_tuning(draft, summary, measured, device)
    seconds = [
        predict_seconds(t, summary.n, measured.img_size, speeds, _tuning_costs(t, draft, measured))
        for t in options
    ]
    left = [
        clock.left
        - measured.probe_seconds(t.folds)
        - _refit_seconds(t, summary.n, measured)
        - finishing
        for t in options
    ]
    possible = [i for i in range(len(options)) if seconds[i] <= left[i]]
    if not possible:
        why = f"the least takes about {seconds[0]:.0f} s, and {max(0.0, left[0]):.0f} s are left"
        return None, [Decision(KEY, "none", why)]
    chosen = options[possible[-1]]
    size = tuning_size(chosen, measured.img_size)
    why = (
        f"about {seconds[possible[-1]]:.0f} of {left[possible[-1]]:.0f} s that are left after the "
        f"probes; measured for {draft.members[0].name}: "
        f"{1 / speeds.last.per_image(size):.0f} images/s in the last blocks, "
        f"{1 / speeds.deeper.per_image(size):.0f} deeper"
    )
    return chosen, [_decide(chosen, measured, why)]


def _decide(tuning: Tuning, measured: ProbePlan, why: str) -> Decision:
    size = tuning_size(tuning, measured.img_size)
    value = (
        f"{tuning.last} and {tuning.deeper} epochs at {size} px for {tuning.members} of "
        f"{len(measured.costs)} members"
    )
    return Decision(KEY, value, why)


class TuningSpeeds(NamedTuple):
    """Speeds of the first member: of its frozen first blocks, and of steps of both stages."""

    first_blocks: Speed
    last: Speed
    deeper: Speed


def _tunings(
    summary: DataSummary, members: int, quality: Quality, *, names_folds: bool
) -> list[Tuning]:
    """The possible tunings, within the number of members and the size of the smallest class."""
    options = BEST_TUNINGS if quality == "best" else TUNINGS
    if summary.n >= HOLDOUT_FROM and not names_folds:
        options = TUNINGS_WITH_HOLDOUT
    elif summary.n >= MANY:
        options = TUNINGS_OF_MANY
    folds = max(2, summary.smallest_class)
    return [
        tuning._replace(
            members=min(tuning.members, members),
            folds=summary.own_folds or min(tuning.folds, folds),
        )
        for tuning in options
    ]


def _measure_tuning(
    draft: Recipe, summary: DataSummary, measured: ProbePlan, device: torch.device
) -> TuningSpeeds:
    """Measure the speed of training of the first member."""
    first, k = draft.members[0], len(summary.classes)
    first = first.model_copy(update={"head": HeadSpec(sequence=first.head.sequence)})
    last, deeper = _frozen(device)
    # The first blocks and the augmentation take about three quarters of the time of all blocks.
    # Squares of large images are remembered, others are made in each epoch.
    is_large = summary.side**2 >= LARGE * measured.img_size**2
    reading = 0.0 if is_large else measured.read_seconds
    blocks = Speed(reading, 0.75 * measured.feature_seconds / measured.img_size**2)
    if _has_fixed_size(first):
        blocks = Speed(reading + 0.75 * measured.feature_seconds, 0.0)
    return TuningSpeeds(
        blocks,
        measure_speed(first, k, device, last, cached=_can_cache(first, device)),
        measure_speed(first, k, device, deeper),
    )


def _can_cache(spec: MemberSpec, device: torch.device) -> bool:
    """Whether the last blocks train on cached activations: on the CPU, where that is possible."""
    if device.type != "cpu":
        return False
    backbone = create_backbone(spec.model_copy(update={"weights": "none"}), pretrained=False)
    frozen = _frozen(device)[0]
    names = [n for n, _ in backbone.named_parameters() if not re.search(frozen, f"backbone.{n}")]
    return count_frozen_blocks(backbone, names, input_form(spec.head.sequence)) > 0


def _has_fixed_size(member: MemberSpec) -> bool:
    """Whether a member is tuned at the size of its probe, because it can take no other."""
    return has_token_grid(resolve_backbone(member.backbone)) or fixed_size(member.backbone) > 0


def _tuning_costs(tuning: Tuning, draft: Recipe, measured: ProbePlan) -> list[float]:
    """Return the cost of each member's images in tuning, relative to the first member's."""
    area = (tuning_size(tuning, measured.img_size) / measured.img_size) ** 2
    areas = [1.0 if _has_fixed_size(member) else area for member in draft.members]
    return [cost * a / areas[0] for cost, a in zip(measured.costs, areas, strict=True)]


def tuning_size(tuning: Tuning, img_size: int) -> int:
    """Return the training size in pixels, a multiple of 32 and at least 64."""
    return max(64, 32 * round(tuning.size * img_size / 32))


def predict_seconds(
    tuning: Tuning, n: int, img_size: int, speeds: TuningSpeeds, costs: Sequence[float]
) -> float:
    """Predict the time of tuning: every fold and the refit, predictions, and the export.

    All folds and the refit together fit as many images as there are, times the folds; one split
    fits a tenth fewer, and has no refit.

    Args:
        tuning: members, size, epochs and folds.
        n: training images.
        img_size: side of the probes' images.
        speeds: of the first member.
        costs: of every member relative to the first.
    """
    size = tuning_size(tuning, img_size)
    rounds = (1 - select_share(n)) * tuning.folds
    once = (tuning.last + 1) * speeds.first_blocks.per_image(size)
    last = rounds * tuning.last * speeds.last.per_image(size)
    deeper = rounds * tuning.deeper * speeds.deeper.per_image(size)
    predicted = (1 + select_share(n) * tuning.deeper) * 0.4 * speeds.deeper.per_image(size)
    images = n * (once + last + deeper + predicted)
    return images * sum(costs[: tuning.members]) + EXPORT_SECONDS * tuning.members


def _refit_seconds(tuning: Tuning, n: int, measured: ProbePlan) -> float:
    """Predict the time of fitting the heads again, where tuning has another size than the probes.

    Args:
        tuning: its members, size and folds.
        n: training images.
        measured: the plan of the probes.
    """
    size = tuning_size(tuning, measured.img_size)
    if size == measured.img_size:
        return 0.0
    answer = measured.feature_seconds * (size / measured.img_size) ** 2
    features = n * (measured.read_seconds + answer * sum(measured.costs[: tuning.members]))
    return features + tuning.folds * measured.head_seconds * tuning.members


def select_share(n: int) -> float:
    """Return the share of a fold's rows that chooses checkpoints: enough rows, and no more."""
    return 0.15 if n <= 5000 else max(0.03, 750 / n)


def _frozen(device: torch.device) -> tuple[str, str]:
    """Regexes of the parameters that the two stages of tuning leave as they are.

    The last blocks learn under the fitted head, which stays as it is: every step of Adam would move
    its thousands of weights together, and lose what the probe knew.
    """
    if device.type == "cpu":
        return f"{HEAD_PARAMETERS}|conv_dw|{EARLY_BLOCKS}", CPU_FROZEN
    return f"{HEAD_PARAMETERS}|{EARLY_BLOCKS}", ""


def tuned_name(probe: str) -> str:
    """Name the member that is tuned from a probe; names have at most 80 characters."""
    return f"{probe[:74]}-tuned"


def tuning_rate(steps: float) -> float:
    """Return the learning rate of tuning: 1e-3, and less where few steps follow.

    Adam moves every weight by about the rate in each step, whatever the gradient. A high rate first
    destroys a fitted head, and it takes some 250 steps to recover.
    """
    return 1e-3 * min(1.0, max(0.2, steps / 250))


def tuning_stages(
    tuning: Tuning | None,
    probes: list[dict[str, Any]],
    draft: Recipe,
    img_size: int,
    device: torch.device,
    *,
    fit_rows: float,
    batch_size: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the stages, and the members that are tuned from their probes.

    The head is fitted first, on features; then the last blocks are tuned, then deeper ones.
    """
    head: dict[str, Any] = {"name": "head", "kind": "head"}
    if tuning is None:
        return [head], []
    bases = probes[: tuning.members]
    cached = all(_can_cache(member, device) for member in draft.members[: len(bases)])
    size = tuning_size(tuning, img_size)
    tuned = [
        {
            "name": tuned_name(base["name"]),
            "starts_from": base["name"],
            "img_size": member.img_size if _has_fixed_size(member) else size,
            "head": base["head"],
        }
        for base, member in zip(bases, draft.members, strict=False)
    ]
    last, deeper = _frozen(device)
    shared = {"schedule": "one-cycle", "batch_norm": "fixed"}
    names = [member["name"] for member in tuned]
    stages = [head | {"members": [probe["name"] for probe in probes]}]
    for name, epochs, rate, frozen, from_cache in (
        ("tune1", tuning.last, 1.0, last, cached),
        ("tune2", tuning.deeper, 0.5, deeper, False),
    ):
        if epochs:
            steps = epochs * fit_rows / batch_size
            lr = float(f"{rate * tuning_rate(steps):.1g}")
            stage = {"name": name, "epochs": epochs, "lr": lr, "frozen": frozen}
            stages.append(stage | shared | {"cached": from_cache, "members": names})
    return stages, tuned
