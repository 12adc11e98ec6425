"""Images and labels that a program has in memory, written into the folder of a run.

So a run from a table of pandas or polars, from lists or from arrays is a folder like any other: its
recipe names a file in it, and it can be resumed. What is stored has a name made from its content,
so that other data are another path. Neither pandas nor polars is imported.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

from threefold.data.content_kinds import HEAD, find_format
from threefold.data.images import rgb_pixels
from threefold.data.sources.columns import (
    NamedColumns,
    find_columns,
    find_fold_columns,
    has_usual_name,
    require_columns,
)
from threefold.data.sources.label_sets import LabelCells, seems_multilabel
from threefold.data.sources.npz_file import check_images, label_text, label_texts
from threefold.data.sources.one_hot import class_columns, marked_columns
from threefold.errors import DataError, RunError, shorten
from threefold.files import flush_files, temporary_folder, write_arrays

DATA_FOLDER: Final = "data"
"""The folder in a run's folder with the data that were in memory."""

_DIGEST = re.compile(r"[0-9a-f]{16}")
_TABLE, _ARRAYS = "table.csv", "arrays.npz"
_SUFFIXES: Final = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "WebP": ".webp",
    "AVIF": ".avif",
    "HEIF": ".heic",
}


class _Rows(NamedTuple):
    """Rows to be stored."""

    images: list[Any]
    """Paths, encoded images, pixels, or PIL images."""
    labels: list[str]
    """Of one label per image, or of any number, separated by vertical bars."""
    others: dict[str, list[str]]
    """Cells of the columns group, split and fold, as far as there are any, and of columns without a
    usual name, one of which may name groups (`data.group_column`)."""
    column: str = "label"
    """Name of the column of labels: `labels` where images have any number of them."""


def store_data(data: Any, labels: Any, run_folder: str | Path) -> Path:
    """Write images and labels from memory into the folder of a run.

    Args:
        data: a table (of pandas, polars or pyarrow, or a dict of columns) with the columns that a
            CSV file would have; a sequence of images; pairs of an image and a label; or an array
            of images, uint8 (n, h, w) or (n, h, w, 3). The images of a table or a sequence are
            paths, bytes of image files, arrays uint8 (h, w) or (h, w, 3), or PIL images. Paths are
            relative to the current folder.
        labels: (n,) texts or whole numbers; where images have any number of labels, n lists of
            them, or 0 and 1 (n, k). Of a table also the name of a column, or None for the column
            with a usual name; None for pairs.
        run_folder: the folder of the run. The files are in `data/` there, in a folder named after
            their content; data that are there already are not written again.

    Returns:
        The file for `data.root`, which `detect_source` knows: a CSV or an npz file.

    Raises:
        DataError: images or labels are missing, differ in number, or have another type.
        RunError: the folder has a run on other data, or cannot be written.
    """
    if isinstance(data, str | Path):
        raise DataError("a path is no data in memory", got=data)
    run_folder = Path(run_folder)
    if hasattr(data, "collect"):
        data = data.collect()  # a lazy table of polars
    if _is_table(data):
        return _store_rows(_rows_of_table(data, labels), run_folder)
    array = _as_array(data)
    if array is None or array.ndim < 2:
        return _store_rows(_rows_of_list(data if array is None else array, labels), run_folder)
    images = check_images(array, "images")
    texts, _ = _texts(labels, len(images))
    digest = hashlib.sha256(repr((images.shape, texts)).encode("utf-8", "surrogatepass"))
    digest.update(np.ascontiguousarray(images).data)
    target = _target(run_folder, digest, _ARRAYS)
    if not target.exists():
        with _new_content(run_folder) as content:
            write_arrays(content / _ARRAYS, images=images, labels=np.array(texts))
            _keep(content, target)
    return target


def store_in_new_run(data: Any, labels: Any, parent: Path, key: str = "") -> tuple[Path, Path]:
    """Write images and labels from memory into a run folder that is named after them.

    Args:
        data: as `store_data`, errors too.
        labels: as `store_data`.
        parent: the folder of the run folder.
        key: what else the name depends on, such as parameters.

    Returns:
        The run folder, which exists already if the same was stored before; and the file for
        `data.root`.
    """
    is_new = not parent.exists()
    try:
        with temporary_folder(parent / "memory") as made:
            stored = Path(made) / "run"
            path = store_data(data, labels, stored)
            name = hashlib.sha256(f"{path.parent.name} {key}".encode()).hexdigest()[:12]
            folder = parent / f"memory-{name}"
            if not folder.exists():
                stored.rename(folder)
            return folder, folder.resolve() / path.relative_to(stored.resolve())
    except OSError as error:
        raise RunError("cannot write", where=parent, got=error) from None
    finally:
        if is_new:
            with suppress(OSError):
                parent.rmdir()  # which succeeds only if it is empty


def is_stored_data(folder: Path) -> bool:
    """Whether a folder holds nothing but data that `store_data` has written."""
    return folder.is_dir() and all(_DIGEST.fullmatch(name) for name in os.listdir(folder))


def run_of_stored_data(path: Path) -> Path | None:
    """Return the folder of the run that a path of stored data is in; None for any other path."""
    digest, folder = path.parent, path.parent.parent
    if path.name not in (_TABLE, _ARRAYS) or folder.name != DATA_FOLDER:
        return None
    return folder.parent if _DIGEST.fullmatch(digest.name) else None


def find_stored_data(root: str, run_folder: Path) -> str:
    """Return `data.root` of a run: of stored data, where the run's folder has been moved to."""
    path = Path(root).expanduser()
    own = run_folder / DATA_FOLDER / path.parent.name / path.name
    is_moved = run_of_stored_data(path) is not None and not path.exists() and own.exists()
    return str(own.resolve()) if is_moved else root


# What was given


def _is_table(data: Any) -> bool:
    return isinstance(data, Mapping) or hasattr(data, "columns") or hasattr(data, "column_names")


def _as_array(data: Any) -> np.ndarray | None:
    """Return an array or a tensor as an array; None for anything else."""
    if isinstance(data, Image.Image) or not hasattr(data, "__array__"):
        return None
    try:
        return np.asarray(data)
    except Exception as error:  # such as a tensor on another device
        raise DataError("cannot read the array", got=str(error).split("\n")[0][:200]) from None


def _rows_of_table(data: Any, labels: Any) -> _Rows:
    """Take from a table the columns that are used."""
    names = data if isinstance(data, Mapping) else getattr(data, "column_names", None)
    keys = {str(key): key for key in (data.columns if names is None else names)}
    where = "the table"
    named = NamedColumns(
        label=labels if isinstance(labels, str) else "",
        has_recipe=False,
        rename="rename a column; labels=NAME names the one of the labels",
    )
    known = ["path", "label", "group", "split"]
    if labels is not None and not isinstance(labels, str):
        known.remove("label")  # given labels take the place of a column
    header = [str(key) for key in (data.columns if names is None else names)]
    found = find_columns(header, known, named, where)
    folds = find_fold_columns([name for name in header if name not in found.values()])
    if len(folds) > 1:
        got = " and ".join(folds)
        raise DataError("two columns can be the fold", got=got, fix="rename or remove one of them")
    found |= dict.fromkeys(["fold"] if folds else [], "".join(folds))
    cells = {meaning: _cells(data, keys[name]) for meaning, name in found.items()}
    classes: Sequence[str] = ()
    if "label" in known and "label" not in found and "path" in found:
        rest = [name for name in header if name not in found.values()]
        marks = {name: [_cell_text(cell) for cell in _cells(data, keys[name])] for name in rest}
        classes = class_columns(marks)
        if classes:
            cells["label"] = list(marked_columns(marks, classes))
    elif "label" not in known:
        cells["label"] = _list_of(labels)
    require_columns({name: name for name in cells}, header, named, where)
    images = cells["path"]
    texts, column = _texts(cells["label"], len(images), found.get("label", "label"))
    others: dict[str, list[str]] = {}
    for name in ("group", "split", "fold"):
        if name in cells:
            others[name] = [_cell_text(cell) for cell in cells[name]]
    used = {*found.values(), *classes}
    for name in header:
        if name not in used and name.strip() and not has_usual_name(name):
            texts_of_column = _plain_texts(data[keys[name]])
            if len(texts_of_column) == len(images):
                others[name] = texts_of_column
    return _Rows(images, texts, others, column)


def _plain_texts(column: Any) -> list[str]:
    """Return the cells of a column as texts; none if it has others, such as images, or is none."""
    try:
        cells = _list_of(column)
    except DataError:  # a dict may hold other things beside its columns
        return []
    if not all(_is_missing(cell) or isinstance(cell, str | int | float) for cell in cells):
        return []
    return [_cell_text(cell) for cell in cells]


def _cells(data: Any, key: Any) -> list[Any]:
    """Return a column as a list."""
    return _list_of(data[key])


def _list_of(values: Any) -> list[Any]:
    """Return a column, an array or any sequence as a list."""
    for name in ("to_pylist", "to_list", "tolist"):
        if hasattr(values, name):
            listed = getattr(values, name)()
            return listed if isinstance(listed, list) else [listed]
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise DataError("not a sequence", got=f"{type(values).__name__} {values!r}"[:100])
    return list(values)


def _cell_text(cell: Any) -> str:
    """Return a cell as text; empty if it is missing, and whole numbers alike in every type."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return "" if _is_missing(cell) or cell != cell else str(cell).strip()


def _is_missing(cell: Any) -> bool:
    return cell is None or type(cell).__name__ in ("NAType", "NaTType")


def _rows_of_list(data: Any, labels: Any) -> _Rows:
    """Take a sequence of images and their labels, or of pairs of both."""
    images = list(data) if isinstance(data, np.ndarray) else _list_of(data)
    if labels is None and images and all(_is_pair(item) for item in images):
        images, labels = [item[0] for item in images], [item[1] for item in images]
    texts, column = _texts(labels, len(images))
    return _Rows(images, texts, {}, column)


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2


def _texts(labels: Any, number: int, name: str = "label") -> tuple[list[str], str]:
    """Return the labels as texts, and the name of their column.

    Args:
        labels: one for each image, or any number for each.
        number: of images.
        name: of the column that they are from.

    Raises:
        DataError: there are not as many as images.
    """
    if labels is None or isinstance(labels, str):
        raise DataError(
            "the images have no labels",
            expected="one label for each image",
            got="a text" if labels is not None else "None",
            fix="give them, too: labels=LABELS in threefold.fit, the second argument elsewhere",
        )
    array = _as_array(labels)
    values: Any = _list_of(labels) if array is None else array
    sets = _label_sets(values)
    column = "label"
    if sets is not None:
        texts, column = [_join(labels) for labels in sets], "labels"
    elif isinstance(values, np.ndarray):
        texts = label_texts(values, "labels")
    elif values and isinstance(values[0], list | tuple | np.ndarray):
        texts = label_texts(np.array([np.asarray(v).tolist() for v in values]), "labels")
    else:
        cells = [_cell_text(value) for value in values]
        can_be_empty = seems_multilabel(LabelCells(cells, {}, name)) is not None
        column = "labels" if can_be_empty else "label"
        texts = [
            "" if can_be_empty and not cell else label_text(value, f"labels, row {row}")
            for row, (value, cell) in enumerate(zip(values, cells, strict=True))
        ]
    if len(texts) != number or not number:
        raise DataError(
            "images and labels differ in number" if number else "there are no images",
            got=f"{number} images, {len(texts)} labels",
        )
    return texts, column


def _label_sets(values: Any) -> list[list[str]] | None:
    """Return any number of labels for each image as texts; None where each has one.

    They are lists of labels, or 0 and 1 for each of k labels, which are then numbered.
    """
    if isinstance(values, np.ndarray):
        is_table = values.ndim == 2 and values.shape[1] > 1 and values.dtype.kind in "biuf"
        if not is_table or not values.size or not np.isin(values, (0, 1)).all():
            return None
        rows: list[list[Any]] = [np.flatnonzero(row).tolist() for row in values]
    elif values and all(isinstance(v, list | tuple | set | frozenset | np.ndarray) for v in values):
        lists = [v.tolist() if isinstance(v, np.ndarray) else list(v) for v in values]
        numbers = [item for row in lists for item in row]
        if len(set(map(len, lists))) == 1 and len(lists[0]) > 1 and set(numbers) <= {0, 1}:
            return _label_sets(np.array(lists))
        rows = [
            sorted(row, key=str) if isinstance(v, set | frozenset) else row
            for row, v in zip(lists, values, strict=True)
        ]
    else:
        return None
    sets = [
        [label_text(label, f"labels, row {row}") for label in labels]
        for row, labels in enumerate(rows)
    ]
    return None if all(len(labels) == 1 for labels in sets) else sets


def _join(labels: Sequence[str]) -> str:
    """Return the labels of an image as one text.

    Raises:
        DataError: a label has the sign that separates them.
    """
    wrong = [label for label in labels if "|" in label]
    if wrong:
        raise DataError("the name of a label has a vertical bar", got=wrong[0], fix="rename it")
    return "|".join(labels)


# What is written


def _target(run_folder: Path, digest: hashlib._Hash, name: str) -> Path:
    """Return where data are stored, in a folder that has no run on other data.

    Raises:
        RunError: it has.
    """
    folder = run_folder / DATA_FOLDER
    target = folder / digest.hexdigest()[:16] / name
    if not target.exists() and (run_folder / "recipe.toml").exists():
        raise RunError(
            "the folder holds a run on other images",
            where=run_folder,
            got="other data in memory",
            fix="choose another folder for the run",
        )
    return target.resolve()


@contextmanager
def _new_content(run_folder: Path) -> Iterator[Path]:
    """Make a folder to be filled and then kept; if it is not, nothing is left of it.

    Raises:
        RunError: the run's folder cannot be written.
    """
    is_new = not run_folder.exists()
    try:
        with temporary_folder(run_folder / DATA_FOLDER) as made:
            content = Path(made) / "content"
            content.mkdir()
            yield content
    except OSError as error:
        raise RunError("cannot write", where=run_folder, got=error) from None
    finally:
        if is_new:
            with suppress(OSError):
                run_folder.rmdir()  # which succeeds only if it is empty


def _keep(content: Path, target: Path) -> None:
    """Move what was written to its place; data of a run that has not begun make room."""
    folder = target.parent.parent
    folder.mkdir(exist_ok=True)
    earlier = [*folder.iterdir()] if is_stored_data(folder) else []
    flush_files(content)
    os.replace(content, target.parent)
    for path in earlier:
        shutil.rmtree(path, ignore_errors=True)


def _store_rows(rows: _Rows, run_folder: Path) -> Path:
    """Write a table of paths, or a table with its images beside it."""
    is_path = [isinstance(image, str | os.PathLike) for image in rows.images]
    if any(is_path) and not all(is_path):
        row = is_path.index(not is_path[0])
        raise DataError(
            "some images are paths and others are not",
            where=f"row {row}",
            expected=type(rows.images[0]).__name__,
            got=type(rows.images[row]).__name__,
        )
    with _new_content(run_folder) as content:
        digest = hashlib.sha256()
        if all(is_path):
            names = _absolute(rows.images)
        else:
            names = [_write(image, row, content, digest) for row, image in enumerate(rows.images)]
        table = _table(rows, names)
        digest.update(table)
        target = _target(run_folder, digest, _TABLE)
        if not target.exists():
            (content / _TABLE).write_bytes(table)
            _keep(content, target)
    return target


def _absolute(images: Sequence[Any]) -> list[str]:
    """Return absolute paths of files; a DataError if some do not exist."""
    paths = [Path(os.path.abspath(Path(image).expanduser())) for image in images]
    absent = [str(image) for image, path in zip(images, paths, strict=True) if not path.is_file()]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(paths)} images do not exist",
            got=shorten(absent),
            fix=f"give absolute paths, or paths below the current folder {Path.cwd()}",
        )
    return [path.as_posix() for path in paths]


def _table(rows: _Rows, names: Sequence[str]) -> bytes:
    """Return the rows as a CSV file."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["path", rows.column, *rows.others])
    writer.writerows(zip(names, rows.labels, *rows.others.values(), strict=True))
    try:
        return stream.getvalue().encode()
    except UnicodeEncodeError as error:
        got = ascii(error.object[error.start : error.end])
        raise DataError("a cell of the table is not valid Unicode", got=got) from None


def _write(image: Any, row: int, folder: Path, digest: hashlib._Hash) -> str:
    """Write an image to a file, add it to a digest, and return the file's name."""
    where = f"row {row}"
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):
        image = image["bytes"]  # as the hub keeps images
    suffix = ".png"
    if isinstance(image, bytes | bytearray | memoryview):
        content = bytes(image)
        kind = find_format(content[:HEAD])
        if not kind:
            got = f"{len(content)} bytes"
            raise DataError("the bytes are no image", where=where, got=got)
        suffix = _SUFFIXES[kind]
    else:
        if isinstance(image, Image.Image):
            pixels = rgb_pixels(image)
        else:
            array = _as_array(image)
            if array is None:
                raise DataError(
                    "not an image",
                    where=where,
                    expected="a path, bytes, an array uint8 (h, w) or (h, w, 3), or a PIL image",
                    got=f"{type(image).__name__} {image!r}"[:100],
                )
            pixels = check_images(array[None], where)[0]
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        content = stream.getvalue()
    digest.update(hashlib.sha256(content).digest())
    name = f"{row:07d}{suffix}"
    (folder / name).write_bytes(content)
    return name
