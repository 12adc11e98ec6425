"""Which columns of a table of images are read, and a refusal of those that only seem to be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from threefold.data.split_names import EXPECTED
from threefold.errors import DataError, shorten
from threefold.names import find_repeated

_NEAR: Final = {
    "split": (
        *("splits", "subset", "set", "part", "partition", "phase", "usage", "traintest"),
        *("datasplit", "datasetsplit", "traintestsplit", "splitname", "tvt"),
        *("isvalid", "isval", "isvalidation", "istest", "istrain"),
    ),
    "group": ("groups", "groupid", "groupids", "grp"),
    "fold": ("fold", "folds", "kfold", "foldid", "cvfold"),
}
"""Other names of columns that change which rows are trained on, without spaces and signs."""

_FIXES: Final = {
    "split": f"rename it to split, with the values {EXPECTED}",
    "group": "rename it to group",
    "fold": 'set data.fold_column to its name and folds.scheme = "column"',
}


def find_columns(
    header: Sequence[str], known: Sequence[str], fold_column: str, where: str
) -> dict[str, str]:
    """Find the known columns of a table, whatever their capitals.

    Args:
        header: names of all columns.
        known: the columns with a meaning; of `split` and `group`, other usual names are refused.
        fold_column: the column that the recipe names; empty = none.
        where: the file, for messages.

    Returns:
        The table's own name of each known column that it has.

    Raises:
        DataError: two columns have one name, or a column seems to be a split, a group or a fold
            but would not be read.
    """
    repeated = find_repeated(header)
    if repeated:
        raise DataError("two columns have the same name", where=where, got=shorten(repeated))
    found: dict[str, str] = {}
    for name in header:
        meaning = name.strip().lower()
        if meaning not in known or name == fold_column:
            continue
        if meaning in found:
            raise DataError(
                f"two columns can be the {meaning}",
                where=where,
                got=f"{found[meaning]} and {name}",
                fix="rename or remove one of them",
            )
        found[meaning] = name
    for name in header:
        if name not in found.values() and name != fold_column:
            _refuse_near_miss(name, found, fold_column, where)
    return found


def _refuse_near_miss(name: str, found: dict[str, str], fold_column: str, where: str) -> None:
    """Refuse a column that seems to be one that the table lacks, and would be ignored."""
    plain = re.sub(r"[\W_]+", "", name.lower())
    for meaning, names in _NEAR.items():
        is_read = bool(fold_column) if meaning == "fold" else meaning in found
        if plain in names and not is_read:
            raise DataError(
                f"a column seems to be the {meaning} of the images, but would not be read",
                where=where,
                got=name,
                fix=f"{_FIXES[meaning]}; or remove the column",
            )


def check_fold_column(header: Sequence[str], fold_column: str, where: str) -> None:
    """Check that a table has the fold column that the recipe names.

    Raises:
        DataError: it has not.
    """
    if fold_column and fold_column not in header:
        raise DataError(
            f"the table has no fold column {fold_column}",
            where=where,
            expected=f"a column {fold_column}",
            got=", ".join(header),
            fix="correct data.fold_column",
        )


def note_unread(header: Sequence[str], read: Sequence[str]) -> list[str]:
    """Note the columns of a table that are not read."""
    unread = [name for name in header if name not in read]
    return [f"{len(unread)} columns are not read: {shorten(unread)}"] if unread else []
