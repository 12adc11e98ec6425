"""Find what leaks between folds: copies of images, and groups that file names suggest.

Nothing is edited, removed or moved. Copies are found by the correlation of small grey versions of
the images.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn

from threefold.data.split_names import split_of
from threefold.errors import DataError, shorten
from threefold.names import count_of

NEAR: Final = 0.01
"""Largest distance, 1 - correlation, of near copies (see `find_duplicates`)."""

_SIDE: Final = 32
"""Side of the grey square that is compared, pixels."""

_FREQUENCIES: Final = 8
"""Frequencies compared in each direction; these survive resizing and recompression."""

_MIN_CONTRAST: Final = 1.0
"""Standard deviation of grey values (0 to 255) below which an image has nothing to compare."""

_BLOCK: Final = 1024
"""Rows and columns of the distance matrix computed at a time: 4 MB."""

_ROUNDING: Final = 1e-4
"""Allowance for rounding of float32 where pairs are ruled out before they are compared."""

NEAR_COPIES: Final = 300_000
"""Largest number of images searched for near copies; the time grows with its square."""

GROUP_PATTERNS: Final = (
    r"(?i)((?:patient|subject|subj|person|signer|user|video|clip|scene|case|slide|animal|plant"
    r"|session)[-_ ]?\d+)",
    r"^(?:(?:train|training|val|valid|validation|test)/)?[^/]+/(.*[^/])/[^/]+$",
    r"([^/]*[^/\d\-_ .(])[-_ .(]+\d+\)?(?:\.\w+)?$",
)
"""Candidates for `data.group_regex`: a word with a number, a subfolder of the class folder, and a
name before a counter."""


class Duplicate(NamedTuple):
    """Two images that look the same.

    Attributes:
        a, b: their ids.
        distance: 0 = the same pixels; otherwise 1 - correlation.
        same_label: whether their labels agree; None without labels.
        same_part: whether they are in the same part (split or fold); None without parts.
    """

    a: str
    b: str
    distance: float
    same_label: bool | None
    same_part: bool | None


class Duplicates(NamedTuple):
    """The closest pairs, in ascending order of distance, and the number of all pairs."""

    pairs: list[Duplicate]
    total: int


class DuplicateWarning(NamedTuple):
    """One sentence about pairs of images that look the same."""

    message: str
    exact: bool
    """Whether the pairs have the same pixels; others may only look alike."""


def find_duplicates(
    images: Iterable[np.ndarray],
    ids: Sequence[str],
    labels: Sequence[object] | np.ndarray | None = None,
    parts: Sequence[object] | np.ndarray | None = None,
    *,
    distance: float = NEAR,
    limit: int = 10_000,
) -> Duplicates:
    """Find pairs of images that are equal or nearly equal.

    Equal images have the same pixels (SHA-256). Each copy is paired with the first of its set; if a
    set spans several parts or classes, at least one of its pairs shows it. Near copies have a
    distance, 1 - correlation, of at most `distance` between their 63 lowest frequencies: an 8 x 8
    discrete cosine transform of a 32 x 32 grey version, as in pHash, but compared as numbers
    instead of bits. This finds resized, recompressed and moderately brightened copies, but not
    crops, rotations or mirror images. Images of one plain kind (clothes on black) can be near
    without being copies.

    Measured on the 60,000 images of CIFAR-10: 147 near pairs, 40 of them between train and test; of
    every third pair inspected, 48 of 49 show the same picture. The time grows with the square of
    the number of images, the memory with the number (about 1 kB each).

    Args:
        images: uint8 (h, w) or (h, w, 3), of any size; each is read once, one at a time.
        ids: name of each image.
        labels: class of each image, or None.
        parts: split or fold of each image, or None.
        distance: largest distance of near copies, 0 (equal images only) to 0.5.
        limit: largest number of pairs to list, closest first.

    Raises:
        DataError: lengths differ, an image has a wrong shape or type, or a number is out of range.
    """
    if not 0 <= distance <= 0.5:
        raise DataError("the distance of near copies is 0 to 0.5", got=distance)
    if limit < 1:
        raise DataError("the limit is 1 or more", got=limit)
    for name, column in (("labels", labels), ("parts", parts)):
        if column is not None and len(column) != len(ids):
            raise DataError(f"{name} do not match the ids", expected=len(ids), got=len(column))
    originals, exact_pairs, features = _compare_exactly(images, ids)
    table = np.array(features, np.float32).reshape(-1, _FREQUENCIES**2 - 1)
    near_pairs, near_count = _near_pairs(table, distance, limit)
    pairs = [(a, b, 0.0) for a, b in exact_pairs]
    pairs += [(originals[a], originals[b], float(d)) for a, b, d in near_pairs]

    def equal_in(column: Sequence[object] | np.ndarray | None, a: int, b: int) -> bool | None:
        return None if column is None else bool(column[a] == column[b])

    listed = [
        Duplicate(ids[a], ids[b], d, equal_in(labels, a, b), equal_in(parts, a, b))
        for a, b, d in pairs[:limit]
    ]
    return Duplicates(listed, len(exact_pairs) + near_count)


def duplicate_warnings(duplicates: Duplicates) -> list[DuplicateWarning]:
    """Explain what pairs of copies mean for honest scores; empty without pairs."""
    exact = [pair for pair in duplicates.pairs if pair.distance == 0]
    near = [pair for pair in duplicates.pairs if pair.distance > 0]
    of_listed = "" if len(duplicates.pairs) == duplicates.total else " of those listed"
    near_count = duplicates.total - len(exact)
    notes = []
    if exact:
        head = count_of(len(exact), "pair of images is equal", "pairs of images are equal")
        details = _pair_details(exact, of_listed, "which makes scores too good")
        notes.append(DuplicateWarning("; ".join([head, *details]), exact=True))
    if near:
        details = [
            f"{count}{of_listed} {what}"
            for count, what in (
                (sum(pair.same_part is False for pair in near), "in two folds or splits"),
                (sum(pair.same_label is False for pair in near), "with two labels"),
            )
            if count
        ]
        counts = f" ({', '.join(details)})" if details else ""
        pairs = count_of(near_count, "pair of images looks", "pairs of images look")
        head = f"{pairs} nearly the same{counts}, such as"
        first = next((pair for pair in near if pair.same_label is False), near[0])
        example = f"{first.a} and {first.b}; they need not be copies"
        notes.append(DuplicateWarning(f"{head} {example}", exact=False))
    return notes


def guess_group_pattern(ids: Sequence[str]) -> str | None:
    """Return the first of GROUP_PATTERNS that splits the ids into plausible groups, or None.

    The pattern is suitable for `data.group_regex`. Groups are plausible if every id has one, there
    are at least two, they have two images or more on average, none has more than half of the
    images, and they are not just the classes (ids are class/.../file, or file names begin with the
    class).
    """
    for pattern in GROUP_PATTERNS:
        matches = [re.search(pattern, name) for name in ids]
        groups = [match.group(1) for match in matches if match]
        if not ids or len(groups) < len(ids):
            continue
        sizes = Counter(groups)
        folders = [_without_split(name).rpartition("/")[0] for name in ids]
        classes = [folder.partition("/")[0] for folder in folders]
        class_names = {name.casefold() for name in classes}
        named_after_classes = {group.casefold() for group in sizes} <= class_names
        only_classes = len(sizes) <= len(set(classes)) or named_after_classes
        plausible = 2 <= len(sizes) <= len(ids) / 2 and max(sizes.values()) <= len(ids) / 2
        if plausible and not only_classes:
            return pattern
    return None


def _without_split(name: str) -> str:
    """Return an id without the folders of its split."""
    pieces = name.split("/")
    while len(pieces) > 2 and split_of(pieces[0]) is not None:
        del pieces[0]
    return "/".join(pieces)


def describe_guessed_groups(ids: Sequence[str], pattern: str) -> tuple[str, int]:
    """Describe the groups that a pattern of `guess_group_pattern` finds.

    A guess is a question to the owner of the data, not a fact.

    Returns:
        One sentence, and the number of groups.
    """
    matches = [re.search(pattern, name) for name in ids]
    names = sorted({match.group(1) for match in matches if match})
    message = (
        f"file names look like {len(names):,} groups ({', '.join(names[:3])} ...): if images of "
        "one group belong together, set folds.scheme = grouped and data.group_regex = "
        f"'{pattern}'; otherwise scores are too good"
    )
    return message, len(names)


def _compare_exactly(
    images: Iterable[np.ndarray], ids: Sequence[str]
) -> tuple[list[int], list[tuple[int, int]], list[Any]]:
    """Return the rows of distinct images, (original, copy) pairs, and features of the distinct."""
    seen: dict[bytes, int] = {}
    pairs = []
    features = []
    count = 0
    for row, image in enumerate(images):
        count += 1
        if count > len(ids):
            break
        array = np.ascontiguousarray(image)
        is_grey = array.ndim == 2
        is_colour = array.ndim == 3 and array.shape[2] == 3
        if array.dtype != np.uint8 or not (is_grey or is_colour):
            raise DataError(
                "not an image",
                where=ids[row],
                expected="uint8 (h, w) or (h, w, 3)",
                got=f"{array.dtype} {array.shape}",
            )
        if 0 in array.shape:
            raise DataError(
                "not an image", where=ids[row], expected="at least one pixel", got=array.shape
            )
        digest = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).digest()
        if digest in seen:
            pairs.append((seen[digest], row))
        else:
            seen[digest] = row
            features.append(_lowest_frequencies(array))
    if count != len(ids):
        got = "more" if count > len(ids) else str(count)
        raise DataError("images do not match the ids", expected=len(ids), got=got)
    return list(seen.values()), pairs, features


def _lowest_frequencies(image: np.ndarray) -> np.ndarray:
    """Return the 63 lowest frequencies, scaled to length 1; zeros for a flat image."""
    grey = Image.fromarray(image).convert("L")
    shrinks = min(grey.size) >= _SIDE
    resampling = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    small = np.asarray(grey.resize((_SIDE, _SIDE), resampling), np.float32)
    frequencies = dctn(small, norm="ortho")[:_FREQUENCIES, :_FREQUENCIES].ravel()[1:]
    length = float(np.linalg.norm(frequencies))
    if length < _MIN_CONTRAST * _SIDE:
        return np.zeros(len(frequencies), np.float32)
    return np.asarray(frequencies / length, np.float32)


def _near_pairs(
    features: np.ndarray, distance: float, limit: int
) -> tuple[list[tuple[int, int, float]], int]:
    """Return at most `limit` pairs of rows within the distance, closest first, and their number.

    Rows of length 1 at this distance, d, are sqrt(2 d) apart, and no further in any direction. So
    rows are sorted along the direction in which they vary most, and each block is compared only
    with the blocks that are near enough in this direction. A nearest-neighbour tree saves no more
    in 63 dimensions, and needs memory for every candidate. Rows of zeros have nothing to compare.
    """
    present = np.flatnonzero(features.any(1))
    if distance == 0 or not len(present):
        return [], 0
    table = features[present]
    centred = table - table.mean(0)
    direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    places = table @ direction
    order = np.argsort(places, kind="stable")
    table, places, rows = table[order], places[order], present[order]
    reach = np.sqrt(2 * distance) + _ROUNDING
    closest, count = np.empty((3, 0)), 0
    for start in range(0, len(table), _BLOCK):
        block = table[start : start + _BLOCK]
        end = int(np.searchsorted(places, places[start + len(block) - 1] + reach, side="right"))
        for other in range(start, end, _BLOCK):
            distances = 1 - block @ table[other : min(other + _BLOCK, end)].T
            a, b = np.nonzero(distances <= distance)
            new = distances[a, b].clip(min=0)
            a, b = a + start, b + other
            once = b > a
            count += int(once.sum())
            pair = np.sort([rows[a[once]], rows[b[once]]], axis=0)
            closest = np.concatenate([closest, [*pair, new[once]]], axis=1)
            if closest.shape[1] > limit:
                closest = _sorted_pairs(closest)[:, :limit]
    return [(int(a), int(b), float(d)) for a, b, d in _sorted_pairs(closest).T], count


def _sorted_pairs(pairs: np.ndarray) -> np.ndarray:
    """Sort the columns (a, b, distance) by distance, then by row."""
    return pairs[:, np.lexsort((pairs[1], pairs[0], pairs[2]))]


def _pair_details(pairs: Sequence[Duplicate], of_listed: str, consequence: str) -> list[str]:
    """Describe the pairs that span two parts, and those with two labels."""
    across = [f"{pair.a} = {pair.b}" for pair in pairs if pair.same_part is False]
    differ = [f"{pair.a} = {pair.b}" for pair in pairs if pair.same_label is False]
    details = []
    if across:
        where = f"in two folds or splits, {consequence}"
        count = count_of(len(across), f"{of_listed} is".strip(), f"{of_listed} are".strip())
        details.append(f"{count} {where}: {shorten(across, 3)}")
    if differ:
        count = count_of(len(differ), f"{of_listed} has".strip(), f"{of_listed} have".strip())
        details.append(f"{count} two labels: {shorten(differ, 3)}")
    return details
