"""What to look at in the data: labels that models contradict, copies of images, file names that tell of groups.

Only reports; nothing is edited, left out or moved. Label errors come from cleanlab's confident learning (Northcutt et al. 2021) on
probabilities of models that have not seen the row. Copies are found by the correlation of small versions of the images.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.fft import dctn

from threefold.errors import DataError, RunError
from threefold.files import write_bytes
from threefold.predictions import Predictions
from threefold.predictions__checks import check_probs
from threefold.predictions__results_schema import Audit, SuspectLabel

NEAR: Final = 0.01
"""Largest distance, 1 - correlation, of near copies (see `find_duplicates`)."""

LISTED: Final = 100
"""Suspects and pairs of copies in results.json; a CSV file has every suspect."""

_SIDE: Final = 32
"""Pixels of the grey square that is compared."""

_KEPT: Final = 8
"""Frequencies kept in each direction: all that remains the same when an image is resized or compressed again."""

_FLAT: Final = 1.0
"""Contrast (standard deviation of grey values of 255) below which an image has nothing to compare."""

_BLOCK: Final = 1024

_SPLIT: Final = re.compile(r"^(?:train|training|val|valid|validation|test)/")


class Suspect(NamedTuple):
    """A row whose label may be wrong.

    Attributes:
        id: the row.
        label: name of the class that it has.
        suggested: name of the class that the ensemble says.
        score: label quality 0..1, the ensemble's probability of the label; the lowest are the most suspect.
        reason: why, in words.
    """

    id: str
    label: str
    suggested: str
    score: float
    reason: str


class Duplicate(NamedTuple):
    """Two images that look the same.

    Attributes:
        a, b: their ids.
        distance: 0 = equal pixel for pixel; else 1 - correlation.
        same_label: whether their labels agree; None where no labels are known.
        same_part: whether they are in the same part (split or fold); None where no parts are known.
    """

    a: str
    b: str
    distance: float
    same_label: bool | None
    same_part: bool | None


class Duplicates(NamedTuple):
    """Pairs, the closest first, and how many there are in all where only the closest are listed."""

    pairs: list[Duplicate]
    found: int


def find_suspects(
    predictions: Predictions, limit: int | None = None, probs: npt.ArrayLike | None = None
) -> list[Suspect]:
    """Rows whose label is probably wrong, the most suspect first.

    How many is cleanlab's estimate (prune by noise rate), which errs on the side of many where classes are hard to tell
    apart; the order is by the probability of the label, which ranked better than the margin (bench/label_audit.py).

    Args:
        predictions: out-of-fold predictions. On rows that members were trained on, labels look right.
        limit: the most suspects to return; None = all.
        probs: (n, k) the ensemble's probabilities; None = the mean of the members.

    Raises:
        DataError: probabilities of another shape, or a limit below 1.
        RunError: cleanlab is not installed.
    """
    find = _cleanlab("filter").find_label_issues
    mean = predictions.probs.mean(0, dtype=np.float64)
    ensemble = mean if probs is None else check_probs(probs, 2).astype(np.float64)
    if ensemble.shape != mean.shape:
        raise DataError(
            "probabilities are of other rows or classes", expected=mean.shape, got=ensemble.shape
        )
    if limit is not None and limit < 1:
        raise DataError("the limit is 1 or more", got=limit)
    ensemble = ensemble / ensemble.sum(-1, keepdims=True)
    present, labels = np.unique(
        predictions.labels, return_inverse=True
    )  # cleanlab wants every class to have rows
    if len(present) < 2:
        return []
    used = ensemble[:, present].clip(min=np.finfo(np.float32).tiny)
    used /= used.sum(-1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few rows in a class
        flagged = np.asarray(find(labels, used, n_jobs=1))
    quality, top = ensemble[np.arange(len(labels)), predictions.labels], ensemble.argmax(-1)
    rows = [
        row
        for row in np.argsort(quality, kind="stable")
        if flagged[row] and top[row] != predictions.labels[row]
    ]
    return [_suspect(predictions, int(row), int(top[row]), ensemble[row]) for row in rows[:limit]]


def list_suspects(
    predictions: Predictions, probs: npt.ArrayLike | None = None
) -> tuple[list[Suspect], str]:
    """`find_suspects`, or none and why: cleanlab is an extra."""
    try:
        return find_suspects(predictions, probs=probs), ""
    except RunError as error:
        return [], str(error)


def summarize_audit(suspects: Sequence[Suspect], missing: str) -> Audit:
    """Return the first LISTED suspects, their number, and the reason if there was no audit."""
    listed = tuple(SuspectLabel(**suspect._asdict()) for suspect in suspects[:LISTED])
    return Audit(suspects=listed, n_suspects=len(suspects), missing=missing)


def _suspect(predictions: Predictions, row: int, top: int, probs: np.ndarray) -> Suspect:
    label, suggested = predictions.classes[predictions.labels[row]], predictions.classes[top]
    agree, of = int((predictions.probs[:, row].argmax(-1) == top).sum()), len(predictions.members)
    who = "the ensemble" if predictions.kind == "foreign" else "the ensemble that never saw it"
    reason = f"labelled {label}; {who} says {suggested} with {probs[top]:.2f}; {agree} of {of} members agree"
    return Suspect(
        predictions.ids[row], label, suggested, float(probs[predictions.labels[row]]), reason
    )


def write_suspects(path: str | Path, suspects: Iterable[Suspect]) -> None:
    """Write a CSV file (UTF-8): id, label, suggested, score, reason; a row per suspect, in their order.

    Raises:
        RunError: the file cannot be written.
    """
    _write_csv(path, Suspect._fields, suspects)


def write_duplicates(path: str | Path, duplicates: Duplicates) -> None:
    """Write a CSV file (UTF-8): a, b, distance, same_label, same_part; a row per pair.

    Raises:
        RunError: the file cannot be written.
    """
    _write_csv(path, Duplicate._fields, duplicates.pairs)


def find_duplicates(
    images: Iterable[np.ndarray],
    ids: Sequence[str],
    labels: Sequence[object] | np.ndarray | None = None,
    parts: Sequence[object] | np.ndarray | None = None,
    *,
    distance: float = NEAR,
    limit: int = 10_000,
) -> Duplicates:
    """Pairs of images that are equal or nearly so.

    Equal: the same pixels (SHA-256). Every further copy is paired with the first, and if a set of copies is in
    several parts or classes, at least one of its pairs says so. Near: 1 - correlation of the 63 lowest frequencies (an 8 x 8
    discrete cosine transform of a 32 x 32 grey version, as in pHash, but compared as numbers and not as bits) is at most
    `distance`. That survives another size, compression and moderate changes of brightness; it does not survive crops, turns and
    mirrors. Images of one plain kind (clothes on black) can be near without being copies: look before you act.

    Measured on CIFAR-10's 60,000 images: 147 near pairs, 40 of them between train and test; of every third pair looked at, 48
    of 49 show the same picture. 103 s with reading on one busy core, 0.8 GB; time grows with the square of the number.

    Args:
        images: uint8 (h, w) or (h, w, 3), any sizes; read one at a time, each once.
        ids: their names.
        labels: their classes, or None.
        parts: the split or fold of each, or None.
        distance: largest distance of near copies, 0 (only equal ones) to 0.5.
        limit: list at most so many pairs, the closest.

    Raises:
        DataError: another number of images, labels or parts than of ids, not images, or numbers out of range.
    """
    if not 0 <= distance <= 0.5:
        raise DataError("the distance of near copies is 0 to 0.5", got=distance)
    if limit < 1:
        raise DataError("the limit is 1 or more", got=limit)
    for name, column in (("labels", labels), ("parts", parts)):
        if column is not None and len(column) != len(ids):
            raise DataError(f"{name} do not match the ids", expected=len(ids), got=len(column))
    first, equal, features = _equal(images, ids)
    near, found = _near(np.array(features, np.float32).reshape(-1, _KEPT**2 - 1), distance, limit)
    pairs = [(a, b, 0.0) for a, b in equal] + [(first[a], first[b], float(d)) for a, b, d in near]

    def same(column: Sequence[object] | np.ndarray | None, a: int, b: int) -> bool | None:
        return None if column is None else bool(column[a] == column[b])

    listed = [
        Duplicate(ids[a], ids[b], d, same(labels, a, b), same(parts, a, b))
        for a, b, d in pairs[:limit]
    ]
    return Duplicates(listed, len(equal) + found)


def _equal(
    images: Iterable[np.ndarray], ids: Sequence[str]
) -> tuple[list[int], list[tuple[int, int]], list[Any]]:
    """Rows of the different images, pairs of (first, copy), and what is compared of the different images."""
    seen: dict[bytes, int] = {}
    pairs, features, count = [], [], 0
    for row, image in enumerate(images):
        count += 1
        if count > len(ids):
            break
        array = np.ascontiguousarray(image)
        if (
            array.dtype != np.uint8
            or array.ndim not in (2, 3)
            or (array.ndim == 3 and array.shape[2] != 3)
        ):
            expected, got = "uint8 (h, w) or (h, w, 3)", f"{array.dtype} {array.shape}"
            raise DataError("not an image", where=ids[row], expected=expected, got=got)
        if 0 in array.shape:
            raise DataError(
                "not an image", where=ids[row], expected="one pixel at least", got=array.shape
            )
        digest = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).digest()
        if digest in seen:
            pairs.append((seen[digest], row))
        else:
            seen[digest] = row
            features.append(_feature(array))
    if count != len(ids):
        raise DataError(
            "images do not match the ids",
            expected=len(ids),
            got="more" if count > len(ids) else count,
        )
    return list(seen.values()), pairs, features


def _feature(image: np.ndarray) -> np.ndarray:
    """The 63 lowest frequencies of an image, of length 1; zeros for a flat image, which is near to nothing."""
    grey = Image.fromarray(image).convert("L")
    large = min(grey.size) >= _SIDE
    small = grey.resize((_SIDE, _SIDE), Image.Resampling.BOX if large else Image.Resampling.BICUBIC)
    waves = dctn(np.asarray(small, np.float32), norm="ortho")[:_KEPT, :_KEPT].ravel()[1:]
    length = float(np.linalg.norm(waves))
    return np.asarray(
        waves / length if length >= _FLAT * _SIDE else np.zeros_like(waves), np.float32
    )


def _near(
    features: np.ndarray, distance: float, limit: int
) -> tuple[list[tuple[int, int, float]], int]:
    """Pairs of rows within the distance, the closest first and at most `limit`, and their number."""
    kept, found = np.empty((3, 0)), 0
    for start in range(0, len(features) if distance > 0 else 0, _BLOCK):
        away = 1 - features[start : start + _BLOCK] @ features[start:].T
        a, b = np.nonzero(away <= distance)
        a, b = a[b > a], b[b > a]
        found += len(a)
        kept = np.concatenate([kept, [a + start, b + start, away[a, b].clip(min=0)]], axis=1)
        kept = kept[:, np.argsort(kept[2], kind="stable")[:limit]]
    return [(int(a), int(b), float(d)) for a, b, d in kept.T], found


def duplicate_warnings(duplicates: Duplicates) -> list[str]:
    """What the pairs mean for honest scores, in plain words; empty where there is nothing to say."""
    if not duplicates.found:
        return []
    pairs, notes = duplicates.pairs, []
    equal, listed = (
        [p for p in pairs if p.distance == 0],
        "" if len(pairs) == duplicates.found else " of those listed",
    )
    near = [p for p in pairs if p.distance > 0]
    for what, some, meant in (
        (f"{len(equal)} pairs of images are equal", equal, "which makes scores too good"),
        (
            f"{duplicates.found - len(equal)} pairs of images look nearly the same, which need not be copies",
            near,
            "look at them",
        ),
    ):
        if some:
            across = [f"{p.a} = {p.b}" for p in some if p.same_part is False]
            differ = [f"{p.a} = {p.b}" for p in some if p.same_label is False]
            told = (
                [f"{len(across)}{listed} are in two folds or splits, {meant}: {_some(across)}"]
                if across
                else []
            )
            told += [f"{len(differ)}{listed} have two labels: {_some(differ)}"] if differ else []
            notes.append("; ".join([what, *told]))
    return notes


PATTERNS: Final = (
    r"(?i)((?:patient|subject|subj|person|signer|user|video|clip|scene|case|slide|animal|plant|session)[-_ ]?\d+)",
    r"^(?:(?:train|training|val|valid|validation|test)/)?[^/]+/(.*[^/])/[^/]+$",
    r"([^/]*[^/\d\-_ .(])[-_ .(]+\d+\)?(?:\.\w+)?$",
)
"""Regular expressions for `data.group_regex`: a word with a number, a folder below the class's, a name before a counter."""


def guess_pattern(ids: Sequence[str]) -> str | None:
    """The first of PATTERNS that splits the ids into plausible groups; fit for `data.group_regex`. None where none does.

    Plausible: it matches every id, there are at least two groups, groups have two images at least on average and none
    has more than half of the images, and they are not just the classes (ids are class/.../file, or the file name begins with
    the class).
    """
    for pattern in PATTERNS:
        found = [re.search(pattern, name) for name in ids]
        groups = [match.group(1) for match in found if match]
        if len(groups) < len(ids) or not ids:
            continue
        sizes = Counter(groups)
        folders = [_SPLIT.sub("", name).rpartition("/")[0].partition("/")[0] for name in ids]
        of_folder = {pair[0] for pair in Counter(zip(folders, groups, strict=True))}
        one_per_class = len(sizes) <= len(of_folder) or {g.casefold() for g in sizes} <= {
            f.casefold() for f in folders
        }
        if (
            2 <= len(sizes) <= len(ids) / 2
            and max(sizes.values()) <= len(ids) / 2
            and not one_per_class
        ):
            return pattern
    return None


def guess_groups(ids: Sequence[str]) -> dict[str, str] | None:
    """The group of each id, guessed from its name by `guess_pattern`: "cat/patient12_003.jpg" -> "patient12"; or None.

    A guess is something to ask the owner of the data about, not a fact.
    """
    pattern = guess_pattern(ids)
    if pattern is None:
        return None
    return {name: match.group(1) for name in ids if (match := re.search(pattern, name))}


def group_question(ids: Sequence[str], pattern: str) -> tuple[str, int]:
    """What to ask the owner of images whose names look like groups (a person, a clip) by a pattern of `guess_pattern`; and how many groups."""
    names = sorted({match.group(1) for name in ids if (match := re.search(pattern, name))})
    told = (
        f"file names look like {len(names):,} groups ({', '.join(names[:3])} ...): if images of one belong together, set "
        f"folds.scheme = grouped and data.group_regex = '{pattern}', else scores are too good"
    )
    return told, len(names)


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )


def _write_csv(path: str | Path, header: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    for row in rows:
        table.writerow(
            [
                f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
                for value in row
            ]
        )
    write_bytes(Path(path), text.getvalue().encode())


def _cleanlab(part: str) -> Any:
    """A module of cleanlab, which is an extra.

    Raises:
        RunError: it is not installed.
    """
    try:
        return importlib.import_module(f"cleanlab.{part}")
    except ImportError:
        fix = "pip install 'threefold[audit]'"
        raise RunError("label audits need cleanlab, which is not installed", fix=fix) from None
