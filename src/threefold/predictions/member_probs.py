"""What predictions of one label and of several labels per image share: names, folds and roles."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError
from threefold.files import write_bytes
from threefold.names import find_repeated
from threefold.npz_files import array_bytes
from threefold.predictions.array_files import detect_format
from threefold.predictions.ledger import FIT, SCORE, SELECT, TEACH, Ledger
from threefold.scratch import take_members, take_rows

Protocol = Literal["honest", "paper", "taught"]
Kind = Literal["oof", "test", "foreign"]


class MemberProbs:
    """Methods of a frozen dataclass of members' probabilities; see `Predictions` for its fields.

    The dataclass calls `_check_shared` once its own arrays are set.
    """

    TASK: ClassVar[str]
    """multiclass or multilabel."""
    TRUTH: ClassVar[str]
    """Name of the field with the right answers, whose first axis are the rows."""

    probs: np.ndarray
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    members: tuple[str, ...]
    groups: tuple[str, ...] | None
    protocol: Protocol
    kind: Kind
    folds: np.ndarray | None
    roles: np.ndarray | None

    def _check_shared(self) -> None:
        """Check names, folds, roles and provenance against the shape of the probabilities."""
        m, n, k = self.probs.shape
        if self.folds is not None:
            self._set("folds", read_only(_check_folds(self.folds, n)))
        self._set("ids", _check_names("ids", self.ids, n))
        self._set("classes", _check_names("classes", self.classes, k))
        self._set("members", _check_names("members", self.members, m))
        if self.groups is not None:
            self._set("groups", _check_names("groups", self.groups, n, unique=False))
        for name, allowed in (("protocol", get_args(Protocol)), ("kind", get_args(Kind))):
            if getattr(self, name) not in allowed:
                raise DataError(
                    f"unknown {name}", expected=" or ".join(allowed), got=getattr(self, name)
                )
        if self.roles is not None:
            self._set("roles", read_only(_check_roles(self.roles, self.folds, n)))
            self.ledger()  # refuses rows that are scored by networks that saw them

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.probs.shape[1])

    def ledger(self) -> Ledger:
        """Record what the members' networks saw of these rows; empty if `roles` is None.

        Raises:
            DataError: under the honest protocol, a row is scored by networks that saw it.
        """
        ledger = Ledger(len(self), self.kind)
        if self.roles is None or self.folds is None:
            return ledger
        for fold, roles in enumerate(self.roles):
            scored = self.folds == fold
            ledger.declare("weights of the members", (roles & FIT) > 0, scored)
            ledger.declare(
                "checkpoints and stages",
                (roles & SELECT) > 0,
                scored,
                apparent=self.protocol == "paper",
            )
            taught = (roles & TEACH) > 0
            if taught.any():
                ledger.declare(
                    "teachers of the student", taught, scored, apparent=self.protocol != "honest"
                )
        return ledger

    @property
    def parts(self) -> np.ndarray | None:
        """The folds as parts of a cross-fit, or None if there are fewer than two of them."""
        if self.folds is None or len(np.unique(self.folds)) < 2:
            return None
        return self.folds

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def save(self, path: str | Path) -> None:
        """Write an .npz file atomically; `load` returns the same bits.

        Raises:
            RunError: the file cannot be written.
        """
        write_bytes(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the content of an .npz file of `save`."""
        provenance: dict[str, str] = {"protocol": self.protocol, "kind": self.kind}
        if self.TASK != "multiclass":
            provenance["task"] = self.TASK
        arrays: dict[str, np.ndarray] = {
            "probs": self.probs,
            self.TRUTH: getattr(self, self.TRUTH),
            "provenance": np.array(json.dumps(provenance)),
        }
        for name in ("ids", "classes", "members", "groups"):
            if getattr(self, name) is not None:
                arrays[name] = np.array(getattr(self, name), dtype=np.str_)
        for name in ("folds", "roles"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        return array_bytes(**arrays)

    def select(self, names: Sequence[str]) -> Self:
        """Only these members, in this order.

        Raises:
            DataError: a name is unknown (the message suggests the nearest), or there are no names.
        """
        for name in names:
            if name not in self.members:
                near = [member for member in self.members if name.lower() in member.lower()]
                if not near:
                    near = difflib.get_close_matches(name, self.members, cutoff=0.4)
                expected = ", ".join(near or self.members)
                raise DataError("no such member", where=name, expected=f"one of {expected}")
        if tuple(names) == self.members:
            return self
        return replace(  # type: ignore[type-var]
            self,
            probs=take_members(self.probs, [self.members.index(name) for name in names]),
            members=tuple(names),
        )

    def rows(self, index: npt.ArrayLike | slice) -> Self:
        """Only these rows, in this order.

        Args:
            index: row numbers, a slice of them, or one boolean per row.

        Raises:
            DataError: a row does not exist or is repeated, or there are no rows.
        """
        try:
            at = index if isinstance(index, slice) else np.asarray(index)
            chosen = np.atleast_1d(np.arange(len(self))[at])
        except IndexError as error:
            expected = f"row numbers below {len(self)}, or {len(self)} booleans"
            raise DataError("no such rows", expected=expected, got=error) from None
        changes: dict[str, Any] = {self.TRUTH: getattr(self, self.TRUTH)[chosen]}
        return replace(  # type: ignore[type-var]
            self,
            probs=take_rows(self.probs, chosen),
            ids=tuple(self.ids[i] for i in chosen),
            groups=None if self.groups is None else tuple(self.groups[i] for i in chosen),
            folds=None if self.folds is None else self.folds[chosen],
            roles=None if self.roles is None else self.roles[:, chosen],
            **changes,
        )


def default_ids(n: int) -> tuple[str, ...]:
    """Ids for n rows without ids: row0000, row0001, ... Their sorted order is the row order."""
    width = max(4, len(str(n - 1)))
    return tuple(f"row{i:0{width}d}" for i in range(n))


def default_names(m: int, n: int, k: int) -> dict[str, tuple[str, ...]]:
    """Names for what a file leaves unnamed: `default_ids`, classes 0..k-1, members member0.."""
    return {
        "ids": default_ids(n),
        "classes": tuple(map(str, range(k))),
        "members": tuple(f"member{i}" for i in range(m)),
    }


def check_npz(path: Path, truth: str) -> None:
    """Check that a file is an .npz.

    Raises:
        DataError: it is missing or of another format; `truth` names its second array.
    """
    format_name = detect_format(path)
    if format_name != "npz":
        raise DataError(
            "the predictions are not an .npz file",
            where=path,
            got=f"{format_name} content",
            fix=f"write probs and {truth} with numpy.savez",
        )


def file_arguments(record: type[MemberProbs], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the arguments of a record from a file's arrays, with defaults for missing names.

    Raises:
        DataError: arrays are missing, or the file is of another task.
    """
    provenance = parse_provenance(arrays.get("provenance"), task=record.TASK)
    truth = record.TRUTH
    missing = [name for name in ("probs", truth) if name not in arrays]
    if missing:
        shape = "(n,)" if truth == "labels" else "(n, k)"
        raise DataError(
            "arrays are missing",
            expected=f"probs (m, n, k) or (n, k), and {truth} {shape}",
            got=f"no {' and no '.join(missing)}",
        )
    probs = arrays["probs"][None] if arrays["probs"].ndim == 2 else arrays["probs"]
    arguments: dict[str, Any] = {"probs": probs}
    if probs.ndim == 3:
        arguments |= default_names(*probs.shape)
    for name in ("ids", "classes", "members", "groups"):
        if name in arrays:
            arguments[name] = tuple(map(str, np.atleast_1d(arrays[name])))
    for name in (truth, "folds", "roles"):
        if name in arrays:
            arguments[name] = arrays[name]
    return arguments | provenance


def parse_provenance(
    array: np.ndarray | None, where: str = "", task: str = "multiclass"
) -> dict[str, Any]:
    """Protocol and kind from a file's JSON string; empty if the file has none.

    Args:
        array: the string, as an array of one.
        where: the file, for the error.
        task: what the reader expects: multiclass or multilabel.

    Raises:
        DataError: the string is not JSON with these two keys, or names another task.
    """
    if array is None:
        return {}
    try:
        tree = json.loads(str(array))
        arguments = {"protocol": tree["protocol"], "kind": tree["kind"]}
        written = str(tree.get("task", "multiclass"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            "the provenance is not readable",
            where=where,
            expected='JSON with "protocol" and "kind"',
            got=str(array)[:80],
        ) from None
    if written != task:
        raise wrong_task(written, where)
    return arguments


def wrong_task(written: str, where: object = "") -> DataError:
    """Return the error of predictions of another task than the one that is meant."""
    if written == "multilabel":
        return DataError(
            "the predictions have several labels per image",
            where=where,
            expected="one label per image",
            got=f"task = {written}",
            fix="several labels per image are read by `threefold evaluate`, `compare` and "
            "`report`, and by MultilabelPredictions.load in Python",
        )
    return DataError(
        "the predictions have one label per image",
        where=where,
        expected="several labels per image",
        got=f"task = {written}",
        fix="use Predictions.load",
    )


def _check_names(
    field: str, values: Iterable[str], count: int, unique: bool = True
) -> tuple[str, ...]:
    """Names as a tuple of the right length, without repeats if they must be unique."""
    names = tuple(map(str, values))
    if len(names) != count:
        raise DataError(
            f"{field} do not match the probabilities", expected=f"{count} names", got=len(names)
        )
    repeated = find_repeated(names) if unique else []
    if repeated:
        raise DataError(f"{field} are not unique", got=f"{repeated[0]} twice or more")
    return names


def _check_folds(folds: npt.ArrayLike, n: int) -> np.ndarray:
    array = np.asarray(folds)
    if array.shape != (n,) or array.dtype.kind not in "iu":
        raise DataError(
            "folds have the wrong shape",
            expected=f"({n},) integers",
            got=f"{array.shape} {array.dtype}",
        )
    return array.astype(np.int64)


def _check_roles(roles: npt.ArrayLike, folds: np.ndarray | None, n: int) -> np.ndarray:
    array = np.asarray(roles)
    if array.ndim != 2 or array.shape[1] != n or array.dtype.kind not in "iu" or folds is None:
        raise DataError(
            "roles have the wrong shape",
            expected=f"(folds, {n}) integers, and folds ({n},)",
            got=f"{array.shape} {array.dtype}" + ("" if folds is not None else ", no folds"),
        )
    if (folds >= len(array)).any():
        raise DataError(
            "roles are missing", expected=f"{int(folds.max()) + 1} folds", got=len(array)
        )
    if ((array < 0) | (array > FIT + SELECT + SCORE + TEACH)).any():
        raise DataError(
            "roles are out of range",
            expected="sums of 1 (fit), 2 (select), 4 (score) and 8 (teach)",
            got=f"{array.min()} to {array.max()}",
        )
    return array.astype(np.int8)


def read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written to: pruning in place would silently change later averages."""
    view = array.view()
    view.flags.writeable = False
    return view
