"""Groups in a CSV file `id,group`: found by features, or made by hand, for any source."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from threefold.errors import DataError, shorten
from threefold.files import read_text, write_bytes
from threefold.names import find_repeated, normalise_name

GROUP_FILE: Final = "groups.csv"
"""Name of the file in a run folder."""


MAX_BYTES: Final = 1 << 30
"""Largest group file."""


def write_groups(path: Path, ids: Sequence[str], groups: Sequence[str]) -> None:
    """Write the group of each image for `data.group_file`, as a whole or not at all.

    Args:
        path: the CSV file.
        ids: (n,) ids of the images, as the source names them.
        groups: (n,) group of each image; an image of its own needs a group of its own.

    Raises:
        DataError: the lengths differ.
        RunError: the file cannot be written.
    """
    if len(ids) != len(groups):
        raise DataError("groups do not match the ids", expected=len(ids), got=len(groups))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "group"))
    writer.writerows(zip(ids, groups, strict=True))
    write_bytes(path, text.getvalue().encode())


def read_groups(path: Path) -> dict[str, str]:
    """Read the groups of a CSV file with the columns id and group; others are ignored.

    Raises:
        DataError: the file cannot be read, a column or a cell is missing, or an id is repeated.
    """
    try:
        stream = io.StringIO(read_text(path, MAX_BYTES), newline="")
        reader = csv.DictReader(stream, strict=True)
        columns = [name.strip().lower() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        repeated = find_repeated(columns)
        if not {"id", "group"} <= set(columns) or {"id", "group"} & set(repeated):
            raise DataError(
                "the group file lacks a column, or has it twice",
                where=path,
                expected="id,group",
                got=",".join(columns) or "an empty file",
            )
        rows = [(row["id"] or "", (row["group"] or "").strip(), reader.line_num) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            "cannot read the group file", where=path, got=error, fix="correct data.group_file"
        ) from None
    for name, group, line in rows:
        if not name or not group:
            raise DataError(
                "an empty cell in the group file",
                where=f"{path} line {line}",
                expected="an id and a group; an image of its own has a group of its own",
            )
    repeated = find_repeated(name for name, _, _ in rows)
    if repeated:
        raise DataError("the group file repeats ids", where=path, got=shorten(repeated))
    return {name: group for name, group, _ in rows}


def find_groups(ids: Sequence[str], table: Mapping[str, str]) -> list[str | None]:
    """Return the group of each image, None for those that the table lacks.

    macOS writes accents in another form than other systems, which does not matter.
    """
    normal = {normalise_name(name): group for name, group in table.items()}
    return [table.get(name, normal.get(normalise_name(name))) for name in ids]


def groups_of(ids: Sequence[str], table: Mapping[str, str], where: str) -> tuple[str, ...]:
    """Return the group of each image; rows of the table for other images are not used.

    Raises:
        DataError: an image has no group.
    """
    groups = find_groups(ids, table)
    absent = [name for name, group in zip(ids, groups, strict=True) if group is None]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(ids)} training images are not in the group file",
            where=where,
            got=shorten(absent),
            fix="add a row id,group for each of them",
        )
    return tuple(group for group in groups if group is not None)
