"""Check a data set before training: counts, sizes, and problems that make scores misleading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.detect_source import (
    TABLES,
    detect_source,
    find_fold_column,
    find_multilabel,
    is_hub_name,
    names_shards,
    spec_of_table,
)
from threefold.data.images import map_in_threads
from threefold.data.leakage import (
    NEAR,
    NEAR_COPIES,
    Duplicates,
    describe_guessed_groups,
    duplicate_warnings,
    find_duplicates,
    guess_group_pattern,
)
from threefold.data.load import load_data
from threefold.data.published import FILE_PATTERNS
from threefold.data.quality import FAULTS, QualityFinding, QualityMeter
from threefold.errors import DataError, RecipeError, refuse_address, shorten
from threefold.files import real_path
from threefold.machine import decoding_threads
from threefold.names import count_of
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import DataSpec
from threefold.suffixes import is_archive

FEW = 20
"""Classes with fewer training images are reported: each of 5 folds scores at most 3 of them."""

UNEVEN = 10
"""Ratio of the largest to the smallest class from which imbalance is reported."""

_SIZE_SAMPLE = 200


Level = Literal["error", "warning", "note"]


class Finding(NamedTuple):
    """One observation about a data set."""

    level: Level
    """error = a run would stop; warning = scores may mislead; note = good to know."""
    what: str
    """One sentence."""
    number: int
    """Number of images, classes or groups concerned; 0 = the whole data set."""


class DataCheck(NamedTuple):
    """The content of a data set, as plain data."""

    classes: dict[str, dict[str, int]]
    """Number of images of each class by part (train, test), in label order."""
    groups: dict[str, int]
    """Number of training images of each group; empty without groups."""
    sizes: dict[str, int]
    """Images of each `width x height`, among at most 200 evenly spaced training images."""
    skipped: dict[str, str]
    """Unreadable files, with the reason."""
    findings: tuple[Finding, ...]
    guessed_regex: str = ""
    """A guess for `data.group_regex` that gives plausible groups; empty if there is none."""
    quality: tuple[QualityFinding, ...] = ()
    """Images of both parts that stand out: blurred, dark, bright, of one colour, oddly sized."""

    @property
    def usable(self) -> bool:
        """Whether a run could start."""
        return all(finding.level != "error" for finding in self.findings)


def check_data(spec: DataSpec, seed: int = 0) -> DataCheck:
    """Read every image of a recipe's `data` table and describe the data set.

    Unreadable files are listed and the rest is checked, whatever `bad_images` is; they are an error
    if it is "fail" and a warning if it is "skip".

    Args:
        spec: the `data` table of a recipe.
        seed: the recipe's seed, for `limit_per_class`.

    Returns:
        Counts and findings; if nothing can be loaded, one finding of level error.
    """
    try:
        spec_of_all = spec.model_copy(update={"bad_images": "skip"})
        sources = load_data(spec_of_all, seed, fresh=True)
    except DataError as error:
        failure = Finding("error", str(error), 0)
        return DataCheck(classes={}, groups={}, sizes={}, skipped={}, findings=(failure,))
    train = sources.train
    skipped = {str(image.path): image.reason for image in sources.skipped}
    rows = np.unique(np.linspace(0, len(train) - 1, _SIZE_SAMPLE).astype(int))
    sizes = Counter(train.pixels(int(row)).shape[1::-1] for row in rows)
    guessed = _guess_groups(train)
    examined = examine_images(sources)
    findings = [
        *_unreadable(skipped, spec),
        *_class_findings(train),
        *_size_findings(sizes),
        *(Finding("note", note, 0) for note in sources.notes),
        *(Finding("warning", warning, 0) for warning in sources.warnings),
        *_duplicate_findings(examined),
        *_quality_findings(examined.quality),
    ]
    if guessed:
        findings.append(Finding("note", *describe_guessed_groups(train.ids, guessed)))
    return DataCheck(
        classes=_counts(sources),
        groups=dict(sorted(Counter(train.groups or ()).items())),
        sizes={f"{width} x {height}": count for (width, height), count in sizes.most_common()},
        skipped=skipped,
        findings=tuple(findings),
        guessed_regex=guessed,
        quality=examined.quality,
    )


def find_spec(source: str, kind: str = "", overrides: Iterable[str] = ()) -> DataSpec:
    """Return the `data` table for a path or name.

    Args:
        source: whatever `detect_source` knows, a recipe (.toml), or `demo`.
        kind: a value of `data.source`; empty = guess from the files, or else class folders.
        overrides: `data.key=value` changes.

    Raises:
        DataError: the path does not exist.
        RecipeError: `kind` is not a source, or the recipe or an override is invalid.
    """
    spec = _find_spec(source, kind)
    changes = list(overrides)
    foreign = [text for text in changes if not text.strip().startswith("data.")]
    if foreign:
        raise RecipeError(
            "only keys of the data table have an effect here",
            where=f"--set {foreign[0]}",
            expected="data.key=value, for example data.label_column=breed",
        )
    if changes:
        tree = {"data": spec.model_dump(mode="json")}
        Recipe.check_keys(tree, changes, "--set")  # applies them, too
        try:
            spec = DataSpec.model_validate(tree["data"])
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise RecipeError("the data table is invalid", where="--set", got=message) from None
    if source.endswith(".toml"):
        return spec
    return _with_findings(spec, {text.partition("=")[0].strip() for text in changes})


def _find_spec(source: str, kind: str) -> DataSpec:
    """Return the `data` table, without the user's own column of folds."""
    if source.endswith(".toml"):
        return Recipe.load(source).data
    known = get_args(DataSpec.model_fields["source"].annotation)
    if kind and kind not in known:
        raise RecipeError("not a source of data", where="--as", got=kind, expected=shorten(known))
    if source == "demo":
        return DataSpec(source="demo")
    path = Path(source).expanduser()
    if not kind and (is_hub_name(source) or names_shards(source)):
        return detect_source(source)
    if not path.exists() and kind != "huggingface":
        refuse_address(source)
        fix = ""
        if source in FILE_PATTERNS:
            fix = f"threefold data fetch {source} --to FOLDER, then check FOLDER"
        raise DataError("no such file or folder", where=source, fix=fix)
    guessed = kind or _guess_source(path)
    if not kind and guessed == "folder" and (path.is_dir() or is_archive(path)):
        inside = spec_of_table(path)  # as a run reads it
        if inside is not None:
            return inside
    return DataSpec.model_validate({"source": guessed, "root": source})


def _with_findings(spec: DataSpec, decided: Collection[str]) -> DataSpec:
    """Name the user's own column of folds, and any number of labels, as a plan does.

    Args:
        spec: the table.
        decided: keys such as `data.task` that the user has set, which stay.
    """
    if "data.fold_column" not in decided:
        with suppress(DataError):  # which the check finds again, and reports
            spec = spec.model_copy(update={"fold_column": find_fold_column(spec)})
    found = None if "data.task" in decided else find_multilabel(spec)
    if found is None:
        return spec
    return spec.model_copy(
        update={"task": "multilabel", "label_separator": found.separator or None}
    )


def _guess_source(path: Path) -> str:
    """Guess the source of the files at a path."""
    if path.suffix.lower() in TABLES:
        return TABLES[path.suffix.lower()]
    folder = path.parent if path.is_file() else path
    for source, patterns in FILE_PATTERNS.items():
        matches = {file for pattern in patterns for file in folder.glob(pattern)}
        if not matches or (path.is_file() and path not in matches):
            continue
        if source in ("mnist", "fashion-mnist"):  # both have the same file names
            return "fashion-mnist" if "fashion" in str(real_path(path)).lower() else "mnist"
        return source
    return "folder"


def _guess_groups(train: ImageDataset) -> str:
    """Guess a group pattern from the file names; empty if the data have groups or no names."""
    if train.groups is not None or isinstance(train.images, np.ndarray):
        return ""
    return guess_group_pattern(train.ids) or ""


def _parts(sources: Sources) -> dict[str, ImageDataset]:
    parts = {"train": sources.train}
    if sources.test is not None:
        parts["test"] = sources.test
    return parts


class ExaminedImages(NamedTuple):
    """What one pass over the pixels of a data set finds."""

    duplicates: Duplicates
    quality: tuple[QualityFinding, ...]
    note: str
    """What was not searched for; empty if everything was."""


def examine_images(sources: Sources) -> ExaminedImages:
    """Look for copies and for images that stand out, over both parts; each image is read once."""
    parts = _parts(sources)
    rows = [(name, data, row) for name, data in parts.items() for row in range(len(data))]
    ids = [data.ids[row] for _, data, row in rows]
    note, distance = "", NEAR
    if len(rows) > NEAR_COPIES:
        note = f"near copies are not searched for among more than {NEAR_COPIES:,} images"
        distance = 0.0
    meter = QualityMeter()

    def read(number: int) -> NDArray[np.uint8]:
        _, data, row = rows[number]
        return data.pixels(row)

    # One image ahead for each thread: a large photograph takes 36 MB.
    images = map_in_threads(read, len(rows), decoding_threads(), size=1, ahead=1)
    duplicates = find_duplicates(
        meter.watch(images),
        ids,
        _label_codes([data.label_names(row) for _, data, row in rows]),
        np.array([name for name, _, _ in rows]),
        distance=distance,
    )
    return ExaminedImages(duplicates, tuple(meter.findings(ids)), note)


def _duplicate_findings(examined: ExaminedImages) -> list[Finding]:
    """Report pairs of equal and nearly equal images."""
    # Images of one plain kind are near without being copies: only equal ones are a warning.
    findings = [
        Finding(
            "warning" if warning.exact else "note",
            f"{warning.message}; `threefold data review` shows all",
            0,
        )
        for warning in duplicate_warnings(examined.duplicates)
    ]
    if examined.note:
        findings.append(Finding("note", examined.note, 0))
    return findings


def _quality_findings(quality: Sequence[QualityFinding]) -> list[Finding]:
    """Report the images that stand out, one finding for each fault."""
    findings = []
    for fault, meaning in FAULTS.items():
        names = [finding.id for finding in quality if finding.fault == fault]
        if names:
            stand_out = count_of(len(names), "image stands out", "images stand out")
            message = f"{stand_out}, {meaning}: {shorten(names)}"
            findings.append(Finding("note", message, len(names)))
    return findings


def _counts(sources: Sources) -> dict[str, dict[str, int]]:
    counts = {part: _count_classes(data) for part, data in _parts(sources).items()}
    return {
        name: {part: int(count[label]) for part, count in counts.items()}
        for label, name in enumerate(sources.train.classes)
    }


def _count_classes(data: ImageDataset) -> NDArray[np.int64]:
    """Return the number of images (k,) of each class, or with each label."""
    if data.targets is None:
        return np.bincount(data.labels, minlength=len(data.classes))
    counts: NDArray[np.int64] = data.targets.sum(0, dtype=np.int64)
    return counts


def _label_codes(names: Sequence[tuple[str, ...]]) -> NDArray[np.int64]:
    """Return numbers (n,), the same for images with the same class or labels."""
    number = {labels: code for code, labels in enumerate(sorted(set(names)))}
    return np.array([number[labels] for labels in names], dtype=np.int64)


def _unreadable(skipped: dict[str, str], spec: DataSpec) -> list[Finding]:
    if not skipped:
        return []
    files = shorten(f"{path} ({reason})" for path, reason in skipped.items())
    level: Level = "error" if spec.bad_images == "fail" else "warning"
    return [
        Finding(level, f"{count_of(len(skipped), 'image')} cannot be read: {files}", len(skipped))
    ]


def _class_findings(train: ImageDataset) -> list[Finding]:
    """Report small classes and imbalance."""
    counts = _count_classes(train)
    findings = []
    few = [f"{train.classes[label]} ({counts[label]})" for label in np.flatnonzero(counts < FEW)]
    if few:
        message = f"classes with fewer than {FEW} training images: {shorten(few)}"
        findings.append(Finding("warning", message, len(few)))
    if counts.min() and counts.max() >= UNEVEN * counts.min():
        ratio = counts.max() / counts.min()
        message = (
            f"the largest class has {ratio:.0f} times the images of the smallest; "
            "accuracy alone will mislead"
        )
        findings.append(Finding("warning", message, 0))
    return findings


def _size_findings(sizes: Counter[tuple[int, ...]]) -> list[Finding]:
    """Report images of different (width, height), and elongated ones."""
    findings = []
    if len(sizes) > 1:
        small = min(min(size) for size in sizes)
        large = max(max(size) for size in sizes)
        message = f"images differ in size: sides of {small} to {large} pixels"
        findings.append(Finding("note", message, 0))
    elongated = [size for size, _ in sizes.most_common() if max(size) > 2 * min(size)]
    if elongated:
        names = shorten(f"{width} x {height}" for width, height in elongated)
        message = f"images more than twice as long as wide, which resize = squash distorts: {names}"
        findings.append(Finding("note", message, sum(sizes[size] for size in elongated)))
    return findings
