"""What a server answers, as types: they check the answers and document them in /openapi.json."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel

from threefold.runtime import Model


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
    """Those that were asked: in the mode "fast" not always all."""
    set: list[str] | None = None
    """The prediction set, where the model has a threshold for it."""
    unknown: bool | None = None
    """Whether the image looks like none of the classes, where the model has a threshold for it."""
    asked: int | None = None
    """How many members were asked, where the model has a cascade."""


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
    probs: np.ndarray,
    members: np.ndarray,
    asked: np.ndarray | None = None,
    *,
    top: int,
) -> Answer:
    """An answer from probabilities (k,), those of the members (m, k) and, of a cascade, how many stages were asked ()."""
    first, *_ = shares = _top(model, probs, top)
    told = {}
    present = model.asked_members(None if asked is None else int(asked))
    for member, row in ((model.members[i], members[i]) for i in present):
        best = _top(model, row, top)
        told[member] = Opinion(label=best[0].label, probability=best[0].probability, top=best)
    return Answer(
        file=name,
        label=first.label,
        probability=first.probability,
        top=shares,
        members=told,
        asked=None if asked is None else len(present),
        **_doubt(model, probs),
    )


def _top(model: Model, probs: np.ndarray, top: int) -> list[Share]:
    order = np.argsort(-probs, kind="stable")[:top]
    return [Share(label=model.classes[i], probability=float(probs[i])) for i in order]


def _doubt(model: Model, probs: np.ndarray) -> dict[str, Any]:
    """The prediction set and whether the image is unknown, as far as the model has thresholds."""
    told: dict[str, Any] = {}
    if False in model.sets:
        told["set"] = model.sets_of(probs[None])[0]
    if model.unknown is not None:
        told["unknown"] = bool(model.unknown_of(probs[None])[0])
    return told
