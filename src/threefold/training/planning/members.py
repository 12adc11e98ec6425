"""The members of a plan: those that the user names, or three that need no hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from threefold.models.member import fixed_size
from threefold.names import plain_backbone
from threefold.training.planning.basis import Decision, widest_input
from threefold.training.planning.candidates import Screening, is_auto
from threefold.training.planning.image_size import ProbePlan

DEFAULT_MEMBERS = (
    ("lite0", "tf_efficientnet_lite0.in1k"),
    ("lite1", "tf_efficientnet_lite1.in1k"),
    ("lite2", "tf_efficientnet_lite2.in1k"),
)
"""Name and backbone of three networks whose weights need no hub."""


def probe_members(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the members as plain values, the fastest first, each with a linear head.

    Args:
        names: timm names; empty, or beginning with `auto`, for the default members.
    """
    pairs = list(DEFAULT_MEMBERS)
    if names and not is_auto(names):
        pairs = [(_member_name(i, name), plain_backbone(name)) for i, name in enumerate(names)]
    # The noise of the paper's heads is for random heads; it would blur a fitted one.
    head = {"kind": "linear", "noise": 0.0}
    members = []
    for name, backbone in pairs:
        member: dict[str, Any] = {"name": name, "backbone": backbone}
        member["head"] = head | {"sequence": widest_input(backbone)}
        if side := fixed_size(backbone):
            member["img_size"] = side
        members.append(member)
    return members


def _member_name(number: int, backbone: str) -> str:
    """Name a member after its backbone."""
    architecture = plain_backbone(backbone).split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]", "-", f"m{number}-{architecture}")[:80]


def sized_members(
    probes: list[dict[str, Any]], measured: ProbePlan, screening: Screening | None
) -> list[dict[str, Any]]:
    """Return the affordable members, or those that the screening has chosen, as measured."""
    probes = probes[: len(measured.costs)]
    sizes = [fixed_size(probe["backbone"]) or measured.img_size for probe in probes]
    if screening is not None:
        probes = probe_members([candidate.backbone for candidate in screening.chosen])
        sizes = [candidate.img_size or measured.img_size for candidate in screening.chosen]
    sized = [probe | {"img_size": size} for probe, size in zip(probes, sizes, strict=False)]
    if measured.levels is not None and measured.levels.value == "pooled":
        for probe in sized:
            probe["head"] = probe["head"] | {"sequence": "pooled"}
    return sized


def explain_members(
    probes: list[dict[str, Any]], named: Sequence[str], screening: Screening | None
) -> Decision:
    """Say who chose the members."""
    why = "pretrained networks that need no model hub"
    if screening is not None:
        why = screening.explain()
    elif is_auto(named):
        why = f"no time to screen candidates: {why}"
    elif named:
        left_out = named[len(probes) :]
        why = "named by you" + (left_out_reason(left_out) if left_out else "")
    return Decision("members", ", ".join(member["name"] for member in probes), why)


def left_out_reason(backbones: Sequence[str]) -> str:
    """Say which members the plan dropped; the end of a line in the header of the recipe."""
    return f"; too slow for the budget: {', '.join(backbones)}"
