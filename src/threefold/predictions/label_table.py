"""A separate table of labels: which column names the rows, and which row each prediction has.

Rows are joined by their names. They are matched by order only where one side has no names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from threefold.data.sources.one_hot import class_columns, one_hot_labels
from threefold.errors import DataError, shorten
from threefold.names import find_repeated, normalise_name

_ID_NAMES = {
    *("id", "ids", "path", "paths", "key", "uid", "uuid", "name", "row_id", "sample_id"),
    *("image", "images", "image_id", "image_ids", "imageid", "image_name", "image_path"),
    *("img", "img_id", "img_name", "img_path", "photo", "picture", "example_id", "sample"),
    *("file", "files", "file_id", "file_ids", "file_name", "file_names", "file_path"),
    *("file_paths", "filename", "filenames", "filepath", "filepaths"),
}
_LABEL_NAMES = {
    *("label", "labels", "class", "class_name", "category", "target", "true_label", "truth", "y"),
}
_GROUP_NAMES = {"group", "groups", "group_id"}
_NOT_IDS = {*_GROUP_NAMES, "fold", "split", "subset"}
_NO_CLASSES = _LABEL_NAMES | _NOT_IDS


def is_id_name(name: str) -> bool:
    """Whether a column or an array is named as programs name the ids of images."""
    return _normalise(name) in _ID_NAMES


def is_clear_id_name(name: str) -> bool:
    """Whether a column is named as only ids are: `image_id` is, while `file` may be a class."""
    normal = _normalise(name)
    return normal in _ID_NAMES and re.search("_?(id|name|path)s?$", normal[1:]) is not None


def _normalise(name: str) -> str:
    return re.sub(r"[\s.-]+", "_", name.strip().lower())


def _is_known(name: str) -> bool:
    """Whether a column of labels beside predictions is named as something else than a class."""
    return is_id_name(name) or _normalise(name) in _NO_CLASSES


@dataclass(frozen=True, eq=False)
class LabelTable:
    """A separate table of labels.

    Attributes:
        where: the file, for messages.
        labels: n class names or numbers, as text.
        groups: n groups, or None.
        others: n cells of every other column; one of them may name the rows.
    """

    where: str
    labels: list[str]
    groups: list[str] | None = None
    others: Mapping[str, list[str]] = field(default_factory=dict)

    @classmethod
    def from_columns(cls, columns: Mapping[str, list[str]], where: str) -> LabelTable:
        """Find the labels and the groups among the columns of a table.

        The labels are one column, or a column of 0 and 1 for each class.

        Raises:
            DataError: no column, or more than one, can hold the labels; or a row has several
                classes, or none.
        """
        group = next((name for name in columns if _normalise(name) in _GROUP_NAMES), None)
        classes = class_columns(
            {name: cells for name, cells in columns.items() if not _is_known(name)}
        )
        if classes and not any(_normalise(name) in _LABEL_NAMES for name in columns):
            rows = [f"row {row}" for row in range(len(columns[classes[0]]))]
            labels, read = one_hot_labels(columns, classes, rows, where), classes
        else:
            label = find_label_column(list(columns), where)
            labels, read = columns[label], [label]
        others = {name: cells for name, cells in columns.items() if name not in (*read, group)}
        return cls(where, labels, None if group is None else columns[group], others)

    def match_rows(
        self, ids: Sequence[str] | None, paths: Sequence[str] | None, n: int, where: str
    ) -> tuple[Sequence[str] | None, Sequence[int]]:
        """Find the row of each of n predictions.

        Args:
            ids: names of the predictions' rows; None if they have none.
            paths: their paths, if they have any.
            n: number of rows of the predictions.
            where: the file of the predictions, for messages.

        Returns:
            Names for the predictions, or None, and n positions in this table.

        Raises:
            DataError: rows are missing or repeated; no column has the names of the predictions, or
                several have and contradict each other; or the order cannot be trusted.
        """
        if ids is None:
            return self._match_order(n, where)
        named = next((name for name in ("id", "path") if name in self.others), None)
        if named is not None:
            rows = _find_rows(self.others[named], ids, paths)
            if rows is None:
                raise self._missing(self.others[named], ids, where)
            return ids, rows
        matches = {}
        for name, cells in self.others.items():
            rows = _find_rows(cells, ids, paths)
            if rows is not None:
                matches[name] = rows
        if matches:
            rows = next(iter(matches.values()))
            if any(other != rows for other in matches.values()):
                raise DataError(
                    "several columns of the table of labels have the ids of the predictions",
                    where=self.where,
                    got=shorten(matches),
                    fix="name the right one id",
                )
            return ids, rows
        candidates = self._id_columns()
        if not candidates:
            return ids, self._match_order(n, where)[1]
        raise DataError(
            "no column of the table of labels has the ids of the predictions",
            where=self.where,
            expected=f"ids as in {where}, such as {ids[0]}",
            got=shorten(f"{name} {self.others[name][0]}" for name in candidates),
            fix="name the column of the ids id; to match by order, keep only the column of labels",
        )

    def _match_order(self, n: int, where: str) -> tuple[Sequence[str] | None, Sequence[int]]:
        """Match by order, which needs as many rows, and ids that do not number another order."""
        if len(self.labels) != n:
            raise DataError(
                "the labels do not fit the predictions",
                where=self.where,
                expected=f"{n} rows as in {where}",
                got=len(self.labels),
                fix="save ids with the predictions, and give them a column id here",
            )
        candidates = self._id_columns()
        for name in candidates:
            cells = self.others[name]
            if all(re.fullmatch("[0-9]{1,9}", cell) for cell in cells):
                numbers = [int(cell) for cell in cells]
                is_count = set(numbers) in (set(range(n)), set(range(1, n + 1)))
                if is_count and numbers != sorted(numbers):
                    raise DataError(
                        "the rows of the table of labels are numbered, but not in that order",
                        where=f"{self.where}, column {name}",
                        got=shorten(cells, 5),
                        fix="save ids with the predictions, or sort the table as the predictions",
                    )
        named = [name for name in ("id", "path", *candidates) if name in self.others]
        return (self.others[named[0]] if named else None), range(n)

    def _id_columns(self) -> list[str]:
        """Columns that could name the rows: by their own name, or by a value of its own per row."""
        found = [name for name in self.others if is_id_name(name)]
        for name, cells in self.others.items():
            if name in found or _normalise(name) in _NOT_IDS:
                continue
            is_measured = all(re.fullmatch(r"-?[0-9]*\.[0-9]+(e-?[0-9]+)?", c) for c in cells)
            if len(cells) > 1 and len(set(cells)) == len(cells) and not is_measured:
                found.append(name)
        return found

    def _missing(self, cells: Sequence[str], ids: Sequence[str], where: str) -> DataError:
        repeated = find_repeated(cells)
        if repeated:
            return DataError("ids are not unique", where=self.where, got=repeated[0])
        known = set(cells)
        missing = [name for name in ids if name not in known]
        return DataError(
            "labels are missing",
            where=self.where,
            expected=f"the ids of {where}",
            got=f"{len(missing)} missing, the first is {missing[0]}",
        )


def find_label_column(header: Sequence[str], where: str) -> str:
    """Return the column of labels: `label`, one named alike, or the only one beside the ids.

    Raises:
        DataError: there is none, or more than one.
    """
    if "label" in header:
        return "label"
    named = [name for name in header if _normalise(name) in _LABEL_NAMES]
    if not named:
        rest = [name for name in header if not is_id_name(name)]
        named = [name for name in rest if _normalise(name) not in _NOT_IDS]
    if len(named) != 1:
        raise DataError(
            "the table of labels has no column label",
            where=where,
            expected="id,label",
            got=", ".join(header)[:80],
            fix="name the column of the true classes label",
        )
    return named[0]


def _find_rows(
    cells: Sequence[str], ids: Sequence[str], paths: Sequence[str] | None
) -> list[int] | None:
    """The position of each prediction's name in a column; None unless every name is there once.

    Names are compared as they are, then without folders, then without the suffix as well.
    """
    for names in (paths, ids):
        if names is None:
            continue
        for simplify in (normalise_name, _file_name, _stem):
            rows = _find_simplified(cells, names, simplify)
            if rows is not None:
                return rows
    return None


def _find_simplified(
    cells: Sequence[str], names: Sequence[str], simplify: Callable[[str], str]
) -> list[int] | None:
    keys = [simplify(cell) for cell in cells]
    wanted = [simplify(name) for name in names]
    if len(set(keys)) < len(keys) or len(set(wanted)) < len(wanted):
        return None
    row_of = {key: row for row, key in enumerate(keys)}
    rows = [row_of[key] for key in wanted if key in row_of]
    return rows if len(rows) == len(wanted) else None


def _file_name(name: str) -> str:
    return normalise_name(name).replace("\\", "/").rsplit("/", 1)[-1]


def _stem(name: str) -> str:
    return re.sub(r"\.[A-Za-z]{2,5}$", "", _file_name(name))
