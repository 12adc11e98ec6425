"""Features on disk, by backbone and by image, shared between runs.

A store is a folder of parts. A part is an .npy file (n, ...) and, written after it, a .json
with the images of its rows and the SHA-256 of the file. So a killed process leaves whole parts, and
a damaged part is found and computed again. The stores of all backbones lie in one cache folder with
a limit; those not used for longest are deleted first.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import DTypeLike

from threefold.errors import OutOfMemoryError, RecipeError, RunError
from threefold.files import delete_leftovers, is_abandoned, sha256, write_bytes
from threefold.json_files import write_json
from threefold.machine import available_memory, folder_size, free_disk
from threefold.training.stored_array import StoredArray

LIMIT_VARIABLE: Final = "THREEFOLD_CACHE_GB"
"""Environment variable: largest size of the cached features in GB (0 = nothing is kept)."""

LIMIT_GB: Final = 10.0
"""The limit where the variable is not set."""


def cache_limit() -> int:
    """Return the largest size of the cached features in bytes.

    Raises:
        RecipeError: the environment variable is not a number.
    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        gigabytes = float(text) if text else LIMIT_GB
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 1e6:
        raise RecipeError(
            "not a size",
            where=f"environment variable {LIMIT_VARIABLE}",
            expected="gigabytes, for example 10",
            got=text,
        )
    return int(gigabytes * 1e9)


class FeatureStore:
    """The cached features of one backbone in one form, at one size; or squares of images.

    Args:
        folder: the folder of all stores.
        key: name of this one, a hash of everything that its features depend on but the image.
        dtype: of the arrays.
    """

    def __init__(self, folder: Path, key: str, dtype: DTypeLike = np.float16) -> None:
        self.folder, self.dtype = folder / key, np.dtype(dtype)
        self._parts: dict[str, np.ndarray | StoredArray] = {}
        self._rows: dict[str, tuple[str, int]] = {}
        self._seen: set[str] = set()

    def __contains__(self, image: str) -> bool:
        """Whether there are features of an image, as of the last look at the disk."""
        return image in self._rows

    def missing(self, images: Sequence[str]) -> list[str]:
        """Return the images without features, each once, in the order of their first appearance."""
        self._refresh()
        return [image for image in dict.fromkeys(images) if image not in self._rows]

    def read(self, images: Sequence[str]) -> np.ndarray:
        """Return the features of some images, (n, ...); none of them may be missing.

        Raises:
            RunError: they were removed or changed while they are in use.
        """
        if not images:
            return np.empty((0, *self._shape), self.dtype)
        places = [self._rows[image] for image in images]
        features = np.empty((len(images), *self._shape), self.dtype)
        by_part: dict[str, list[int]] = {}
        for position, (part, _) in enumerate(places):
            by_part.setdefault(part, []).append(position)
        for part, positions in by_part.items():
            features[positions] = self._read(part, np.array([places[i][1] for i in positions]))
        return features

    def _read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Read some rows of a part.

        Raises:
            RunError: it was removed or changed while it is in use.
        """
        part = self._parts[name]
        if isinstance(part, np.ndarray):
            return np.asarray(part[rows])
        try:
            return part.read(rows)
        except (OSError, ValueError) as error:
            raise RunError(
                "cached features were removed or changed while they are in use",
                where=part.path,
                got=error,
                fix="run the same command again, which computes them anew",
            ) from None

    @property
    def _shape(self) -> tuple[int, ...]:
        """Shape of one image's features."""
        return next((part.shape[1:] for part in self._parts.values()), ())

    def write(self, images: Sequence[str], features: np.ndarray) -> None:
        """Add a part.

        Args:
            images: the images of its rows.
            features: (n, ...).

        Raises:
            RunError: the disk is full or the folder cannot be written.
        """
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(features), allow_pickle=False)
        data = buffer.getvalue()
        name = hashlib.sha256("/".join(images).encode()).hexdigest()[:24]
        write_bytes(self.folder / f"{name}.npy", data)
        record = {"sha256": hashlib.sha256(data).hexdigest(), "images": list(images)}
        write_json(self.folder / f"{name}.json", record)
        try:
            self._add(name, images)
        except (OSError, ValueError) as error:  # another process has deleted it, to make room
            raise RunError("cannot read", where=self.folder / f"{name}.npy", got=error) from None

    def keep(self, images: Sequence[str], features: np.ndarray) -> None:
        """Add a part that stays in memory, where it cannot be written."""
        name = f"memory {len(self._parts)}"
        self._parts[name] = features
        self._rows.update({image: (name, row) for row, image in enumerate(images)})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from computing the same features at the same time."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".lock")
        with suppress(OSError, NotImplementedError, Timeout):  # without a lock the work is doubled
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            self._sweep()
        try:
            yield
        finally:
            lock.release()

    def _sweep(self) -> None:
        """Delete what killed processes have left, and nothing that a living one may be writing.

        The lock does not say so: not every file system has locks, or those of other machines, and
        to make room another process may have deleted this store with its lock.
        """
        delete_leftovers(self.folder)
        for path in self.folder.glob("*.npy"):
            if not path.with_suffix(".json").exists() and is_abandoned(path):
                with suppress(OSError):
                    path.unlink()

    def touch(self) -> None:
        """Note that the store is in use."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".used").touch()

    def _refresh(self) -> None:
        """Find the parts written since the last look, and drop what is damaged."""
        for record in sorted(self.folder.glob("*.json")):
            if record.stem in self._seen:
                continue
            images = _intact(record)
            try:
                if images is not None:
                    self._add(record.stem, images)
                    continue
            except (OSError, ValueError):
                pass
            for path in (record, record.with_suffix(".npy")):
                with suppress(OSError):
                    path.unlink()

    def _add(self, name: str, images: Sequence[str]) -> None:
        self._parts[name] = StoredArray(self.folder / f"{name}.npy")
        self._rows.update({image: (name, row) for row, image in enumerate(images)})
        self._seen.add(name)


def _intact(record: Path) -> list[str] | None:
    """Return the images of a part; None if it is incomplete or damaged."""
    try:
        tree = json.loads(record.read_text(encoding="utf-8"))
        images, expected = list(tree["images"]), tree["sha256"]
        if sha256(record.with_suffix(".npy")) == expected:
            return images
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def make_room(folder: Path, needed: int, limit: int, used: Sequence[str] = ()) -> bool:
    """Delete the stores not used for longest until `needed` bytes fit below the limit.

    Args:
        folder: the folder of all stores.
        needed: bytes to be written.
        limit: largest size of all stores together, in bytes.
        used: keys of stores that must stay.

    Returns:
        Whether they fit below the limit and on the disk.
    """
    stores = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    sizes = {path: folder_size(path) for path in stores}
    total = sum(sizes.values())
    for path in sorted(stores, key=_last_use):
        if total + needed <= limit and needed <= free_disk(folder):
            break
        if path.name not in used:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]
    return total + needed <= limit and needed <= free_disk(folder)


def _last_use(folder: Path) -> float:
    try:
        return (folder / ".used").stat().st_mtime
    except OSError:
        return 0.0


def check_memory(needed: int, what: str) -> None:
    """Refuse work that the memory cannot hold.

    Raises:
        OutOfMemoryError: more is needed than can be taken.
    """
    available = available_memory()
    if needed > available:
        raise OutOfMemoryError(
            "the features do not fit into memory",
            where=what,
            expected=f"at most {available / 1e9:.1f} GB",
            got=f"{needed / 1e9:.1f} GB",
            fix='set head.sequence = "pooled", a smaller img_size or data.limit_per_class',
        )
