"""Several predictions of the same rows, one per model or file, as one: matched by id, never by hope."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from threefold.errors import DataError
from threefold.predictions import Predictions

_RENAME = "name the members apart: rename the files, or change the array or column of member names"
_FIELDS = {field.name for field in fields(Predictions)}


def join_predictions(parts: Sequence[Predictions]) -> Predictions:
    """All members of all parts as one, in the order given; rows and classes in the order of the first part with ids.

    Rows are matched by id. A part whose ids were made up when its file was read (row0000, row0001, ...) has nothing but
    its order: it is matched by that, which needs the same number of rows and the same label in every row. Classes are
    matched by name. What the parts do not agree on is not kept: different folds give none, different kinds
    give foreign; one part of the paper's protocol, or a taught one, makes the whole so.

    Raises:
        DataError: nothing to join; members with the same name; ids that one part has and another has not; ids in
            different orders beside a part without ids; other class names; other labels or groups for the same row.
    """
    if not parts:
        raise DataError("there are no predictions to join")
    if len(parts) == 1:
        return parts[0]
    _refuse_collisions(parts)
    named = [part for part in parts if not _made_up(part)]
    first = (named or parts)[0]
    _refuse_orders(named, [part for part in parts if _by_order(part, first)])
    aligned = [_aligned(part, first) for part in parts]
    common: dict[str, Any] = {"folds": _folds(aligned)}
    if "roles" in _FIELDS:
        common["roles"] = None if common["folds"] is None else _roles(aligned)
    kinds = {part.kind for part in aligned}
    return replace(
        first,
        probs=np.concatenate([part.probs for part in aligned]),
        members=tuple(name for part in aligned for name in part.members),
        groups=_groups(aligned),
        protocol=next(
            (p for p in ("paper", "taught") if any(part.protocol == p for part in aligned)),
            "honest",
        ),
        kind=first.kind if len(kinds) == 1 else "foreign",
        **common,
    )


def _made_up(part: Predictions) -> bool:
    """Whether the ids are those that reading gives to rows without ids."""
    width = max(4, len(str(len(part) - 1)))
    return all(name == f"row{i:0{width}d}" for i, name in enumerate(part.ids))


def _called(part: Predictions) -> str:
    """The part's members, for messages."""
    return ", ".join(part.members[:3]) + (
        f" and {len(part.members) - 3} more" if len(part.members) > 3 else ""
    )


def _refuse_collisions(parts: Sequence[Predictions]) -> None:
    counts = Counter(name for part in parts for name in part.members)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        places = [str(i + 1) for i, part in enumerate(parts) if twice[0] in part.members]
        got = f"{twice[0]} in inputs {' and '.join(places)}" + (
            f", {len(twice) - 1} more" if len(twice) > 1 else ""
        )
        raise DataError("two members have the same name", got=got, fix=_RENAME)


def _by_order(part: Predictions, first: Predictions) -> bool:
    """Whether rows can only be matched by their order: one side has no ids, and they are not the other's by chance."""
    return (_made_up(part) or _made_up(first)) and set(part.ids) != set(first.ids)


def _refuse_orders(named: Sequence[Predictions], without: Sequence[Predictions]) -> None:
    """A part without ids can only be put beside parts that all have the same order."""
    for part in named[1:] if without else ():
        if part.ids != named[0].ids and set(part.ids) == set(named[0].ids):
            raise DataError(
                "the ids are in different orders, so a part without ids cannot be matched",
                where=_called(without[0]),
                expected=f"the order of {_called(named[0])}",
                got=f"another order in {_called(part)}",
                fix="save ids in every file",
            )


def _aligned(part: Predictions, first: Predictions) -> Predictions:
    """The part with the rows and the classes of the first, in its order."""
    part = _with_classes(part, first)
    by_order = _by_order(part, first)
    if by_order and len(part) != len(first):
        raise DataError(
            "files without ids can only be matched by order, and their lengths differ",
            where=_called(part),
            expected=f"{len(first)} rows as in {_called(first)}",
            got=len(part),
            fix="save ids in every file",
        )
    if by_order:
        part = replace(part, ids=first.ids)
    elif part.ids != first.ids:
        part = part.rows(_positions(part, first))
    _refuse_labels(part, first, by_order)
    return part


def _positions(part: Predictions, first: Predictions) -> list[int]:
    """Where the first's rows are in the part."""
    there = {name: row for row, name in enumerate(part.ids)}
    missing = [name for name in first.ids if name not in there]
    surplus = sorted(there.keys() - set(first.ids), key=there.__getitem__)
    if missing or surplus:
        told = [
            f"{len(names)} {word}, the first is {names[0]}"
            for word, names in (("missing", missing), ("that the other has not", surplus))
            if names
        ]
        raise DataError(
            "the rows are not the same",
            where=_called(part),
            expected=f"the {len(first)} ids of {_called(first)}",
            got=" and ".join(told),
            fix="predict the same images with every model, and give the same image the same id",
        )
    return [there[name] for name in first.ids]


def _with_classes(part: Predictions, first: Predictions) -> Predictions:
    """The part with its classes in the first's order."""
    if part.classes == first.classes:
        return part
    if set(part.classes) == set(first.classes):
        order = [part.classes.index(name) for name in first.classes]
        labels = np.argsort(order)[part.labels]
        return replace(part, probs=part.probs[:, :, order], labels=labels, classes=first.classes)
    strange = [name for name in part.classes if name not in first.classes]
    absent = [name for name in first.classes if name not in part.classes]
    near = difflib.get_close_matches(strange[0], absent, 1, cutoff=0) if strange else []
    expected = f"{len(first.classes)} classes as in {_called(first)}" + (
        f", nearest {near[0]}" if near else ""
    )
    got = f"{len(part.classes)} classes, " + (
        f"among them {strange[0]}" if strange else f"without {absent[0]}"
    )
    fix = "save the class names with every file, and name a class alike in all"
    raise DataError(
        "the class names differ", where=_called(part), expected=expected, got=got, fix=fix
    )


def _refuse_labels(part: Predictions, first: Predictions, by_order: bool) -> None:
    rows = np.flatnonzero(part.labels != first.labels)
    if len(rows):
        row = int(rows[0])
        raise DataError(
            "the same row has two labels",
            where=f"{first.ids[row]} ({len(rows)} of {len(first)} rows)",
            expected=f"{first.classes[first.labels[row]]} as in {_called(first)}",
            got=f"{first.classes[part.labels[row]]} in {_called(part)}",
            fix="save ids in every file: without them rows are matched by order"
            if by_order
            else "",
        )


def _groups(aligned: Sequence[Predictions]) -> tuple[str, ...] | None:
    """The groups of those that have any."""
    having = [part for part in aligned if part.groups is not None]
    for part in having[1:]:
        if part.groups != having[0].groups:
            pairs = zip(part.ids, having[0].groups or (), part.groups or (), strict=True)
            where, mine, theirs = next(pair for pair in pairs if pair[1] != pair[2])
            raise DataError("the same row has two groups", where=where, expected=mine, got=theirs)
    return having[0].groups if having else None


def _folds(aligned: Sequence[Predictions]) -> np.ndarray | None:
    """The folds, where all parts have the same."""
    folds = aligned[0].folds
    same = folds is not None and all(
        part.folds is not None and (part.folds == folds).all() for part in aligned
    )
    return folds if same else None


def _roles(aligned: Sequence[Predictions]) -> np.ndarray | None:
    """What the networks of any part did with a row; None where one part does not say."""
    roles = [getattr(part, "roles", None) for part in aligned]
    known = [array for array in roles if array is not None]
    if len(known) < len(roles) or len({array.shape for array in known}) > 1:
        return None
    return np.bitwise_or.reduce(known)  # type: ignore[no-any-return]
