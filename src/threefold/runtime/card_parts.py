"""The parts of a model card that say what answers mean: thresholds, sets, and the cascade."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from threefold.ensembles.cascade import Cascade
from threefold.ensembles.conformal import ConformalSets, UnknownThreshold
from threefold.errors import DataError, ExportError
from threefold.tasks import Task


class StageCap(NamedTuple):
    """Accuracy under a limit on the stages and without it, as the model card states it."""

    accuracy: float
    full_accuracy: float
    rows: str


@dataclass
class CardParts:
    """What a model card says about answers; the attributes are those of `Model`."""

    task: Task
    thresholds: np.ndarray | None = None
    sets: dict[bool, ConformalSets] = field(default_factory=dict)
    unknown: UnknownThreshold | None = None
    cascade: Cascade | None = None
    caps: list[StageCap] = field(default_factory=list)


def read_parts(card: Mapping[str, Any], path: object) -> CardParts:
    """Read the parts of a card that `model_card.parse_card` has checked.

    Args:
        card: the card.
        path: of the file, for errors.

    Raises:
        ExportError: a part is damaged, or of other classes or members; one line that names it.
    """
    task: Task = card.get("task") or "multiclass"
    parts = CardParts(task)
    if task == "multilabel":
        # `parse_card` refuses one without them, and one with the parts below.
        parts.thresholds = np.array(card["thresholds"], np.float64)
        return parts
    with _part("conformal or unknown", path):
        for entry in card.get("conformal") or ():
            sets = ConformalSets.from_state(entry["state"])
            if sets.k_ != len(card["classes"]):
                raise DataError(
                    "prediction sets of other classes", expected=len(card["classes"]), got=sets.k_
                )
            parts.sets[sets.by_class] = sets
        if card.get("unknown"):
            parts.unknown = UnknownThreshold.from_state(card["unknown"]["state"])
    if card.get("cascade") is not None:
        with _part("cascade", path):
            _read_cascade(card["cascade"], len(card["members"]), parts)
    return parts


def _read_cascade(entry: Mapping[str, Any], members: int, parts: CardParts) -> None:
    """Read the card's cascade; `read_card` has checked the graph's inputs against it."""
    parts.cascade = Cascade.from_state(entry["state"])
    if sum(map(len, parts.cascade.stages)) != members:
        raise DataError("a cascade of other members", expected=members, got=parts.cascade.stages)
    for cap in entry.get("caps", ()):
        parts.caps.append(StageCap(float(cap["accuracy"]), float(cap["full"]), str(cap["rows"])))


@contextmanager
def _part(name: str, path: object) -> Iterator[None]:
    """Report any fault in a part of the card as one line that names the part."""
    try:
        yield
    except (
        DataError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise ExportError(
            "the model card is damaged",
            where=path,
            got=f"{name}: {error}",
            fix="export it again from the run",
        ) from None
