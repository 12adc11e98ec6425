"""Join predictions of the same rows, from several models or files, by the ids of the rows."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from threefold.errors import DataError, shorten
from threefold.names import find_repeated, normalise_name
from threefold.predictions.member_probs import Protocol, default_ids
from threefold.predictions.predictions import Predictions
from threefold.scratch import scratch, take_columns


def join_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Join the members of all parts, in the given order.

    Rows are matched by id and classes by name; both are in the order of the first part with ids.
    A part with `default_ids` has no ids of its own and is matched by row order, which needs the
    same number of rows and the same label in every row. Folds that differ become None and kinds
    that differ become foreign. The protocol is paper if that of any part is, else taught if that
    of any part is.

    Raises:
        DataError: there are no parts; two members have the same name; parts have different ids or
            class names; a row has two labels or groups; or ids are in different orders, so that a
            part without ids cannot be matched.
    """
    if not parts:
        raise DataError("there are no predictions to join")
    if len(parts) == 1:
        return parts[0]
    if not all(_has_names_of(part, parts[0]) for part in parts):
        parts = [_with_normal_names(part) for part in parts]
    _refuse_repeated_members(parts)
    with_ids = [part for part in parts if not _has_default_ids(part)]
    first = (with_ids or parts)[0]
    _refuse_different_orders(with_ids, [part for part in parts if _matches_by_order(part, first)])
    aligned = [_align(part, first) for part in parts]
    folds = _common_folds(aligned)
    protocols = {part.protocol for part in aligned}
    protocol: Protocol = "honest"
    if "paper" in protocols:
        protocol = "paper"
    elif "taught" in protocols:
        protocol = "taught"
    return replace(
        first,
        probs=_all_members(aligned),
        members=tuple(name for part in aligned for name in part.members),
        groups=_common_groups(aligned),
        protocol=protocol,
        kind=first.kind if len({part.kind for part in aligned}) == 1 else "foreign",
        folds=folds,
        roles=None if folds is None else _union_of_roles(aligned),
    )


def _all_members(parts: Sequence[Predictions]) -> np.ndarray:
    """The probabilities (m, n, k) of all parts' members."""
    _, *shape = parts[0].probs.shape
    joined = scratch((sum(len(part.members) for part in parts), *shape), np.float32)
    begin = 0
    for part in parts:
        joined[begin : begin + len(part.members)] = part.probs
        begin += len(part.members)
    return joined


def _has_names_of(part: Predictions, other: Predictions) -> bool:
    """Whether two parts spell the same ids and the same classes alike, in any order."""
    return set(part.ids) == set(other.ids) and set(part.classes) == set(other.classes)


def _with_normal_names(part: Predictions) -> Predictions:
    """The part with ids and classes as NFC, so that those of macOS match those of others."""
    ids, classes = (tuple(map(normalise_name, names)) for names in (part.ids, part.classes))
    if (ids, classes) == (part.ids, part.classes):
        return part
    if len(set(ids)) < len(ids) or len(set(classes)) < len(classes):
        return part  # names that differ in their form alone
    return replace(part, ids=ids, classes=classes)


def _has_default_ids(part: Predictions) -> bool:
    return part.ids == default_ids(len(part))


def _describe(part: Predictions) -> str:
    """The part's members, for messages."""
    return shorten(part.members, 3)


def _refuse_repeated_members(parts: Sequence[Predictions]) -> None:
    repeated = find_repeated(name for part in parts for name in part.members)
    if repeated:
        places = [str(i + 1) for i, part in enumerate(parts) if repeated[0] in part.members]
        more = f", {len(repeated) - 1} more" if len(repeated) > 1 else ""
        raise DataError(
            "two members have the same name",
            got=f"{repeated[0]} in inputs {' and '.join(places)}{more}",
            fix="give each member its own name: rename the files, or change the array or column "
            "of member names",
        )


def _matches_by_order(part: Predictions, first: Predictions) -> bool:
    """Whether one of the two has no ids, so that rows can only be matched by their order."""
    has_no_ids = _has_default_ids(part) or _has_default_ids(first)
    return has_no_ids and set(part.ids) != set(first.ids)


def _refuse_different_orders(
    with_ids: Sequence[Predictions], without_ids: Sequence[Predictions]
) -> None:
    """A part without ids can only be joined to parts that all have the same order."""
    if not without_ids:
        return
    for part in with_ids[1:]:
        if part.ids != with_ids[0].ids and set(part.ids) == set(with_ids[0].ids):
            raise DataError(
                "the ids are in different orders, so a part without ids cannot be matched",
                where=_describe(without_ids[0]),
                expected=f"the order of {_describe(with_ids[0])}",
                got=f"another order in {_describe(part)}",
                fix="save ids in every file",
            )


def _align(part: Predictions, first: Predictions) -> Predictions:
    """The part with the rows and classes of the first, in the same order."""
    part = _reorder_classes(part, first)
    by_order = _matches_by_order(part, first)
    if by_order and len(part) != len(first):
        raise DataError(
            "files without ids can only be matched by order, and their lengths differ",
            where=_describe(part),
            expected=f"{len(first)} rows as in {_describe(first)}",
            got=len(part),
            fix="save ids in every file",
        )
    if by_order:
        part = replace(part, ids=first.ids)
    elif part.ids != first.ids:
        part = part.rows(_find_rows(part, first))
    _refuse_different_labels(part, first, by_order)
    return part


def _find_rows(part: Predictions, first: Predictions) -> list[int]:
    """Row numbers in the part of the first's rows."""
    row_of = {name: row for row, name in enumerate(part.ids)}
    missing = [name for name in first.ids if name not in row_of]
    first_ids = set(first.ids)
    surplus = [name for name in part.ids if name not in first_ids]
    if missing or surplus:
        differences = []
        if missing:
            differences.append(f"{len(missing)} missing, the first is {missing[0]}")
        if surplus:
            differences.append(f"{len(surplus)} surplus, the first is {surplus[0]}")
        raise DataError(
            "the rows are not the same",
            where=_describe(part),
            expected=f"the {len(first)} ids of {_describe(first)}",
            got=" and ".join(differences),
            fix="predict the same images with every model, and use the same id for the same image",
        )
    return [row_of[name] for name in first.ids]


def _reorder_classes(part: Predictions, first: Predictions) -> Predictions:
    """The part with its classes in the first's order."""
    if part.classes == first.classes:
        return part
    if set(part.classes) == set(first.classes):
        order = [part.classes.index(name) for name in first.classes]
        labels = np.argsort(order)[part.labels]
        return replace(
            part, probs=take_columns(part.probs, order), labels=labels, classes=first.classes
        )
    unknown = [name for name in part.classes if name not in first.classes]
    absent = [name for name in first.classes if name not in part.classes]
    expected = f"{len(first.classes)} classes as in {_describe(first)}"
    got = f"{len(part.classes)} classes, "
    if unknown:
        near = difflib.get_close_matches(unknown[0], absent, 1, cutoff=0)
        expected += f", nearest {near[0]}" if near else ""
        got += f"among them {unknown[0]}"
    else:
        got += f"without {absent[0]}"
    raise DataError(
        "the class names differ",
        where=_describe(part),
        expected=expected,
        got=got,
        fix="save the class names with every file, and use the same names in all files",
    )


def _refuse_different_labels(part: Predictions, first: Predictions, by_order: bool) -> None:
    rows = np.flatnonzero(part.labels != first.labels)
    if len(rows):
        row = int(rows[0])
        fix = "save ids in every file: without them rows are matched by order"
        raise DataError(
            "the same row has two labels",
            where=f"{first.ids[row]} ({len(rows)} of {len(first)} rows)",
            expected=f"{first.classes[first.labels[row]]} as in {_describe(first)}",
            got=f"{first.classes[part.labels[row]]} in {_describe(part)}",
            fix=fix if by_order else "",
        )


def _common_groups(aligned: Sequence[Predictions]) -> tuple[str, ...] | None:
    """The groups, from the parts that have any."""
    all_groups = [part.groups for part in aligned if part.groups is not None]
    if not all_groups:
        return None
    for groups in all_groups[1:]:
        for name, expected, got in zip(aligned[0].ids, all_groups[0], groups, strict=True):
            if expected != got:
                raise DataError(
                    "the same row has two groups", where=name, expected=expected, got=got
                )
    return all_groups[0]


def _common_folds(aligned: Sequence[Predictions]) -> np.ndarray | None:
    """The folds if they are the same in all parts, else None."""
    folds = aligned[0].folds
    for part in aligned:
        if folds is None or part.folds is None or (part.folds != folds).any():
            return None
    return folds


def _union_of_roles(aligned: Sequence[Predictions]) -> np.ndarray | None:
    """Every role that a row has in any part, or None if a part has no roles."""
    roles = [part.roles for part in aligned if part.roles is not None]
    if len(roles) < len(aligned) or len({array.shape for array in roles}) > 1:
        return None
    union: np.ndarray = np.bitwise_or.reduce(roles)
    return union
