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
from typing import Any, Final

import numpy as np
from PIL import Image

from threefold.data.content_kinds import HEAD, find_format
from threefold.data.images import rgb_pixels
from threefold.data.memory_rows import (
    Rows,
    as_array,
    is_table,
    read_labels,
    rows_of_list,
    rows_of_table,
)
from threefold.data.sources.npz_file import check_images
from threefold.errors import DataError, RunError, shorten
from threefold.files import TemporaryFolder, flush_files, real_path
from threefold.npz_files import write_arrays

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
    if is_table(data):
        return _store_rows(rows_of_table(data, labels), run_folder)
    array = as_array(data)
    if array is None or array.ndim < 2:
        return _store_rows(rows_of_list(data if array is None else array, labels), run_folder)
    images = check_images(array, "images")
    texts, _ = read_labels(labels, len(images))
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
        with TemporaryFolder(parent / "memory") as made:
            stored = Path(made) / "run"
            path = store_data(data, labels, stored)
            name = hashlib.sha256(f"{path.parent.name} {key}".encode()).hexdigest()[:12]
            folder = parent / f"memory-{name}"
            if not folder.exists():
                stored.rename(folder)
            return folder, real_path(folder) / path.relative_to(real_path(stored))
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
    return str(real_path(own)) if is_moved else root


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
    return real_path(target)


@contextmanager
def _new_content(run_folder: Path) -> Iterator[Path]:
    """Make a folder to be filled and then kept; if it is not, nothing is left of it.

    Raises:
        RunError: the run's folder cannot be written.
    """
    is_new = not run_folder.exists()
    try:
        with TemporaryFolder(run_folder / DATA_FOLDER) as made:
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


def _store_rows(rows: Rows, run_folder: Path) -> Path:
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


def _table(rows: Rows, names: Sequence[str]) -> bytes:
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
            array = as_array(image)
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
