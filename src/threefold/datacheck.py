"""A look at a data set before anything is trained on it: counts, sizes, and what a careful reader would want to know."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from threefold.audit import duplicate_warnings, find_duplicates, group_question, guess_pattern
from threefold.data__published import FILE_PATTERNS
from threefold.datasets import ImageDataset, Sources, load_data
from threefold.errors import DataError, RecipeError
from threefold.listing import shorten
from threefold.recipe import Recipe
from threefold.recipe_schema import DataSpec

FEW = 20
"""Fewer training images of a class than this are pointed out: of 5 folds each then scores on 3 or less of them."""

UNEVEN = 10
"""A largest class that many times the smallest is pointed out."""

NEAR_COPIES = 20_000
"""Near copies are looked for among at most so many images: the time grows with the square of the number."""

_LOOKED_AT = 200


class Finding(NamedTuple):
    """Something about a data set that is worth knowing."""

    level: Literal["error", "warning", "note"]
    """error = a run would stop; warning = scores may mislead; note = good to know."""
    what: str
    """One sentence."""
    number: int
    """How many images, classes or groups it is about; 0 = the whole."""


class DataCheck(NamedTuple):
    """What a data set holds, as plain data."""

    classes: dict[str, dict[str, int]]
    """Images of each class by part (train, test), in the order of the labels."""
    groups: dict[str, int]
    """Training images of each group; empty where the data say nothing of groups."""
    sizes: dict[str, int]
    """Images of each `width x height` among at most 200 training images that are spread evenly over the rows."""
    skipped: dict[str, str]
    """Files that cannot be read, and why."""
    findings: tuple[Finding, ...]
    guessed_regex: str = ""
    """A pattern for `data.group_regex` that splits the file names into plausible groups; a guess, empty where there is none."""

    @property
    def usable(self) -> bool:
        """Whether a run could begin."""
        return all(finding.level != "error" for finding in self.findings)


def check_data(spec: DataSpec, seed: int = 0) -> DataCheck:
    """Read every image that a recipe's `data` names, and say what is there.

    Files that cannot be read are listed and the rest is looked at, whatever `bad_images` says; each is an error
    under `fail` and a warning under `skip`.

    Args:
        spec: the `data` table of a recipe.
        seed: the recipe's seed, for `limit_per_class`.

    Returns:
        Counts and findings; where the data cannot be loaded at all, one finding of level error.
    """
    try:
        sources = load_data(spec.model_copy(update={"bad_images": "skip"}), seed)
    except DataError as error:
        return DataCheck({}, {}, {}, {}, (Finding("error", str(error), 0),))
    train = sources.train
    skipped = {str(image.path): image.reason for image in sources.skipped}
    sizes, guessed = _sizes(train), _guess(train)
    findings = (
        _unreadable(skipped, spec) + _about_classes(train) + _about_sizes(sizes) + _notes(sources)
    )
    return DataCheck(
        _counts(sources),
        dict(sorted(Counter(train.groups or ()).items())),
        sizes,
        skipped,
        tuple(
            findings
            + _copies(sources)
            + ([Finding("note", *group_question(train.ids, guessed))] if guessed else [])
        ),
        guessed,
    )


def find_spec(source: str, kind: str = "") -> DataSpec:
    """The `data` table for what a person names.

    Args:
        source: a folder, archive, CSV or parquet file, a recipe (.toml), or `demo`.
        kind: the data set that lies there; empty = what the files look like, else class folders.

    Raises:
        DataError: there is nothing of that name.
        RecipeError: `kind` is no source, or the recipe cannot be used.
    """
    if source.endswith(".toml"):
        return Recipe.load(source).data
    known = get_args(DataSpec.model_fields["source"].annotation)
    if kind and kind not in known:
        raise RecipeError("not a source of data", where="--as", got=kind, expected=shorten(known))
    if source == "demo":
        return DataSpec(source="demo")
    path = Path(source).expanduser()
    if not path.exists() and kind != "huggingface":
        fix = (
            f"threefold data fetch {source} --to FOLDER, then check FOLDER"
            if source in FILE_PATTERNS
            else ""
        )
        raise DataError("there is nothing to look at", where=source, fix=fix)
    return DataSpec.model_validate({"source": kind or _looks_like(path), "root": source})


def _looks_like(path: Path) -> str:
    """The source that the files at a path look like."""
    if path.suffix.lower() in (".csv", ".parquet"):
        return path.suffix.lower()[1:]
    here, name = (path.parent, path.name) if path.is_file() else (path, "")
    for source, patterns in FILE_PATTERNS.items():
        found = {file for pattern in patterns for file in here.glob(pattern)}
        if found and (not name or path in found):
            # MNIST and Fashion-MNIST have the same file names.
            grey = source in ("mnist", "fashion-mnist")
            return (
                source
                if not grey
                else "fashion-mnist"
                if "fashion" in str(path.resolve()).lower()
                else "mnist"
            )
    return "folder"


def _guess(train: ImageDataset) -> str:
    """The pattern of plausible groups in file names, where the data have none."""
    if train.groups is not None or isinstance(train.images, np.ndarray):
        return ""
    return guess_pattern(train.ids) or ""


def _copies(sources: Sources) -> list[Finding]:
    """Pairs of images that are equal or nearly so, over both parts."""
    parts = {"train": sources.train} | ({"test": sources.test} if sources.test is not None else {})
    count = sum(map(len, parts.values()))
    if count > NEAR_COPIES:
        return [
            Finding(
                "note", f"near copies are not looked for among more than {NEAR_COPIES:,} images", 0
            )
        ]
    rows = [(name, data, row) for name, data in parts.items() for row in range(len(data))]
    found = find_duplicates(
        (data.pixels(row) for _, data, row in rows),
        [f"{data.ids[row]}" for _, data, row in rows],
        np.array([data.labels[row] for _, data, row in rows]),
        np.array([name for name, _, _ in rows]),
    )
    # Images of one plain kind are near without being copies: only equal ones are a warning.
    told = duplicate_warnings(found)
    return [Finding("warning" if "are equal" in what else "note", what, 0) for what in told]


def _counts(sources: Sources) -> dict[str, dict[str, int]]:
    parts = {"train": sources.train} | ({"test": sources.test} if sources.test is not None else {})
    counted = {
        part: np.bincount(data.labels, minlength=len(data.classes)) for part, data in parts.items()
    }
    return {
        name: {part: int(counts[label]) for part, counts in counted.items()}
        for label, name in enumerate(sources.train.classes)
    }


def _sizes(train: ImageDataset) -> dict[str, int]:
    rows = np.unique(np.linspace(0, len(train) - 1, _LOOKED_AT).astype(int))
    shapes = Counter(train.pixels(int(row)).shape for row in rows)
    return {f"{width} x {height}": count for (height, width, _), count in shapes.most_common()}


def _unreadable(skipped: dict[str, str], spec: DataSpec) -> list[Finding]:
    if not skipped:
        return []
    what = f"images cannot be read: {shorten(f'{path} ({reason})' for path, reason in skipped.items())}"
    return [Finding("error" if spec.bad_images == "fail" else "warning", what, len(skipped))]


def _about_classes(train: ImageDataset) -> list[Finding]:
    """Classes with few images, and classes of very different size."""
    counts = np.bincount(train.labels, minlength=len(train.classes))
    few = [f"{train.classes[label]} ({counts[label]})" for label in np.flatnonzero(counts < FEW)]
    found = (
        [
            Finding(
                "warning",
                f"classes with fewer than {FEW} training images: {shorten(few)}",
                len(few),
            )
        ]
        if few
        else []
    )
    if counts.min() and counts.max() >= UNEVEN * counts.min():
        what = f"the largest class has {counts.max() / counts.min():.0f} times the images of the smallest"
        found.append(Finding("warning", what + "; accuracy alone will mislead", 0))
    return found


def _about_sizes(sizes: dict[str, int]) -> list[Finding]:
    sides = [tuple(map(int, size.split(" x "))) for size in sizes]
    small = min(min(side) for side in sides)
    found = []
    if len(sizes) > 1:
        large = max(max(side) for side in sides)
        found.append(
            Finding("note", f"images differ in size: sides of {small} to {large} pixels", 0)
        )
    elongated = [size for size, side in zip(sizes, sides, strict=True) if max(side) > 2 * min(side)]
    if elongated:
        what = f"images more than twice as long as wide, which resize = squash distorts: {shorten(elongated)}"
        found.append(Finding("note", what, sum(sizes[size] for size in elongated)))
    return found


def _notes(sources: Sources) -> list[Finding]:
    """What the reader of the data noted; copies in several parts, and groups in both, make scores too good."""
    return [
        Finding(
            "warning" if "copies" in note or "stand in train and in test" in note else "note",
            note,
            0,
        )
        for note in sources.notes
    ]
