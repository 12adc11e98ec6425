"""Groups of images of one scene: near copies and bursts, found by features and by file order.

Where a folder holds several photographs of each scene, random folds train on one photograph and
score another of the same scene, which promises too much. The groups found here keep a scene
together; `grouping_effect` measures whether that matters. Imports no torch: features come as arrays
from any frozen backbone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from threefold.errors import DataError
from threefold.names import natural_key

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

ALIKE: Final = 0.1
"""Accepted share of links by likeness between images of different scenes."""

IN_ORDER: Final = 0.2
"""The same for neighbours in file order, whose order is evidence, too."""

FEWEST: Final = 8
"""Images of a class below which it is not searched: so few do not tell what is usual."""

_BACKGROUND: Final = (0.1, 0.2)
"""The ranks of the neighbours that say how alike unrelated images are, as shares of the class."""

_LARGEST_SHARE: Final = 0.25
"""Largest share of a class in one group."""

_LAGS: Final = 3
"""Distance in file order up to which images are compared as neighbours."""

_FEWEST_IN_ORDER: Final = 10
"""Pairs of neighbours in file order that must stand out, or their order is no evidence."""

_FAR_PAIRS: Final = 20
"""Pairs far apart in file order that are drawn for each image."""

_OTHER_CLASSES: Final = 5
"""Other classes that each class is compared with."""

_BLOCK: Final = 1024
"""Rows of the similarity matrix, or pairs of images, computed at a time."""

_RIDGE: Final = 0.3
"""Ridge penalty of the probe, for rows of length 1."""

MOST_IMAGES: Final = 2_000
"""Images in `grouping_effect`; the time grows with the cube."""


class _Link(NamedTuple):
    strength: float
    a: int
    b: int


class SceneGroups(NamedTuple):
    """Groups of images of one scene."""

    groups: tuple[str, ...]
    """(n,) the group of each image, named after its first image."""
    links: int
    """Pairs of images that look like one scene."""
    together: int
    """Images that share their group with another."""
    largest: int
    """Images of the largest group."""
    reason: str
    """One sentence: what was found, and by which evidence."""


class GroupingEffect(NamedTuple):
    """Cross-validated accuracy of one probe, with random and with grouped folds."""

    random: float
    """With stratified random folds."""
    grouped: float
    """With folds that keep groups whole."""
    standard_error: float
    """Of the fall from `random` to `grouped`, over groups."""

    @property
    def matters(self) -> bool:
        """Whether random folds promise more by more than noise: 2.5 standard errors.

        On simulated data without scenes the fall divided by its standard error had a standard
        deviation of 1.14 to 1.29 (40 seeds each, groups of 1, 2 and 4), as folds are drawn anew.
        """
        return self.random - self.grouped > 2.5 * self.standard_error


def find_scene_groups(
    features: NDArray[np.floating], ids: Sequence[str], labels: NDArray[np.integer]
) -> SceneGroups:
    """Find images of one class that show the same scene.

    Two images are linked by likeness if their similarity (cosine of standardized features) exceeds
    what is usual near either of them: the mean similarity of its neighbours at ranks 10% to 20% of
    the class. How far it must exceed that is learned from pairs of different classes, which are
    certainly different scenes: the least excess at which at most 10% as many images have such a
    neighbour in another class as in their own. Neighbours in the natural order of the file names
    are linked from the similarity at which at most 20% as many pairs that are far apart reach it.
    Names without an order (numbered anew, or hashes) then give no links. Links join from the
    strongest on, and no group grows beyond a quarter of its class.

    The two shares are false discovery rates estimated with a null distribution (Storey, 2002).

    Args:
        features: (n, d) pooled features of a frozen pretrained backbone.
        ids: (n,) unique names, such as paths; their order is evidence only inside one folder.
        labels: (n,) class numbers.

    Raises:
        DataError: the lengths differ, or features are not finite numbers (n, d).
    """
    units = _unit_rows(features, len(ids), len(labels))
    labels = np.unique(np.asarray(labels), return_inverse=True)[1]
    classes = [np.flatnonzero(labels == label) for label in range(int(labels.max(initial=0)) + 1)]
    classes = [rows for rows in classes if len(rows) >= FEWEST]
    alike = _links_by_likeness(units, classes)
    in_order = _links_in_order(units, ids, labels)
    root = _join([*alike, *in_order], labels)
    sizes = np.bincount(root, minlength=len(root))
    together = int(sizes[sizes > 1].sum())
    if together:
        reason = (
            f"{together} of {len(ids)} images look like scenes photographed several times, in "
            f"{int((sizes > 1).sum())} groups of up to {int(sizes.max())}: {len(alike)} pairs are "
            f"more alike than chance, {len(in_order)} are also neighbours in file order"
        )
    else:
        reason = f"none of {len(ids)} images look like another of the same scene"
    return SceneGroups(
        groups=tuple(ids[row] for row in root),
        links=len({(a, b) for _, a, b in [*alike, *in_order]}),
        together=together,
        largest=int(sizes.max(initial=0)),
        reason=reason,
    )


def grouping_effect(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    groups: Sequence[str],
    seed: int = 0,
    *,
    folds: int = 5,
    repeats: int = 3,
) -> GroupingEffect:
    """Measure how much more random folds promise than folds that keep groups whole.

    The probe is ridge regression of the classes on standardized features, which takes milliseconds;
    of more than 2,000 images a part is used, in whole groups.

    Args:
        features: (n, d) pooled features of a frozen pretrained backbone.
        labels: (n,) class numbers.
        groups: (n,) group of each image.
        seed: draws the folds.
        folds: folds of each cross-validation; fewer where a class has fewer images.
        repeats: cross-validations of each kind, whose answers are averaged.

    Raises:
        DataError: the lengths differ, features are not finite, a class has a single image, or all
            images are in one group.
    """
    labels = np.asarray(labels)
    units = _unit_rows(features, len(groups), len(labels))
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    rows = _whole_groups(codes, seed)
    units, codes = units[rows], codes[rows]
    classes, labels = np.unique(labels[rows], return_inverse=True)
    folds = min(folds, int(np.bincount(labels).min()), len(np.unique(codes)))
    if folds < 2 or len(classes) < 2:
        raise DataError(
            "cross-validation needs 2 images of 2 classes in 2 groups", got=f"{len(rows)} images"
        )
    kernel = (units @ units.T).astype(np.float32)
    targets = np.eye(len(classes), dtype=np.float32)[labels]

    def correct(parts: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Floats:
        answers = np.zeros(len(labels))
        for fit, score in parts:
            if not len(score):
                continue
            prior = targets[fit].mean(0)
            # Kernel ridge regression; scikit-learn's takes four times as long.
            penalized = kernel[np.ix_(fit, fit)] + _RIDGE * np.eye(len(fit), dtype=np.float32)
            dual = cho_solve(cho_factor(penalized, lower=True), targets[fit] - prior)
            scores = kernel[np.ix_(score, fit)] @ dual + prior
            answers[score] = scores.argmax(1) == labels[score]
        return answers

    random, grouped = [], []
    for draw in ((seed + repeat) % 2**32 for repeat in range(repeats)):
        free = StratifiedKFold(folds, shuffle=True, random_state=draw)
        whole = StratifiedGroupKFold(folds, shuffle=True, random_state=draw)
        random.append(correct(free.split(labels, labels)))
        grouped.append(correct(whole.split(labels, labels, codes)))
    falls = np.mean(random, axis=0) - np.mean(grouped, axis=0)
    # Images of one group fall together: the group is what varies independently.
    of_group = np.bincount(codes, falls - falls.mean())
    return GroupingEffect(
        random=float(np.mean(random)),
        grouped=float(np.mean(grouped)),
        standard_error=float(np.sqrt((of_group**2).sum()) / len(labels)),
    )


def _unit_rows(features: NDArray[np.floating], *lengths: int) -> Floats:
    """Return standardized features, each row scaled to length 1."""
    table = np.asarray(features, dtype=np.float64)
    if table.ndim != 2 or any(len(table) != length for length in lengths):
        raise DataError(
            "features do not match the images",
            expected=f"(n, d) for {', '.join(map(str, lengths))} images",
            got=table.shape,
        )
    if not np.isfinite(table).all():
        raise DataError("features are not finite numbers")
    if not len(table):
        return table
    deviation = table.std(0)
    table = (table - table.mean(0)) / np.where(deviation > 0, deviation, 1.0)
    lengths_of_rows = np.linalg.norm(table, axis=1, keepdims=True)
    return np.asarray(table / np.where(lengths_of_rows > 0, lengths_of_rows, 1.0))


def _likeness(a: Floats, b: Floats, *, same: bool) -> tuple[Floats, Floats]:
    """Return the similarity of each row of `a` to its nearest in `b`, and its background.

    Args:
        a, b: rows of length 1.
        same: whether both are the same rows, so that a row is not its own neighbour.
    """
    n = len(b) - same
    low = max(1, int(_BACKGROUND[0] * n))
    high = max(low + 1, int(_BACKGROUND[1] * n))
    best, background = np.empty(len(a)), np.empty(len(a))
    for start in range(0, len(a), _BLOCK):
        part = slice(start, start + _BLOCK)
        ranked = -np.sort(-(a[part] @ b.T), axis=1)[:, same:]
        best[part] = ranked[:, 0]
        background[part] = ranked[:, low:high].mean(1)
    return best, background


def _links_by_likeness(units: Floats, classes: Sequence[Rows]) -> list[_Link]:
    """Link images of one class that are more alike than chance makes images of two classes."""
    rng = np.random.default_rng(0)
    inside, across = [], []
    backgrounds = []
    for number, rows in enumerate(classes):
        best, background = _likeness(units[rows], units[rows], same=True)
        inside.append(best - background)
        backgrounds.append(background)
        others = [other for other in range(len(classes)) if other != number]
        for other in rng.permutation(others)[:_OTHER_CLASSES]:
            # As many as there are in the class: the nearest of more rows would be nearer.
            drawn = rng.permutation(classes[other])[: len(rows) - 1]
            best, background = _likeness(units[rows], units[drawn], same=False)
            across.append(best - background)
    if not across:
        return []
    threshold = _threshold(np.concatenate(inside), np.concatenate(across), ALIKE, fewest=1)
    links = []
    for rows, background in zip(classes, backgrounds, strict=True):
        for start in range(0, len(rows), _BLOCK):
            excess = units[rows[start : start + _BLOCK]] @ units[rows].T
            excess -= np.maximum(background[start : start + _BLOCK, None], background)
            a, b = np.nonzero(excess >= threshold)
            strength = excess[a, b] - threshold
            links += [
                _Link(float(s), int(rows[start + i]), int(rows[j]))
                for i, j, s in zip(a, b, strength, strict=True)
                if start + i < j
            ]
    return links


def _links_in_order(units: Floats, ids: Sequence[str], labels: Rows) -> list[_Link]:
    """Link neighbours in file order that are more alike than images far apart.

    Two orders are tried: that of each folder, and that of all file names whatever their folder,
    where cameras number through the classes. Pairs of one class and of two have their own limits.
    """
    folders: dict[PurePosixPath, list[int]] = {}
    for row in sorted(range(len(ids)), key=lambda row: natural_key(ids[row])):
        folders.setdefault(PurePosixPath(ids[row]).parent, []).append(row)
    through = sorted(range(len(ids)), key=lambda row: natural_key(PurePosixPath(ids[row]).name))
    links = []
    for same, sequences in ((True, list(folders.values())), (False, [through])):
        rows = [np.array(sequence) for sequence in sequences]
        far = _far_pairs(rows, labels, same)
        null = _similarities(units, *far)
        for lag in range(1, _LAGS + 1):
            a = np.concatenate([sequence[:-lag] for sequence in rows])
            b = np.concatenate([sequence[lag:] for sequence in rows])
            kept = (labels[a] == labels[b]) == same
            a, b = a[kept], b[kept]
            near = _similarities(units, a, b)
            threshold = _threshold(near, null, IN_ORDER, fewest=_FEWEST_IN_ORDER)
            links += [
                _Link(float(near[i] - threshold), int(a[i]), int(b[i]))
                for i in np.flatnonzero(near >= threshold)
            ]
    return links


def _similarities(units: Floats, a: Rows, b: Rows) -> Floats:
    """Return the cosines of pairs of rows, a part at a time: all at once would take gigabytes."""
    similarities = np.empty(len(a))
    for begin in range(0, len(a), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        similarities[part] = np.einsum("pd,pd->p", units[a[part]], units[b[part]])
    return similarities


def _far_pairs(sequences: Sequence[Rows], labels: Rows, same: bool) -> tuple[Rows, Rows]:
    """Draw pairs of rows that are far apart in their sequence, of one class or of two."""
    rng = np.random.default_rng(0)
    first, second = [], []
    for rows in sequences:
        a, b = rng.integers(0, len(rows), (2, _FAR_PAIRS * len(rows)))
        kept = (np.abs(a - b) > _LAGS) & ((labels[rows[a]] == labels[rows[b]]) == same)
        first.append(rows[a[kept]])
        second.append(rows[b[kept]])
    return np.concatenate(first), np.concatenate(second)


def _threshold(values: Floats, null: Floats, rate: float, fewest: int) -> float:
    """Return the least value that at most `rate` times as large a share of the null reaches.

    Infinity if there is none that at least `fewest` values reach.
    """
    if not len(values) or not len(null):
        return float("inf")
    values, null = np.sort(values), np.sort(null)
    reach = 1 - np.arange(len(values)) / len(values)
    false = 1 - np.searchsorted(null, values, side="left") / len(null)
    found = np.flatnonzero(false <= rate * reach)
    if not len(found) or len(values) - found[0] < fewest:
        return float("inf")
    return float(values[found[0]])


def _join(links: Sequence[_Link], labels: Rows) -> Rows:
    """Join linked rows, strongest links first; return the first row of each row's group.

    A link that would put more than a quarter of a class into one group is left out.
    """
    most = np.maximum(1, (_LARGEST_SHARE * np.bincount(labels)).astype(int))
    members = {row: [row] for row in range(len(labels))}
    group = list(range(len(labels)))
    for _, a, b in sorted(links, key=lambda link: (-link.strength, link.a, link.b)):
        small, large = sorted((group[a], group[b]), key=lambda name: len(members[name]))
        if small == large:
            continue
        joined = members[small] + members[large]
        if (np.bincount(labels[joined], minlength=len(most)) > most).any():
            continue
        for row in members[small]:
            group[row] = large
        del members[small]
        members[large] = joined
    first = {name: min(rows) for name, rows in members.items()}
    return np.array([first[name] for name in group], dtype=np.int64)


def _whole_groups(codes: Rows, seed: int) -> Rows:
    """Return rows in whole groups, at most as many as `grouping_effect` uses."""
    if len(codes) <= MOST_IMAGES:
        return np.arange(len(codes))
    order = np.random.default_rng(seed % 2**32).permutation(int(codes.max()) + 1)
    sizes = np.bincount(codes)[order]
    drawn = order[np.cumsum(sizes) <= MOST_IMAGES]
    return np.flatnonzero(np.isin(codes, drawn))
