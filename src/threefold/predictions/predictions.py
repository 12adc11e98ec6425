"""Predictions: the members' probabilities for labelled rows, and their provenance.

Training ends here; ensembles, statistics and reports start from here. Files are .npz without
pickle: strings are fixed-width unicode arrays and the provenance is one JSON string. A file from
another program needs only `probs` and `labels`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError, shorten
from threefold.files import write_arrays
from threefold.names import find_repeated
from threefold.predictions.array_files import detect_format, read_npz
from threefold.predictions.checks import check_labels, check_probs
from threefold.predictions.ledger import FIT, SCORE, SELECT, TEACH, Ledger

Protocol = Literal["honest", "paper", "taught"]
Kind = Literal["oof", "test", "foreign"]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Probabilities of m members for n rows and k classes, with labels and provenance.

    Everything is checked on construction, and the arrays are read-only.

    Attributes:
        probs: (m, n, k) float32, rows sum to 1.
        labels: (n,) int64, class numbers.
        ids: n unique names of the rows.
        classes: k class names.
        members: m unique member names.
        groups: n names of what must stay in one fold (patient, signer), or None.
        protocol: honest = nothing was chosen on these rows; paper = checkpoints were chosen on
            them; taught = a student whose teachers learned from the labels of these rows.
        kind: oof = out-of-fold rows, test = a test split, foreign = of unknown origin.
        folds: (n,) int64, the fold that scored each row, -1 where that does not apply; or None.
        roles: (f, n) int8, how the networks of each fold used each row: a sum of ledger.FIT,
            SELECT, SCORE and TEACH; or None.

    Raises:
        DataError: an argument is wrong, arguments contradict each other, or a row is scored by
            networks that saw it.
    """

    probs: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    members: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    protocol: Protocol = "honest"
    kind: Kind = "foreign"
    folds: np.ndarray | None = None
    roles: np.ndarray | None = None

    def __post_init__(self) -> None:
        probs = check_probs(self.probs, 3).astype(np.float32, copy=False)
        m, n, k = probs.shape
        self._set("probs", _read_only(probs))
        self._set("labels", _read_only(check_labels(self.labels, n, k)))
        if self.folds is not None:
            self._set("folds", _read_only(_check_folds(self.folds, n)))
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
            self._set("roles", _read_only(_check_roles(self.roles, self.folds, n)))
            self.ledger()  # refuses rows that are scored by networks that saw them

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

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def save(self, path: str | Path) -> None:
        """Write an .npz file atomically; `load` returns the same bits.

        Raises:
            RunError: the file cannot be written.
        """
        arrays: dict[str, np.ndarray] = {"probs": self.probs, "labels": self.labels}
        provenance = json.dumps({"protocol": self.protocol, "kind": self.kind})
        arrays["provenance"] = np.array(provenance)
        for name in ("ids", "classes", "members", "groups"):
            if getattr(self, name) is not None:
                arrays[name] = np.array(getattr(self, name), dtype=np.str_)
        for name in ("folds", "roles"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        write_arrays(Path(path), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read an .npz file written by `save` or by another program.

        `probs` (m, n, k) or (n, k) and `labels` (n,) are required. Missing names are filled in by
        `default_names`; the default kind is foreign.

        Raises:
            DataError: the file is missing, is not an .npz, needs pickle, or its arrays are wrong.
        """
        path = Path(path)
        format_name = detect_format(path)
        if format_name != "npz":
            raise DataError(
                "the predictions are not an .npz file",
                where=path,
                got=f"{format_name} content",
                fix="write probs and labels with numpy.savez",
            )
        arrays = read_npz(path)
        try:
            return cls(**_arguments(arrays))
        except DataError as error:
            raise DataError("the predictions cannot be used", where=path, got=error) from None

    @classmethod
    def from_arrays(
        cls,
        probs: npt.ArrayLike,
        labels: npt.ArrayLike,
        classes: Sequence[Any] | np.ndarray | None = None,
        *,
        axes: str = "mnk",
        members: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
    ) -> Predictions:
        """Make predictions from arrays of any program, with the axes named.

        Args:
            probs: probabilities with the axes that `axes` names.
            labels: (n,), names of classes, or the numbers of their columns.
            classes: k names in the order of the columns, by default 0 to k - 1. Where they are
                numbers, as in scikit-learn's `classes_`, labels are such numbers, too.
            axes: a letter for each axis: m members, n rows, k classes. scikit-learn's programs
                often stack answers as "nmk"; "nk" are those of one member.
            members: m names, by default member0, member1, ...
            ids: n names, by default row0000, row0001, ...
            groups: n names of what belongs together, such as a patient.

        Raises:
            DataError: the axes do not fit the array, or an argument is wrong.
        """
        array = np.asarray(probs)
        letters = axes.lower()
        if sorted(letters) not in (["k", "m", "n"], ["k", "n"]) or len(letters) != array.ndim:
            raise DataError(
                "the axes do not fit the array",
                expected=f'{array.ndim} letters such as "mnk", "nmk" or "nk": m members, n rows, '
                "k classes",
                got=repr(axes),
            )
        if "m" not in letters:
            letters, array = f"m{letters}", array[None]
        array = array.transpose([letters.index(axis) for axis in "mnk"])
        defaults = default_names(*check_probs(array, 3).shape)
        given = {"classes": classes, "members": members, "ids": ids}
        names = {
            name: defaults[name] if value is None else tuple(map(str, value))
            for name, value in given.items()
        }
        # Numbers as classes are values of labels, as classes_ of scikit-learn is.
        are_values = classes is not None and not all(isinstance(name, str) for name in classes)
        return cls(
            probs=array,
            labels=_label_numbers(labels, names["classes"], are_values),
            groups=None if groups is None else tuple(map(str, groups)),
            classes=names["classes"],
            members=names["members"],
            ids=names["ids"],
        )

    def select(self, names: Sequence[str]) -> Predictions:
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
        return replace(
            self,
            probs=self.probs[[self.members.index(name) for name in names]],
            members=tuple(names),
        )

    def rows(self, index: npt.ArrayLike) -> Predictions:
        """Only these rows, in this order.

        Args:
            index: row numbers, or one boolean per row.

        Raises:
            DataError: a row does not exist or is repeated, or there are no rows.
        """
        try:
            chosen = np.atleast_1d(np.arange(len(self))[np.asarray(index)])
        except IndexError as error:
            expected = f"row numbers below {len(self)}, or {len(self)} booleans"
            raise DataError("no such rows", expected=expected, got=error) from None
        return replace(
            self,
            probs=self.probs[:, chosen],
            labels=self.labels[chosen],
            ids=tuple(self.ids[i] for i in chosen),
            groups=None if self.groups is None else tuple(self.groups[i] for i in chosen),
            folds=None if self.folds is None else self.folds[chosen],
            roles=None if self.roles is None else self.roles[:, chosen],
        )


def _label_numbers(
    labels: npt.ArrayLike, classes: Sequence[str], are_values: bool = False
) -> np.ndarray:
    """Return labels as numbers of columns, where they are classes; others are checked later."""
    array = np.asarray(labels)
    if array.dtype.kind not in "UO" and not are_values:
        return array
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted({str(label) for label in array.ravel()} - set(numbers))
    if unknown:
        raise DataError(
            "labels are no class", expected=shorten(classes), got=shorten(map(repr, unknown))
        )
    return np.array([numbers[str(label)] for label in array.ravel()]).reshape(array.shape)


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


def _arguments(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of Predictions from a file's arrays, with defaults for missing names."""
    missing = [name for name in ("probs", "labels") if name not in arrays]
    if missing:
        raise DataError(
            "arrays are missing",
            expected="probs (m, n, k) or (n, k), and labels (n,)",
            got=f"no {' and no '.join(missing)}",
        )
    probs = arrays["probs"][None] if arrays["probs"].ndim == 2 else arrays["probs"]
    arguments: dict[str, Any] = {"probs": probs, **default_names(*check_probs(probs, 3).shape)}
    for name in ("ids", "classes", "members", "groups"):
        if name in arrays:
            arguments[name] = tuple(map(str, np.atleast_1d(arrays[name])))
    for name in ("labels", "folds", "roles"):
        if name in arrays:
            arguments[name] = arrays[name]
    return arguments | parse_provenance(arrays.get("provenance"))


def parse_provenance(array: np.ndarray | None, where: str = "") -> dict[str, Any]:
    """Protocol and kind from a file's JSON string; empty if the file has none.

    Raises:
        DataError: the string is not JSON with these two keys.
    """
    if array is None:
        return {}
    try:
        tree = json.loads(str(array))
        return {"protocol": tree["protocol"], "kind": tree["kind"]}
    except (ValueError, KeyError, TypeError):
        raise DataError(
            "the provenance is not readable",
            where=where,
            expected='JSON with "protocol" and "kind"',
            got=str(array)[:80],
        ) from None


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


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written to: pruning in place would silently change later averages."""
    view = array.view()
    view.flags.writeable = False
    return view
