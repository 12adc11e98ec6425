"""WebDataset shards: tar files of samples, an image and its label under one key.

`0001.jpg` and `0001.cls` are one sample. The headers are read once, in order, and where each image
begins is kept in the cache; images are then read from the tar files by their place, and nothing is
unpacked. The library `webdataset` would add decoding and shuffling, which training does itself, and
no reading by place; so tarfile is enough.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from threefold.counting import counted
from threefold.data.images import IMAGE_SUFFIXES
from threefold.data.sources.addresses import is_address
from threefold.data.sources.archives import safe_name
from threefold.data.sources.columns import NO_NAMES, NamedColumns, find_label_name
from threefold.data.sources.csv_table import parse_fold
from threefold.data.sources.folder import EncodedImages, ListedImage, Listing
from threefold.data.sources.image_store import read_part
from threefold.data.sources.remote_files import fetch_file
from threefold.data.split_names import PARTS, split_of
from threefold.errors import DataError, shorten
from threefold.files import cache_folder, write_bytes
from threefold.names import count_of, find_repeated, normalise_name

INDEXES: Final = "shards"
"""Kind of the cache's folder."""
MAX_SHARDS: Final = 100_000
MAX_LABEL_BYTES: Final = 1 << 20
"""Largest .json of a sample."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LABELS = ("cls", "json")
"""Extensions of a label, the first that a sample has; `data.label_column` names another."""
_CLASS_NAMES = ("classnames.txt", "classes.txt", "class_names.txt", "labels.txt")
"""Files beside the shards that name whole-number labels, one a line."""
_FORMAT = 1


class _Sample(NamedTuple):
    """An image in a shard, with its label."""

    key: str
    """With the folders in the shard, without extensions."""
    extension: str
    begin: int
    size: int
    label: str
    group: str
    """Empty = none."""
    fold: str
    """Empty = none."""


class _Shard(NamedTuple):
    path: Path
    name: str
    """Relative to the folder of all shards, without suffix; part of the ids."""
    size: int
    changed: int
    """Time of the last change in nanoseconds."""


def is_shards(root: str) -> bool:
    """Whether a path or an address names shards: a pattern of tar files, or one at an address."""
    is_pattern = _RANGE.search(root) is not None or "*" in root
    return root.lower().endswith(".tar") and (is_pattern or is_address(root))


def holds_samples(path: Path) -> bool:
    """Whether a tar file, or the first in a folder of nothing else, holds samples with labels.

    Args:
        path: a tar file or a folder.
    """
    if path.is_dir():
        try:
            folders = [path, *(folder for folder in path.iterdir() if split_of(folder.name))]
        except OSError:  # which the reader of the folder reports
            return False
        shards = (shard for folder in folders for shard in sorted(folder.glob("*.tar")))
        path = next(shards, path)
    if not path.name.lower().endswith(".tar") or not path.is_file():
        return False
    keys: dict[str, set[str]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for _, info in zip(range(64), tar, strict=False):
                if info.isreg():
                    key, extension = split_name(info.name)
                    keys.setdefault(key, set()).add(extension)
    except (OSError, tarfile.TarError):
        return False
    return any(
        found & set(_LABELS) and any(map(is_image_extension, found)) for found in keys.values()
    )


def split_name(name: str) -> tuple[str, str]:
    """Split the name of a member into key and extension, at the first dot of its base name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def is_image_extension(extension: str) -> bool:
    """Whether an extension is that of an image."""
    return f".{extension}" in IMAGE_SUFFIXES


def expand_range(pattern: str) -> list[str]:
    """Return the names that a pattern such as `train-{000..146}.tar` stands for.

    Raises:
        DataError: a range is empty or too long.
    """
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    width = len(match[1]) if match[1].startswith("0") else 0
    if not first <= last < first + MAX_SHARDS:
        raise DataError(
            "the range of shards is empty or too long",
            where=pattern,
            expected=f"{{FIRST..LAST}}, at most {MAX_SHARDS:,}",
        )
    names = []
    for number in range(first, last + 1):
        name = f"{pattern[: match.start()]}{number:0{width}}{pattern[match.end() :]}"
        names += expand_range(name)
    return names


def list_webdataset(root: str, named: NamedColumns = NO_NAMES) -> Listing:
    """List the samples of shards; each has one image, and one label in `.cls` or `.json`.

    A `.cls` is a number or a name; `classnames.txt` beside the shards (or in the folder above)
    names the numbers. Of a `.json` the label is a value with a usual name (`columns`), and `group`
    names the group. The split is in the name of the shard or of its folder; without one, the
    samples are for training. Ids are `SHARD/KEY`, where SHARD has the folders below the common one.

    Args:
        root: a tar file, a folder of them, a pattern with `{000..146}` or `*`, or an address of a
            tar file with or without such a range.
        named: `label` is an extension such as txt or a name in `.json`; `path` is the extension of
            the image, where a sample has several.

    Raises:
        DataError: there are no shards, one cannot be read, or a sample has no label or no image, or
            two images.
    """
    shards = _find_shards(root)
    class_names = _read_class_names(shards[0].path.parent)
    items: list[ListedImage] = []
    places: list[tuple[int, int, int]] = []
    labels: set[str] = set()
    for number, shard in enumerate(counted(shards, "shards listed", len(shards))):
        part = _part_of(shard.name)
        for sample in _read_samples(shard, named):
            label = _name_label(sample.label, class_names, f"{shard.path}: {sample.key}")
            labels.add(label)
            name = f"{shard.name}/{sample.key}"
            items.append(
                ListedImage(
                    id=name,
                    path=name,
                    label=normalise_name(label),
                    part=part,
                    group=sample.group or None,
                    row=len(items),
                    fold=_fold_of(sample, named, shard) if part == "train" else None,
                )
            )
            places.append((number, sample.begin, sample.size))
    if not items:
        raise DataError("the shards have no samples", where=root, expected="an image and a label")
    repeated = find_repeated(item.id for item in items)
    if repeated:
        raise DataError("two samples have the same key", where=root, got=shorten(repeated))
    classes = tuple(normalise_name(name) for name in class_names if name in labels)
    reader = _Reader(shards, np.array(places))
    encoded = EncodedImages(reader.read, np.arange(len(items)), reader.identify)
    plural = "shard" if len(shards) == 1 else "shards"
    notes = [f"{len(items):,} samples in {len(shards):,} {plural}, read in place"]
    return Listing(items, notes, classes, encoded)


class _Reader:
    """Reads images from shards by their place (n, 3): shard, first byte, bytes."""

    def __init__(self, shards: Sequence[_Shard], places: np.ndarray) -> None:
        self.shards, self.places = shards, places

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row.

        Raises:
            DataError: the shard has changed since its headers were read.
        """
        number, begin, size = self.places[row].tolist()
        shard = self.shards[number]
        try:
            status = os.stat(shard.path)
        except OSError as error:
            raise DataError("cannot read the shard", where=shard.path, got=error) from None
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.changed):
            raise DataError(
                "the shard has changed since its samples were listed",
                where=shard.path,
                fix="run the same command again when nothing writes to it",
            )
        return read_part(shard.path, begin, size)

    def identify(self, row: int) -> bytes:
        """Return what changes when the image of a row may have changed."""
        number, begin, size = self.places[row].tolist()
        shard = self.shards[number]
        return f"{shard.path}\0{shard.size} {shard.changed} {begin} {size}".encode()


# Shards


def _find_shards(root: str) -> list[_Shard]:
    """Find the shards that a root names, in their order."""
    if is_address(root):
        paths = [fetch_file(address) for address in expand_range(root)]
        names = [address.rpartition("/")[2] for address in expand_range(root)]
    else:
        paths = _find_files(Path(root).expanduser())
        common = os.path.commonpath([path.parent for path in paths]) if paths else ""
        names = [path.relative_to(common).as_posix() for path in paths]
    if not paths:
        raise DataError("there are no shards", where=root, expected=".tar files")
    shards = []
    for path, name in zip(paths, names, strict=True):
        try:
            status = path.stat()
        except OSError as error:
            raise DataError("cannot read the shard", where=path, got=error) from None
        stem = name[: -len(".tar")] if name.lower().endswith(".tar") else name
        shards.append(_Shard(path, stem, status.st_size, status.st_mtime_ns))
    repeated = find_repeated(shard.name for shard in shards)
    if repeated:
        raise DataError("two shards have the same name", where=root, got=shorten(repeated))
    return shards


def _find_files(root: Path) -> list[Path]:
    """Return the tar files of a path, a folder or a pattern."""
    if root.is_dir():
        return sorted(path for path in root.rglob("*.tar") if path.is_file())
    if root.exists():
        return [root]
    paths = []
    for name in expand_range(str(root)):
        path = Path(name)
        paths += sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        shards = count_of(len(absent), "shard does", "shards do")
        raise DataError(f"{shards} not exist", where=root, got=shorten(absent))
    return paths


def _part_of(name: str) -> str:
    """Return train or test for a shard, by the words in its name and its folders."""
    for part in reversed(name.split("/")):
        for word in (part, *re.split(r"[^A-Za-z]+", part)):
            split = split_of(word)
            if split is not None:
                return PARTS[split]
    return "train"


@lru_cache(maxsize=8)
def _read_class_names(folder: Path) -> tuple[str, ...]:
    """Read the names of the numbers, from a file beside the shards or in the folder above."""
    for parent in (folder, folder.parent):
        for name in _CLASS_NAMES:
            path = parent / name
            if path.is_file() and path.stat().st_size < MAX_LABEL_BYTES:
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
                return tuple(line.strip() for line in lines if line.strip())
    return ()


def _name_label(label: str, class_names: Sequence[str], where: str) -> str:
    """Return the name of a class, whose number may be its label."""
    if not class_names or not re.fullmatch(r"\d{1,9}", label):
        return label
    if int(label) >= len(class_names):
        raise DataError(
            "a label has no name",
            where=where,
            expected=f"0 to {len(class_names) - 1}, as in the file of class names",
            got=label,
        )
    return class_names[int(label)]


# Samples


def _read_samples(shard: _Shard, named: NamedColumns) -> list[_Sample]:
    """Return the samples of a shard, from the cache if it has not changed since."""
    place = [str(shard.path.absolute()), shard.size, shard.changed]
    key = [_FORMAT, *place, named.path, named.label, named.fold, named.group, named.needs_label]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    index = cache_folder(INDEXES) / digest[:2] / f"{digest[2:34]}.json"
    try:
        checksum, _, content = index.read_bytes().partition(b"\n")
        if checksum == hashlib.sha256(content).hexdigest().encode():
            return [_Sample(*sample) for sample in json.loads(content)]
    except OSError:
        pass
    samples = _scan(shard, named)
    content = json.dumps(samples, separators=(",", ":")).encode()
    write_bytes(index, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    return samples


def _scan(shard: _Shard, named: NamedColumns) -> list[_Sample]:
    """Read the headers and the labels of a shard."""
    samples: list[_Sample] = []
    seen: set[str] = set()
    current = ""
    members: dict[str, tuple[int, int]] = {}
    for name, begin, size in _members(shard):
        key, extension = split_name(name)
        if key != current and members:
            samples += _make_sample(shard, current, members, named, seen)
            members = {}
        current = key
        if extension in members:
            raise DataError("a sample has two files of one kind", where=f"{shard.path}: {name}")
        members[extension] = (begin, size)
    samples += _make_sample(shard, current, members, named, seen) if members else []
    return samples


def _members(shard: _Shard) -> Iterator[tuple[str, int, int]]:
    """Yield name, first byte and bytes of the plain files of a shard."""
    try:
        with tarfile.open(shard.path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise DataError(
                        "the shard has a member that is no plain file",
                        where=f"{shard.path}: {info.name}",
                    )
                if info.offset_data + info.size > shard.size:
                    raise DataError(
                        "the shard is truncated",
                        where=shard.path,
                        expected=f"{info.offset_data + info.size:,} bytes or more",
                        got=f"{shard.size:,}",
                        fix="copy it again",
                    )
                yield safe_name(info.name), info.offset_data, info.size
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError("cannot read the shard", where=shard.path, got=error) from None


def _make_sample(
    shard: _Shard,
    key: str,
    members: dict[str, tuple[int, int]],
    named: NamedColumns,
    seen: set[str],
) -> list[_Sample]:
    """Make a sample of its members; none of what is no sample, such as a note of the shard."""
    where = f"{shard.path}: {key}"
    images = [named.path] if named.path in members else []
    if not named.path:
        images = [extension for extension in members if is_image_extension(extension)]
    is_labelled = any(label in members for label in _LABELS)
    if not images and not (is_labelled and named.needs_label):
        return []
    if key in seen:
        raise DataError("the files of a sample are apart, or two samples have one key", where=where)
    seen.add(key)
    if len(images) != 1:
        raise DataError(
            "a sample has no image" if not images else f"a sample has {len(images)} images",
            where=where,
            expected="one image",
            got=shorten(members),
            fix="name the extension of the image: --set data.path_column=NAME" if images else "",
        )
    begin, size = members[images[0]]
    label, group, fold = _read_label(shard, members, named, where)
    return [_Sample(key, images[0], begin, size, label, group, fold)]


def _read_label(
    shard: _Shard, members: dict[str, tuple[int, int]], named: NamedColumns, where: str
) -> tuple[str, str, str]:
    """Return label, group and fold of a sample; empty = none."""
    record: dict[str, Any] = {}
    if "json" in members:
        try:
            record = json.loads(_read_text(shard, members["json"], where))
        except ValueError as error:
            raise DataError("the .json of a sample is damaged", where=where, got=error) from None
        if not isinstance(record, dict):
            record = {"label": record}
    value: object = None
    extension = named.label.lower() if named.label else "cls"
    if extension in members and extension != "json":
        value = _read_text(shard, members[extension], where)
    elif record and named.needs_label:
        value = record.get(find_label_name(list(record), named, where))
    if not named.needs_label:
        return "", "", ""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(
            "a sample has no label",
            where=where,
            expected="a number or a name in .cls, or in .json under a usual name such as label",
            got=shorten(members) if value is None else repr(value),
            fix="name an extension or a key of .json: --set data.label_column=NAME",
        )
    group = record.get(named.group or "group")
    if named.group and group is None:
        raise DataError(
            f"a sample has no group {named.group}",
            where=where,
            expected=f"the key {named.group} in the .json of each sample",
            got=shorten(record) if record else shorten(members),
            fix="correct data.group_column",
        )
    fold = "" if record.get(named.fold) is None else str(record[named.fold]).strip()
    return str(value).strip(), "" if group is None else str(group), fold


def _fold_of(sample: _Sample, named: NamedColumns, shard: _Shard) -> str | None:
    """Return the user's own fold of a training sample; a DataError where it lacks one."""
    if not named.fold:
        return None
    return parse_fold(sample.fold, named.fold, f"{shard.path}: {sample.key}")


def _read_text(shard: _Shard, place: tuple[int, int], where: str) -> str:
    if place[1] > MAX_LABEL_BYTES:
        raise DataError("the label of a sample is too long", where=where, got=f"{place[1]:,} bytes")
    try:
        return read_part(shard.path, *place).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError("the label of a sample is not UTF-8", where=where, got=error) from None
