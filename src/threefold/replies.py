"""What a server answers, as types: they check the answers and document them in /openapi.json."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel

from threefold.runtime import Model, ModelOutput


class Share(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class Opinion(BaseModel):
    """One member's answer."""

    label: str
    probability: float
    top: list[Share]


class Answer(BaseModel):
    """The answer for one image."""

    file: str
    label: str
    probability: float
    top: list[Share]
    members: dict[str, Opinion]
    """The members that ran; in mode "fast" not always all."""
    set: list[str] | None = None
    """The prediction set, where the model has a threshold for it."""
    unknown: bool | None = None
    """Whether the image looks like none of the classes, where the model has a threshold for it."""
    members_used: int | None = None
    """How many members ran, if the model has a cascade."""


class Answers(BaseModel):
    """The answers of a request, in the order of its images."""

    answers: list[Answer]


class Problem(BaseModel):
    """Why a request was refused: a word for programs, a sentence for people, and the file it is about."""

    code: str
    message: str
    file: str | None = None


class Failure(BaseModel):
    """Every answer that is not 200."""

    error: Problem


def describe(
    model: Model,
    name: str,
    output: ModelOutput,
    top: int,
) -> Answer:
    """Describe the model's output for one image; `top` classes are named."""
    shares = _top(model, output.probs[0], top)
    stages = None if output.stages_used is None else int(output.stages_used[0])
    members = model.members_in_stages(stages)
    opinions = {}
    for i in members:
        best = _top(model, output.member_probs[0, i], top)
        opinions[model.members[i]] = Opinion(
            label=best[0].label, probability=best[0].probability, top=best
        )
    return Answer(
        file=name,
        label=shares[0].label,
        probability=shares[0].probability,
        top=shares,
        members=opinions,
        members_used=None if stages is None else len(members),
        **_doubt(model, output.probs),
    )


def _top(model: Model, probs: np.ndarray, top: int) -> list[Share]:
    order = np.argsort(-probs, kind="stable")[:top]
    return [Share(label=model.classes[i], probability=float(probs[i])) for i in order]


def _doubt(model: Model, probs: np.ndarray) -> dict[str, Any]:
    """The prediction set and whether the image is unknown, as far as the model has thresholds."""
    told: dict[str, Any] = {}
    if False in model.sets:
        told["set"] = model.sets_from_probs(probs)[0]
    if model.unknown is not None:
        told["unknown"] = bool(model.unknown_from_probs(probs)[0])
    return told
