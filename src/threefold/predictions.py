"""Predictions: the members' probabilities and what is known about them, where training ends and all the rest begins.

Ensembles, statistics and reports see only this. Files are .npz without pickle; strings are fixed-width unicode arrays,
the provenance is one JSON string. A file from elsewhere needs only `probs` and `labels`.
"""

from __future__ import annotations

import difflib
import json
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError
from threefold.files import write_arrays
from threefold.ledger import FIT, SCORE, SELECT, TEACH, Ledger
from threefold.predictions__checks import check_labels, check_probs

Protocol = Literal["honest", "paper", "taught"]
Kind = Literal["oof", "test", "foreign"]

_DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    SyntaxError,
    tokenize.TokenError,
)
"""What numpy and zipfile raise on files that are cut, altered, encrypted, or claim absurd sizes; the last two for headers."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Probabilities of m members for n rows and k classes, with labels and provenance. Checked; arrays are read-only.

    Attributes:
        probs: (m, n, k) float32, rows sum to 1.
        labels: (n,) int64, class numbers.
        ids: n unique names of the rows.
        classes: k class names.
        members: m unique member names.
        groups: n names of what must stay in one fold (patient, signer), or None.
        protocol: honest = nothing was chosen on these rows; paper = checkpoints were; taught = a student's teachers learned from
            the labels of these rows.
        kind: oof = out-of-fold rows, test = a test split, foreign = from elsewhere, nothing known.
        folds: (n,) int64, the fold that scored each row, -1 where that does not apply; or None.
        roles: (f, n) int8, what each fold's networks did with each row: the sum of ledger.FIT, SELECT, SCORE and
            TEACH (its teacher learned from the row); or None.

    Raises:
        DataError: the parts are wrong or contradict each other, or a row is answered by networks that saw it.
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
        for name, count, unique in (
            ("ids", n, True),
            ("classes", k, True),
            ("members", m, True),
            ("groups", n, False),
        ):
            if (values := getattr(self, name)) is not None:
                self._set(name, _check_names(name, values, count, unique))
        for name, allowed in (("protocol", get_args(Protocol)), ("kind", get_args(Kind))):
            if getattr(self, name) not in allowed:
                raise DataError(
                    f"unknown {name}", expected=" or ".join(allowed), got=getattr(self, name)
                )
        if self.roles is not None:
            self._set("roles", _read_only(_check_roles(self.roles, self.folds, n)))
            self.ledger()

    def ledger(self) -> Ledger:
        """What the members' networks saw of these rows; empty where that is not known (`roles` is None).

        Raises:
            DataError: under the honest protocol, a row is answered by networks that saw it.
        """
        ledger = Ledger(len(self), self.kind)
        if self.roles is not None and self.folds is not None:
            for fold, roles in enumerate(self.roles):
                answers = self.folds == fold
                ledger.declare("weights of the members", (roles & FIT) > 0, answers)
                chosen = (roles & SELECT) > 0
                ledger.declare(
                    "checkpoints and stages", chosen, answers, apparent=self.protocol == "paper"
                )
                taught = (roles & TEACH) > 0
                if taught.any():
                    ledger.declare(
                        "teachers of the student",
                        taught,
                        answers,
                        apparent=self.protocol != "honest",
                    )
        return ledger

    @property
    def parts(self) -> np.ndarray | None:
        """The folds as parts of a cross-fit; None where there are not two of them at least."""
        return self.folds if self.folds is not None and len(np.unique(self.folds)) > 1 else None

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def save(self, path: str | Path) -> None:
        """Write an .npz, whole or not at all; `load` gives back the same bits.

        Raises:
            RunError: the file cannot be written.
        """
        strings = {
            "ids": self.ids,
            "classes": self.classes,
            "members": self.members,
            "groups": self.groups,
        }
        arrays = {
            name: np.array(values, dtype=np.str_)
            for name, values in strings.items()
            if values is not None
        }
        arrays |= {
            name: value for name in ("folds", "roles") if (value := getattr(self, name)) is not None
        }
        provenance = json.dumps({"protocol": self.protocol, "kind": self.kind})
        write_arrays(
            Path(path),
            probs=self.probs,
            labels=self.labels,
            provenance=np.array(provenance),
            **arrays,
        )

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read an .npz written by `save` or by any other program.

        Required are `probs` (m, n, k) or (n, k) and `labels` (n,). Defaults: ids row0000.., classes 0..k-1,
        members member0.., kind foreign.

        Raises:
            DataError: the file is missing, is not an .npz, needs pickle, or its arrays are wrong.
        """
        arrays = _read_npz(Path(path), [field.name for field in fields(cls)] + ["provenance"])
        try:
            return cls(**_complete(arrays))
        except DataError as error:
            raise DataError("the predictions cannot be used", where=path, got=error) from None

    def select(self, names: Sequence[str]) -> Predictions:
        """Only these members, in this order.

        Raises:
            DataError: an unknown member (the message names the nearest), or no member.
        """
        for name in names:
            if name not in self.members:
                inside = [member for member in self.members if name.lower() in member.lower()]
                near = (
                    inside
                    or difflib.get_close_matches(name, self.members, cutoff=0.4)
                    or self.members
                )
                raise DataError("no such member", where=name, expected=f"one of {', '.join(near)}")
        if tuple(names) == self.members:
            return self
        return replace(
            self,
            probs=self.probs[[self.members.index(name) for name in names]],
            members=tuple(names),
        )

    def rows(self, index: npt.ArrayLike) -> Predictions:
        """Only these rows, in this order; `index` holds row numbers, or one boolean per row.

        Raises:
            DataError: a row that does not exist, twice the same row, or no row.
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


def _read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that the file has, without ever unpickling."""
    if not path.is_file():
        raise DataError(
            "cannot read the predictions",
            where=path,
            got="a folder" if path.is_dir() else "no such file",
        )
    fix = "write probs and labels with numpy.savez"
    if not zipfile.is_zipfile(path):
        raise DataError("the predictions are not an .npz file", where=path, fix=fix)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in names if name in file.files}
    except _DAMAGED as error:
        if "allow_pickle" in str(error):
            fix = "save names as plain string arrays: numpy.array(names, dtype=str)"
            raise DataError(
                "the predictions hold Python objects, which are never unpickled",
                where=path,
                fix=fix,
            ) from None
        got = f"{type(error).__name__}: {str(error)[:120]}"
        raise DataError("the predictions file is damaged", where=path, got=got, fix=fix) from None


def _complete(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of Predictions from a file's arrays, with defaults for what another program did not write."""
    missing = [name for name in ("probs", "labels") if name not in arrays]
    if missing:
        expected = "probs (m, n, k) or (n, k), and labels (n,)"
        raise DataError(
            "arrays are missing", expected=expected, got=f"no {' and no '.join(missing)}"
        )
    probs = arrays["probs"][None] if arrays["probs"].ndim == 2 else arrays["probs"]
    m, n, k = check_probs(probs, 3).shape
    width = max(4, len(str(n - 1)))  # so that sorted ids are in row order
    tree: dict[str, Any] = {
        "ids": tuple(f"row{i:0{width}d}" for i in range(n)),
        "classes": tuple(map(str, range(k))),
        "members": tuple(f"member{i}" for i in range(m)),
    }
    for name in {"ids", "classes", "members", "groups"} & arrays.keys():
        tree[name] = tuple(map(str, np.atleast_1d(arrays[name])))
    tree |= {name: arrays[name] for name in ("labels", "folds", "roles") if name in arrays}
    return tree | {"probs": probs} | read_provenance(arrays.get("provenance"))


def read_provenance(array: np.ndarray | None, where: str = "") -> dict[str, Any]:
    """Protocol and kind from a file's JSON string; nothing where another program wrote the file.

    Raises:
        DataError: it is not such a string.
    """
    if array is None:
        return {}
    try:
        tree = json.loads(str(array))
        return {"protocol": tree["protocol"], "kind": tree["kind"]}
    except (ValueError, KeyError, TypeError):
        expected = 'JSON with "protocol" and "kind"'
        raise DataError(
            "the provenance is not readable", where=where, expected=expected, got=str(array)[:80]
        ) from None


def _check_names(name: str, values: Iterable[str], count: int, unique: bool) -> tuple[str, ...]:
    """Names as a tuple of the right length, all different where they must be."""
    names = tuple(map(str, values))
    if len(names) != count:
        raise DataError(
            f"{name} do not match the probabilities", expected=f"{count} names", got=len(names)
        )
    if unique and len(set(names)) < count:
        raise DataError(
            f"{name} are not unique", got=f"{Counter(names).most_common(1)[0][0]} twice or more"
        )
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
        got = f"{array.shape} {array.dtype}" + ("" if folds is not None else ", no folds")
        raise DataError(
            "roles have the wrong shape",
            expected=f"(folds, {n}) integers, and folds ({n},)",
            got=got,
        )
    if (folds >= len(array)).any():
        raise DataError(
            "roles are missing", expected=f"{int(folds.max()) + 1} folds", got=len(array)
        )
    if ((array < 0) | (array > FIT + SELECT + SCORE + TEACH)).any():
        told = "roles are sums of 1 (fit), 2 (select), 4 (score) and 8 (teach)"
        raise DataError(told, got=f"{array.min()} to {array.max()}")
    return array.astype(np.int8)


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written through: pruning in place would silently change later averages."""
    view = array.view()
    view.flags.writeable = False
    return view
