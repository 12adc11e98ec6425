"""JSON files as typed records, and the small files of a run: run.json, ledger.json, done.json.

Records are frozen, refuse unknown keys, and are written with the keys that were set. A file that
another version wrote, or that is damaged, is one line of error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from threefold.errors import DamagedFileError, RunError
from threefold.json_files import finite_json, read_json

CHECKSUM: Final = "sha256"
"""Key of the checksum in a file. A file without one is read, too."""
VERSION: Final = 1
"""Version of the files of a run, raised when an older reader would misread them."""


class Record(BaseModel):
    """A frozen part of a JSON file that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @classmethod
    def parse(cls, tree: object, where: object) -> Self:
        """Check plain values, as read from JSON.

        Args:
            tree: the values.
            where: the file or source, for the error.

        Raises:
            DamagedFileError: a key is missing or unknown, or a value is of the wrong type.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "missing":
                raise DamagedFileError("the file lacks a key", where=where, expected=key) from None
            expected = first.get("ctx", {}).get("expected", first["msg"])
            raise DamagedFileError(
                "the file is damaged",
                where=where,
                expected=f"{key}: {expected}",
                got=f"{first['input']!r:.80}",
            ) from None

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON, without the keys that were never set."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values, which are not checked again."""
        return self.model_copy(update=changes)


class SealedRecord(Record):
    """A record that is a whole file, written with a checksum by `seal`."""

    @classmethod
    def parse(cls, tree: object, where: object) -> Self:
        """Check plain values, as read from JSON.

        Raises:
            DamagedFileError: the values do not have their checksum, or are no such record.
        """
        if not isinstance(tree, Mapping):
            return super().parse(tree, where)
        values = {key: value for key, value in tree.items() if key != CHECKSUM}
        if tree.get(CHECKSUM, checksum(values)) != checksum(values):
            raise DamagedFileError(
                "the file is damaged",
                where=where,
                expected="the values that it was written with",
                got="others, which do not have its checksum",
            )
        return super().parse(values, where)


class VersionedRecord(SealedRecord):
    """A sealed record with the version of its layout."""

    version: int

    @classmethod
    def parse(cls, tree: object, where: object) -> Self:
        """Check plain values, as read from JSON.

        Raises:
            RunError: the file has another version, or is damaged.
        """
        version = tree.get("version") if isinstance(tree, Mapping) else None
        if version != VERSION:
            raise RunError(
                "the file has another version",
                where=where,
                expected=f"version {VERSION}",
                got=f"version {version}" if version is not None else "no version",
                fix="use the version of threefold that wrote it, or train the run again",
            )
        return super().parse(tree, where)


def seal(tree: dict[str, Any]) -> dict[str, Any]:
    """Return plain values with their checksum, which `SealedRecord.parse` compares."""
    return {**tree, CHECKSUM: checksum(tree)}


def read_choices(path: Path) -> dict[str, str]:
    """Read texts by name, which were written with `seal`.

    Raises:
        DamagedFileError: the file is missing or damaged.
        RunError: it cannot be read.
    """
    tree = read_json(path)
    values = {k: v for k, v in tree.items() if k != CHECKSUM} if isinstance(tree, dict) else None
    if values is None or tree.get(CHECKSUM, checksum(values)) != checksum(values):
        raise DamagedFileError("the file is damaged", where=path, expected="its checksum")
    return {name: str(value) for name, value in values.items()}


def checksum(tree: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, the same before and after they were a JSON file."""
    plain = json.loads(json.dumps(finite_json(tree), default=float))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class Opening(Record):
    """One opening of the test rows: when, by which verb, how many rows."""

    at: str
    by: str
    rows: int


class FirstOpening(Opening):
    """The first opening of the test rows, and how often they were opened in all."""

    times: int


class TestLedger(VersionedRecord):
    """ledger.json: every opening of a run's test rows."""

    __test__ = False  # not a test class

    test_opened: tuple[Opening, ...]

    def first(self) -> FirstOpening | None:
        """Return the first opening and the number of openings; None if there was none.

        An export does not count: it compares a file with the run and tells no score.
        """
        openings = [opening for opening in self.test_opened if opening.by != "export"]
        if not openings:
            return None
        first = openings[0]
        return FirstOpening(at=first.at, by=first.by, rows=first.rows, times=len(openings))


class RoleCounts(Record):
    """Number of rows of a fold in each role."""

    fit: int
    select: int
    score: int


class RunInfo(VersionedRecord):
    """run.json: the data, versions and machine of a run.

    Attributes:
        digest: of the recipe.
        data: SHA-256 of the names and labels of the images.
        contents: SHA-256 of their contents; empty in a run that did not record it.
        folds: number of folds, without the refit.
        skipped: images that could not be read, with the reason.
        roles: number of rows by fold and role.
        left_out: why the run goes on without some members of its recipe, by their names.
    """

    digest: str
    data: str
    contents: str = ""
    created: str
    versions: dict[str, str]
    hardware: str
    threads: int
    commit: str
    classes: tuple[str, ...]
    n_train: int
    n_test: int
    folds: int
    notes: tuple[str, ...]
    skipped: tuple[str, ...]
    roles: dict[str, RoleCounts]
    left_out: dict[str, str] = {}


class JobRecord(SealedRecord):
    """done.json: a finished job, how long it took, and the SHA-256 of its files."""

    job: dict[str, Any]
    seconds: float
    files: dict[str, str]


class BackboneRecord(Record):
    """backbones/<key>.json: a frozen backbone of the run, and the SHA-256 of its file."""

    backbone: str
    weights: str
    sha256: str


class DuplicateRecord(Record):
    """A pair of equal or near-equal images; see `data.leakage.Duplicate`."""

    a: str
    b: str
    distance: float
    same_label: bool | None
    same_part: bool | None


class DuplicatesRecord(SealedRecord):
    """duplicates.json: the copies among a run's images, or why none were searched for."""

    count: int
    pairs: tuple[DuplicateRecord, ...]
    note: str
