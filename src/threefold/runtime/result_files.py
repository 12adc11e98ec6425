"""Files of answers that grow as the answers come, and go on after an interruption.

A file beside it says of which model and which images the answers are, so that no other command
goes on with it. CSV and JSON lines grow row by row; a row that was cut off is removed before more
follow. A parquet file cannot grow: its parts lie in a folder beside it until all are there.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from threefold.errors import DamagedFileError, DataError, RunError
from threefold.files import replacing
from threefold.json_files import read_json, write_json
from threefold.names import escape_formula
from threefold.predictions.tables import import_pyarrow
from threefold.runtime.describe import Answer, AnswerTable
from threefold.runtime.json_text import json_line

PART_ROWS: Final = 8192
"""Rows of a parquet part: what a killed process loses at most."""
_SOURCES: Final = {
    "images": "list of images",
    "list": "list of images",
    "max_stages": "mode",
    "budget_ms": "time budget",
    "top": "number of classes",
}
"""Names of what the answers depend on, where they differ from the keys."""
_MERGED: Final = b"threefold.parts"
"""Key of a parquet file's metadata: the number of parts that are in it."""


class ResultFile:
    """A file of answers, one row for each image, in the order of the images.

    Args:
        path: the file.
        table: its columns.
    """

    def __init__(self, path: Path, table: AnswerTable) -> None:
        self.path, self.table = path, table

    def exists(self) -> bool:
        """Whether there are rows already, or a file of anything."""
        return self.path.exists()

    def read_paths(self) -> Iterator[str]:
        """Yield the path in each complete row; what follows them is removed from the file.

        Raises:
            DamagedFileError: a row in the middle cannot be read, or has other columns.
        """
        raise NotImplementedError

    def open(self) -> None:
        """Make ready to append rows.

        Raises:
            RunError: the file cannot be written.
        """
        raise NotImplementedError

    def append(self, rows: Iterable[Answer]) -> None:
        """Append rows; they are in the file when this returns, or in a part of it."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is pending; more rows may follow in another process."""
        raise NotImplementedError

    def finish(self) -> None:
        """Close the file as a complete one."""
        self.close()


class _TextFile(ResultFile):
    """A file that grows at its end."""

    stream: IO[str] | None = None

    def open(self) -> None:
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # What is not Unicode in a file name is escaped, as on a terminal.
            self.stream = self.path.open(
                "a", encoding="utf-8", errors="backslashreplace", newline=""
            )
            if self.stream.tell() == 0:
                self._write_head()
                self.stream.flush()

    def append(self, rows: Iterable[Answer]) -> None:
        if self.stream is None:
            return  # it could not be written, which was said
        with self._writing():
            for row in rows:
                self._write(row)
            self.stream.flush()

    def close(self) -> None:
        """Put the rows on the disk; some disks say only then that they are full."""
        if self.stream is None:
            return
        with self._writing():
            os.fsync(self.stream.fileno())
            self.stream.close()
        self.stream = None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error into one of the file, which is closed without another try to write."""
        try:
            yield
        except OSError as error:
            stream, self.stream = self.stream, None
            with suppress(OSError):
                if stream is not None:
                    stream.close()
            raise RunError("cannot write", where=self.path, got=error) from None

    def _write_head(self) -> None:
        """Write what comes before the rows."""

    def _write(self, row: Answer) -> None:
        raise NotImplementedError

    def _cut(self, length: int) -> None:
        with self._writing():
            if length < self.path.stat().st_size:
                os.truncate(self.path, length)


class CsvFile(_TextFile):
    """The table of `predict --csv`, which `evaluate` reads."""

    def read_paths(self) -> Iterator[str]:
        """Yield the path in each complete row; see `ResultFile`."""
        complete = before = position = 0  # bytes
        line = b""

        def lines(stream: IO[bytes]) -> Iterator[str]:
            nonlocal position, line
            for line in stream:
                position += len(line)
                yield line.decode("utf-8", "replace")

        with self.path.open("rb") as stream:
            try:
                for number, cells in enumerate(csv.reader(lines(stream))):
                    if number and complete < before:
                        raise _damaged(self.path, f"row {number} is not complete")
                    before = position
                    if not line.endswith(b"\r\n") or len(cells) != len(self._head):
                        continue
                    complete = position
                    if number:
                        yield _plain_cell(cells[0])
                    elif cells != self._head:
                        raise _damaged(self.path, "other columns")
            except csv.Error as error:
                raise _damaged(self.path, error) from None
        self._cut(complete)

    @property
    def _head(self) -> list[str]:
        return self.table.csv_head()

    def _write_head(self) -> None:
        assert self.stream is not None
        csv.writer(self.stream).writerow(self._head)

    def _write(self, row: Answer) -> None:
        assert self.stream is not None
        csv.writer(self.stream).writerow(self.table.csv_cells(row))


class JsonLinesFile(_TextFile):
    """One object in each line, as `predict --json` prints."""

    def read_paths(self) -> Iterator[str]:
        """Yield the path in each complete row; see `ResultFile`."""
        complete = 0  # bytes
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream):
                if not line.endswith(b"\n"):
                    break
                try:
                    image = json.loads(line)["image"]
                except (ValueError, LookupError, TypeError, RecursionError):
                    raise _damaged(self.path, f"line {number + 1}") from None
                complete += len(line)
                yield str(image)
        self._cut(complete)

    def _write(self, row: Answer) -> None:
        assert self.stream is not None
        tree = {key: value for key, value in row.items() if key != "probs"}
        self.stream.write(json_line(tree, self.stream) + "\n")


class ParquetFile(ResultFile):
    """A table of parquet, with probabilities as float32; parts become one file at the end."""

    def __init__(self, path: Path, table: AnswerTable) -> None:
        super().__init__(path, table)
        self.folder = path.with_name(f"{path.name}.parts")
        self._arrow, self._parquet = import_pyarrow(), import_pyarrow(".parquet")
        self._rows: list[Answer] = []
        self._next = 0

    def exists(self) -> bool:
        """Whether there is the file or a part of it."""
        return self.path.exists() or self.folder.exists()

    def read_paths(self) -> Iterator[str]:
        """Yield the path in each row of the file and of its parts; see `ResultFile`."""
        try:
            for file in self._files():
                opened = self._parquet.ParquetFile(file)
                if opened.schema_arrow.names != [*self.table.columns]:
                    raise _damaged(file, "other columns")
                for batch in opened.iter_batches():
                    yield from batch.column(0).to_pylist()
        except self._arrow.ArrowException as error:
            raise _damaged(self.path, error) from None

    def open(self) -> None:
        """Make the folder of parts."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError("cannot write", where=self.folder, got=error) from None
        self._next = self._merged() + len(self._parts())

    def append(self, rows: Iterable[Answer]) -> None:
        """Collect rows, and write a part when there are enough."""
        self._rows += rows
        if len(self._rows) >= PART_ROWS:
            self.close()

    def close(self) -> None:
        """Write the pending rows as a part."""
        if self._rows:
            part = self.folder / f"{self._next:06d}.parquet"
            self._write(part, [self._batch()], self._schema())
            self._next, self._rows = self._next + 1, []

    def finish(self) -> None:
        """Join the parts to the file, one at a time, and delete them."""
        self.close()
        if self._parts() or not self.path.exists():
            files = self._files()
            batches = (
                batch for file in files for batch in self._parquet.ParquetFile(file).iter_batches()
            )
            merged = {_MERGED: str(self._next).encode()}
            self._write(self.path, batches, self._schema().with_metadata(merged))
        shutil.rmtree(self.folder, ignore_errors=True)

    def _merged(self) -> int:
        """The number of parts that are in the file already, also if they have not been deleted."""
        if not self.path.exists():
            return 0
        metadata = self._parquet.read_schema(self.path).metadata or {}
        return int(metadata.get(_MERGED, 0))

    def _parts(self) -> list[Path]:
        """The parts that are not in the file yet, in order."""
        merged = self._merged()
        return [p for p in sorted(self.folder.glob("[0-9]*.parquet")) if int(p.stem) >= merged]

    def _files(self) -> list[Path]:
        return [self.path, *self._parts()] if self.path.exists() else self._parts()

    def _schema(self) -> Any:
        text, number = self._arrow.string(), self._arrow.float32()
        columns = self.table.columns
        kinds = [text, text, *[number] * (len(columns) - 2)]
        return self._arrow.schema(zip(columns, kinds, strict=True))

    def _batch(self) -> Any:
        values = np.array([self.table.numbers(row) for row in self._rows], np.float32)
        texts = [self.table.texts(row) for row in self._rows]
        columns = [
            [_storable(path) for path, _ in texts],
            [labels for _, labels in texts],
            *values.T,
        ]
        schema = self._schema()
        arrays = [self._arrow.array(*pair) for pair in zip(columns, schema.types, strict=True)]
        return self._arrow.RecordBatch.from_arrays(arrays, schema=schema)

    def _write(self, path: Path, batches: Iterable[Any], schema: Any) -> None:
        with (
            replacing(path) as file,
            self._parquet.ParquetWriter(file, schema) as writer,
        ):
            for batch in batches:
                writer.write_batch(batch)


FORMATS: Final[Mapping[str, type[ResultFile]]] = {
    ".csv": CsvFile,
    ".jsonl": JsonLinesFile,
    ".parquet": ParquetFile,
}


def check_format(path: Path) -> type[ResultFile]:
    """Return the kind of file that a name's suffix says.

    Raises:
        DataError: the suffix is another, or pyarrow is missing.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            "unknown kind of results",
            where=path,
            expected=f"a name that ends in {', '.join(FORMATS)}",
            got=path.suffix or "no suffix",
        )
    if kind is ParquetFile:
        import_pyarrow()
    return kind


class ResumableResults:
    """A file of answers, and how far they go.

    Args:
        path: the file; its suffix says which kind it is.
        table: its columns.
        paths: of all images, in order.
        source: what the answers depend on, as plain values: the model, its mode, ...

    Attributes:
        answered: images that need no answer any more: those with a row, and those before the last
            row that could not be read.
        rows: rows in the file when it was opened.
        file: for more rows.

    Raises:
        DataError: the suffix is unknown, or pyarrow is missing.
        RunError: the file is not of this model and these images, or cannot be written.
    """

    def __init__(
        self, path: Path, table: AnswerTable, paths: Sequence[str], source: Mapping[str, Any]
    ) -> None:
        self.file = check_format(path)(path, table)
        self.state_path = path.with_name(f"{path.name}.state.json")
        self.state = {"images": len(paths), "list": _digest(paths), **source}
        self.answered = self.rows = 0
        self.resolved: Any = None
        if self.file.exists():
            self._check_state()
            self._find_end(paths)
        else:
            write_json(self.state_path, self.state)
        self.file.open()

    def keep(self, resolved: Any) -> None:
        """Keep a value that was found at the start, as `resolved` of the next process."""
        self.resolved = resolved
        write_json(self.state_path, {**self.state, "resolved": resolved})

    def _check_state(self) -> None:
        if not self.state_path.exists():
            raise RunError(
                "there is a file already, which no unfinished command wrote",
                where=self.file.path,
                expected=f"{self.state_path.name} beside it",
                fix="move it away, or choose another --out",
            )
        found = read_json(self.state_path)
        found = found if isinstance(found, dict) else {}
        self.resolved = found.pop("resolved", None)
        different = [key for key, value in self.state.items() if found.get(key) != value]
        if different:
            key = different[0]
            what = _SOURCES.get(key, key)
            raise RunError(
                f"the results are of another {what}",
                where=self.file.path,
                expected=f"{key} {str(self.state[key])[:16]}",
                got=str(found.get(key, "none"))[:16],
                fix="give the command that began it, or choose another --out",
            )

    def _find_end(self, paths: Sequence[str]) -> None:
        """Find the last image with a row; those before it without one could not be read."""
        for row in self.file.read_paths():
            while self.answered < len(paths) and _storable(paths[self.answered]) != _storable(row):
                self.answered += 1
            if self.answered == len(paths):
                raise _damaged(self.file.path, f"row {self.rows + 1} is of no image of the list")
            self.answered += 1
            self.rows += 1


def _storable(path: str) -> str:
    """A path as parquet can store it: what is not Unicode is escaped."""
    return path.encode("utf-8", "backslashreplace").decode()


def _plain_cell(cell: str) -> str:
    """Undo `escape_formula`."""
    return cell[1:] if cell[:1] == "'" and escape_formula(cell[1:]) == cell else cell


def _digest(paths: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _damaged(path: Path, got: object) -> DamagedFileError:
    return DamagedFileError(
        "the file of results was changed, or is damaged",
        where=path,
        got=got,
        fix="move it away, or choose another --out",
    )
