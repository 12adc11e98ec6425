"""Tables of labels with one column per class, as ISIC publishes them: 1 in the column of the class.

Such a table has no column of labels. Its cells are 0 and 1, 0.0 and 1.0, or False and True. A row
has exactly one 1, or with `data.task = "multilabel"` any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from threefold.errors import DataError, shorten

_CELLS: Final = dict.fromkeys(("0", "0.0", "False", "false", "FALSE"), False) | dict.fromkeys(
    ("1", "1.0", "True", "true", "TRUE"), True
)


def class_columns(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the columns that hold nothing but 0 and 1; none if there are fewer than two.

    Args:
        columns: cells by name, of the columns that can be classes.
    """
    names = [name for name, cells in columns.items() if cells and set(cells) <= _CELLS.keys()]
    return names if len(names) > 1 else []


def marked_columns(
    columns: Mapping[str, Sequence[str]], names: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """Yield for each row the names of the columns with a 1.

    Args:
        columns: cells by name.
        names: of the classes, as `class_columns` finds them.
    """
    for cells in zip(*(columns[name] for name in names), strict=True):
        yield tuple(name for name, cell in zip(names, cells, strict=True) if _CELLS[cell])


def one_hot_labels(
    columns: Mapping[str, Sequence[str]], names: Sequence[str], rows: Sequence[str], where: str
) -> list[str]:
    """Return the class of each row: the name of the column with a 1.

    Args:
        columns: cells by name.
        names: of the classes, as `class_columns` finds them.
        rows: what to call each row in a message.
        where: the file, for messages.

    Raises:
        DataError: a row has several classes, or none.
    """
    labels = []
    for row, marked in zip(rows, marked_columns(columns, names), strict=True):
        if len(marked) != 1:
            raise DataError(
                "an image does not have exactly one class",
                where=f"{where} {row}",
                expected=f"one 1 in the columns {shorten(names)}",
                got=f"1 in {shorten(marked)}" if marked else "0 in all of them",
                fix='for several labels per image (multi-label) set data.task = "multilabel" in a '
                "recipe; else leave such rows out",
            )
        labels.append(marked[0])
    return labels
