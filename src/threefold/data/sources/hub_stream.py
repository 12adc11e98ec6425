"""Data sets of the Hugging Face hub, streamed: each row is read once, in order, and then kept.

The images go into the cache (`image_store`) as they come, with the other cells of their rows, so
that the disk holds them once and memory a few. An interrupted command goes on behind the last row;
a second one needs no network. The library's position in its files is saved now and then, since
skipping rows would download them again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final, NamedTuple

from threefold.counting import report
from threefold.data.sources.columns import NamedColumns
from threefold.data.sources.hub_columns import choose_columns
from threefold.data.sources.image_store import ImageStore, StoredRows, StoreWriter
from threefold.data.sources.image_tables import ImageTable, import_optional
from threefold.errors import DataError
from threefold.json_files import write_json

_ADDRESS: Final = re.compile(
    # Of the two slashes, one is lost where the address has become a path.
    r"hf:/{1,2}datasets/(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<configuration>[\w.-]+))?"
)
_POSITION: Final = "position.json"
SAVE_SECONDS: Final = 5.0
"""Between two saved positions."""
_MAX_TEXT: Final = 10_000
"""Characters of a cell; longer texts, such as documents, are not kept."""


class HubAddress(NamedTuple):
    """A data set on the hub."""

    name: str
    """`owner/name`."""
    revision: str | None
    configuration: str | None


def is_stream(name: str) -> bool:
    """Whether a name is the address of a data set that is streamed: `hf://datasets/...`."""
    return name.startswith(("hf:/", "hf:\\"))


def parse_address(address: str) -> HubAddress:
    """Return the parts of `hf://datasets/OWNER/NAME[@REVISION][:CONFIGURATION]`.

    Raises:
        DataError: it is no such address.
    """
    match = _ADDRESS.fullmatch(address.replace("\\", "/"))
    if match is None:
        raise DataError(
            "not an address of a data set on the hub",
            where=address,
            expected="hf://datasets/OWNER/NAME, with @REVISION or :CONFIGURATION behind it",
        )
    return HubAddress(match["name"], match["revision"], match["configuration"])


def stream_tables(address: str, named: NamedColumns) -> list[ImageTable]:
    """Return the splits of a data set, whose images are in the cache; copied if they are not.

    Args:
        address: of the data set.
        named: the columns that the recipe names.

    Raises:
        DataError: the data set cannot be read, or has no image or no label.
    """
    found = parse_address(address)
    store = ImageStore(f"data set {found.name} {found.revision or ''} {found.configuration or ''}")
    if not store.is_complete():
        with store.appending() as writer:
            if not store.is_complete():
                _copy(found, store, writer, named)
    return _tables(address, store, named)


def _copy(address: HubAddress, store: ImageStore, writer: StoreWriter, named: NamedColumns) -> None:
    """Copy all splits, behind what an interrupted command has copied."""
    done: dict[str, int] = {}
    for entry in store.entries():
        split = entry.key.rpartition("/")[0]
        done[split] = done.get(split, 0) + 1
    splits: dict[str, int] = {}
    features: dict[str, Any] = {}
    saved = time.monotonic()
    for split, stream in _open_splits(address).items():
        features[split] = stream.features.to_dict()
        chosen = choose_columns(address.name, split, stream.features, named)
        begin = splits[split] = done.get(split, 0)
        for row in _rows(stream, split, chosen.image, begin, store):
            cells = {name: value for name, value in row.items() if _is_kept(value)}
            content, error = _image_of(row[chosen.image])
            writer.append(f"{split}/{splits[split]:07d}", content, error, cells)
            splits[split] += 1
            report("images copied", writer.count)
            if time.monotonic() - saved > SAVE_SECONDS:
                writer.flush()
                _save_position(store, split, splits[split], stream)
                saved = time.monotonic()
    writer.finish(splits=splits, features=features)
    (store.folder / _POSITION).unlink(missing_ok=True)


def _open_splits(address: HubAddress) -> dict[str, Any]:
    """Return the streams of all splits, whose images stay encoded."""
    hub = import_optional("datasets", "hf")
    try:
        streams = hub.load_dataset(
            address.name, address.configuration, revision=address.revision, streaming=True
        )
        opened = {}
        for split, stream in streams.items():
            # Private in the library; without declared features the first rows tell them.
            stream = stream if stream.features is not None else stream._resolve_features()
            for name, feature in stream.features.items():
                if isinstance(feature, hub.Image):
                    stream = stream.cast_column(name, hub.Image(decode=False))
            opened[split] = stream
        return opened
    except Exception as error:  # the library raises errors of many types, for networks and files
        raise _unreadable(address.name, error) from None


def _unreadable(name: str, error: Exception) -> DataError:
    got = " ".join(f"{type(error).__name__} {error}".split())[:300]
    return DataError(
        "cannot read the data set",
        where=f"hf://datasets/{name}",
        got=got,
        fix="check the name and the network, and run the same command again: it goes on where it "
        "stopped",
    )


def _rows(
    stream: Any, split: str, image: str, begin: int, store: ImageStore
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split from one on."""
    position, skip = _read_position(store, split, begin), begin
    try:
        if position is not None:
            stream.load_state_dict(position["state"])
            skip = begin - position["row"]
        rows = iter(stream)
        for _ in range(skip):
            next(rows, None)
        yield from rows
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(split, error) from None


def _save_position(store: ImageStore, split: str, row: int, stream: Any) -> None:
    """Save where the library is in its files, behind `row` rows of a split."""
    with suppress(TypeError, ValueError):  # a state that JSON lacks: rows are skipped then
        state = json.dumps({"split": split, "row": row, "state": stream.state_dict()})
        write_json(store.folder / _POSITION, json.loads(state))


def _read_position(store: ImageStore, split: str, begin: int) -> dict[str, Any] | None:
    """Return the saved position of a split, if it is not behind what has been stored."""
    try:
        position = json.loads((store.folder / _POSITION).read_text(encoding="utf-8"))
        is_usable = position["split"] == split and 0 < position["row"] <= begin
        return position if is_usable and isinstance(position["state"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_kept(value: Any) -> bool:
    """Whether a cell can be a label, a group or the like: a plain value, or a list of them."""
    if isinstance(value, list):
        return len(value) <= 1000 and all(
            _is_kept(v) and not isinstance(v, list | dict) for v in value
        )
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    return value is None or isinstance(value, bool | int | float)


def _image_of(cell: Any) -> tuple[bytes | None, str]:
    """Return the encoded image in a cell, or why there is none."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    path = cell.get("path") if isinstance(cell, dict) else None
    if content is None and path:
        # In the data set itself: the library opens what its own files name.
        xopen = import_optional("datasets.utils.file_utils", "hf").xopen
        try:
            with xopen(path, "rb") as stream:
                content = stream.read()
        except Exception as error:
            return None, f"cannot read {path}: {type(error).__name__}"
    if not isinstance(content, bytes) or not content:
        return None, f"the cell has no image, {type(content).__name__}"
    return content, ""


def _tables(address: str, store: ImageStore, named: NamedColumns) -> list[ImageTable]:
    """Make the tables of a store that is complete."""
    hub, arrow = import_optional("datasets", "hf"), import_optional("pyarrow", "hf")
    facts = store.facts()
    cells: dict[str, dict[str, list[Any]]] = {}
    stored: dict[str, StoredRows] = {}
    seen: dict[str, int] = {}
    end = 0
    for entry in store.entries():
        split = entry.key.rpartition("/")[0]
        row = seen.get(split, 0)
        seen[split] = row + 1
        if split not in stored:
            stored[split] = StoredRows(store, facts["splits"][split], end)
            cells[split] = {}
        stored[split].place(entry, [row])
        end += entry.size
        for name, value in entry.cells.items():
            column = cells[split].setdefault(name, [])
            column += [None] * (row - len(column))
            column.append(value)
    tables = []
    for split, rows in stored.items():
        features = hub.Features.from_dict(facts["features"][split])
        chosen = choose_columns(address, split, features, named)
        columns = {
            name: column + [None] * (facts["splits"][split] - len(column))
            for name, column in cells[split].items()
        }
        tables.append(
            ImageTable(
                split,
                chosen.part,
                arrow.table(columns),
                chosen.columns,
                chosen.image,
                chosen.label_names,
                list(features),
                rows.read,
                rows.identify,
            )
        )
    return tables
