"""Several labels per image: one cell that names them all, or a column of 0 and 1 for each label."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from threefold.data.sources.one_hot import class_columns, marked_columns
from threefold.errors import shorten
from threefold.names import natural_key, normalise_name

SEPARATORS: Final = {"|": "vertical bars", ";": "semicolons", ",": "commas", " ": "spaces"}
"""What can separate the labels in a cell, the surest sign first."""

_PLURALS: Final = ("labels", "tags", "classes", "categories", "targets")
"""Names of columns that hold any number of labels."""

LabelSet = tuple[str, ...]
"""The labels of an image: none, one or several."""


class LabelSets(NamedTuple):
    """The labels of the rows of a table."""

    sets: list[LabelSet]
    """(n,)"""
    names: tuple[str, ...] = ()
    """All labels, where columns name them, with those that no row has."""
    note: str = ""
    """How they were read."""
    columns: tuple[str, ...] = ()
    """The columns of 0 and 1, as the table names them."""


class LabelCells(NamedTuple):
    """What can be the labels of a table."""

    cells: Sequence[str | LabelSet] | None
    """(n,) of the column of labels, texts or lists; None if the table has none."""
    columns: Mapping[str, Sequence[str]]
    """Cells by name of the columns that can be labels, for a table without such a column."""
    name: str = ""
    """Of the column of labels."""


def read_label_sets(
    cells: Sequence[str | LabelSet] | None,
    columns: Mapping[str, Sequence[str]],
    separator: str = "",
) -> LabelSets | None:
    """Read several labels per row from a table.

    Args:
        cells: (n,) of the column of labels; None if the table has none.
        columns: cells by name of the columns that can be labels, for a table without such a column.
        separator: of the labels in a cell; empty = found from the cells.

    Returns:
        The labels; None if the table has neither such cells nor columns of 0 and 1.
    """
    if cells is None:
        names = class_columns(columns)
        if not names:
            return None
        note = f"the labels are {len(names)} columns of 0 and 1: {shorten(names)}"
        sets = [tuple(map(normalise_name, row)) for row in marked_columns(columns, names)]
        return LabelSets(sets, tuple(map(normalise_name, names)), note, tuple(names))
    if any(isinstance(cell, tuple) for cell in cells):
        sets = [cell if isinstance(cell, tuple) else split_labels(cell, "") for cell in cells]
        return LabelSets(sets, (), "each cell is a list of labels")
    separator = separator or find_separator(_texts(cells), is_sure=True)
    sets = [split_labels(cell, separator) for cell in _texts(cells)]
    note = "each cell of labels has one label or none"
    if separator:
        sign = SEPARATORS.get(separator, repr(separator))
        note = f"the labels in a cell are separated by {sign}"
    return LabelSets(sets, (), note)


def _texts(cells: Iterable[str | LabelSet]) -> list[str]:
    return [cell for cell in cells if isinstance(cell, str)]


def split_labels(cell: str, separator: str) -> LabelSet:
    """Return the labels that a cell names, each once; none for an empty cell or an empty list.

    A list as Python writes it, `['cat', 'dog']`, is read, too.

    Args:
        cell: of a table.
        separator: of the labels; empty = the cell is one label.
    """
    cell = cell.strip()
    is_list = re.fullmatch(r"\[.*\]|\(.*\)|\{.*\}", cell, re.DOTALL) is not None
    if is_list:
        cell = cell[1:-1].strip()
    if not separator:
        parts = [cell]
    elif separator == " ":
        parts = cell.split()
    else:
        parts = cell.split(separator)
    if is_list:
        parts = [part.strip().strip("'\"") for part in parts]
    labels = [normalise_name(part.strip()) for part in parts]
    return tuple(dict.fromkeys(label for label in labels if label))


def find_separator(cells: Iterable[str], *, is_sure: bool = False) -> str:
    """Return the sign that separates labels in cells; empty if each cell seems to be one label.

    Names of classes can hold such signs, too. What tells labels from them is that a label occurs in
    several combinations. Spaces, which are usual in names, must separate cells of different lengths
    that are at least twice as many as the labels.

    Args:
        cells: (n,) of a column.
        is_sure: whether cells are known to hold several labels.
    """
    distinct = set(cells)
    for sign in SEPARATORS:
        sets = {frozenset(split_labels(cell, sign)) for cell in distinct}
        several = [labels for labels in sets if len(labels) > 1]
        if several and _seem_labels(sets, several, sign, is_sure=is_sure):
            return sign
    return ""


def _seem_labels(
    sets: set[frozenset[str]], several: list[frozenset[str]], sign: str, *, is_sure: bool
) -> bool:
    """Whether the parts of cells occur in several combinations, as labels do."""
    if is_sure and sign != " ":
        return True
    counts = Counter(label for labels in sets for label in labels)
    joined = {label for labels in several for label in labels}
    repeated = sum(counts[label] > 1 for label in joined)
    if sign in "|;":
        return repeated > 0
    if sign == "," or is_sure:
        return 2 * repeated >= len(joined)
    lengths = {len(labels) for labels in sets}
    return repeated == len(joined) and len(lengths) > 1 and len(sets) >= 2 * len(counts)


def seems_multilabel(table: LabelCells) -> tuple[str, str] | None:
    """Whether a table has several labels per row, or none.

    Returns:
        The separator of the labels in a cell (empty where columns or lists hold them), and the
        reason; None if each row has one label.
    """
    cells, columns, name = table
    if cells is None:
        names = class_columns(columns)
        sets = list(marked_columns(columns, names)) if names else []
        where = f"the {len(names)} columns of 0 and 1"
        return _count_sets(sets, where) if any(len(labels) != 1 for labels in sets) else None
    if any(isinstance(cell, tuple) for cell in cells):
        sets = [cell if isinstance(cell, tuple) else (cell,) for cell in cells]
        where = f"the lists in the column {name}"
        return _count_sets(sets, where) if any(len(labels) != 1 for labels in sets) else None
    texts = _texts(cells)
    separator = find_separator(texts)
    if separator:
        several = sum(len(split_labels(text, separator)) > 1 for text in texts)
        return separator, (
            f"{several} of {len(texts)} cells of the column {name} have several labels, separated "
            f"by {SEPARATORS[separator]}"
        )
    empty = sum(not text for text in texts)
    if empty and re.sub(r"[\W_]+", "", name.lower()) in _PLURALS:
        return "|", f"{empty} of {len(texts)} cells of the column {name} have no label"
    return None


def _count_sets(sets: Sequence[LabelSet], where: str) -> tuple[str, str]:
    """Say that rows have several labels, or none."""
    several, none = sum(len(labels) > 1 for labels in sets), sum(not labels for labels in sets)
    return "", f"of {len(sets)} rows, {several} have several labels in {where}, {none} have none"


def join_labels(labels: LabelSet) -> str:
    """Return the labels of an image as one text, equal for equal sets."""
    return " + ".join(sorted(labels))


def all_labels(sets: Iterable[LabelSet]) -> tuple[str, ...]:
    """Return every label that some row has, in natural order."""
    return tuple(sorted({label for labels in sets for label in labels}, key=natural_key))
