"""Collect what a person should look at in a data set, and write the data set as they decided.

The files of the user are never edited: the decisions become a new CSV file that `fit` reads.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

from threefold.data.check import examine_images, find_spec
from threefold.data.dataset import ImageDataset, Sources
from threefold.data.leakage import Duplicate
from threefold.data.load import load_data
from threefold.data.quality import FAULTS, QualityFinding
from threefold.data.sources.folder import FilePaths
from threefold.errors import DataError, RecipeError, RunError, shorten
from threefold.evaluation.label_errors import Suspect, read_suspects
from threefold.files import real_path, write_bytes
from threefold.predictions.run_folder import RunFolder

Action = Literal["accept", "relabel", "drop"]
Kind = Literal["label", "copy", "quality", "near copy"]

SUSPECTS: Final = "suspects.csv"
"""The file of a run folder with its suspect labels."""


class Decision(NamedTuple):
    """What happens to an image."""

    action: Action
    label: str = ""
    """The new class of a relabelled image."""


@dataclass(frozen=True)
class ReviewItem:
    """An image to look at.

    Attributes:
        id: the image's id.
        part: train or test.
        row: its row in this part.
        label: name of its class.
        kinds: what was found, without repetition.
        reasons: a sentence for each finding.
        suggested: the class that the ensemble predicts; empty = none.
        copy_of: id of the image it is a copy of; empty = none.
    """

    id: str
    part: str
    row: int
    label: str
    kinds: tuple[Kind, ...]
    reasons: tuple[str, ...]
    suggested: str = ""
    copy_of: str = ""


class Review(NamedTuple):
    """A data set and what to look at in it."""

    root: str
    """Where the images are: a folder or a file."""
    sources: Sources
    items: tuple[ReviewItem, ...]
    """Suspect labels first, then equal copies, images that stand out, and near copies."""
    notes: tuple[str, ...]
    """What was not looked for."""


def open_review(source: str, kind: str = "", overrides: Sequence[str] = ()) -> Review:
    """Examine the images of a data set, or of a run with its suspect labels.

    Args:
        source: a run folder, or whatever `find_spec` takes.
        kind: a value of `data.source`, if the files do not show it.
        overrides: `data.key=value` changes; not of a run, which has its own.

    Raises:
        DataError: the images cannot be loaded, or are no files.
        RecipeError: an override is invalid, or the source is a run.
        RunError: the run folder cannot be read.
    """
    folder = Path(source).expanduser()
    suspects: list[Suspect] = []
    notes = []
    if (folder / "recipe.toml").is_file():
        if overrides:
            raise RecipeError(
                "a run reads its images as its recipe says", where=source, fix="leave --set out"
            )
        run = RunFolder.open(folder)
        spec, seed = run.recipe.data, run.recipe.seed
        if run.has(SUSPECTS):
            suspects = read_suspects(run.verify(SUSPECTS))
        else:
            notes.append(f"the run has no {SUSPECTS}: labels are not looked at")
    else:
        spec, seed = find_spec(source, kind, overrides), 0
        notes.append("labels are looked at in a run only: give the folder of one")
    sources = load_data(spec.model_copy(update={"bad_images": "skip"}), seed)
    for data in _parts(sources).values():
        if not _is_files(data):
            raise DataError(
                "the images are no files, so that no table can list them",
                where=source,
                expected="folders, or a table of paths",
            )
    if sources.skipped:
        names = shorten(str(image.path) for image in sources.skipped)
        notes.append(f"{len(sources.skipped):,} unreadable images are left out: {names}")
    examined = examine_images(sources)
    if examined.note:
        notes.append(examined.note)
    items = collect_items(sources, suspects, examined.duplicates.pairs, examined.quality)
    return Review(spec.root, sources, tuple(items), tuple(notes))


def collect_items(
    sources: Sources,
    suspects: Sequence[Suspect],
    pairs: Sequence[Duplicate],
    quality: Sequence[QualityFinding],
) -> list[ReviewItem]:
    """Join the findings about each image.

    Raises:
        DataError: a suspect is not in the data set.
    """
    places = {
        name: (part, row, data.classes[data.labels[row]])
        for part, data in _parts(sources).items()
        for row, name in enumerate(data.ids)
    }
    unknown = [suspect.id for suspect in suspects if suspect.id not in places]
    if unknown:
        raise DataError(
            "suspect images are not in the data set",
            got=shorten(unknown),
            fix="give the run of these images; it must be trained again where they have changed",
        )
    found: dict[str, dict[str, list[str]]] = {}

    def add(name: str, kind: Kind, reason: str, **extra: str) -> None:
        entry = found.setdefault(name, {"kinds": [], "reasons": [], "suggested": [], "copy": []})
        entry["kinds"].append(kind)
        entry["reasons"].append(reason)
        for key, value in extra.items():
            entry[key].append(value)

    for suspect in suspects:
        add(suspect.id, "label", suspect.reason, suggested=suspect.suggested)
    for pair in pairs:
        if pair.distance == 0:
            add(pair.b, "copy", _describe_copy("the same pixels as", pair, places), copy=pair.a)
    for finding in quality:
        add(finding.id, "quality", f"{FAULTS[finding.fault]}: {finding.value}")
    for pair in pairs:
        if pair.distance > 0:
            add(pair.b, "near copy", _describe_copy("looks like", pair, places), copy=pair.a)
    return [
        ReviewItem(
            id=name,
            part=places[name][0],
            row=places[name][1],
            label=places[name][2],
            kinds=tuple(dict.fromkeys(entry["kinds"])),  # type: ignore[arg-type]
            reasons=tuple(entry["reasons"]),
            suggested=next(iter(entry["suggested"]), ""),
            copy_of=next(iter(entry["copy"]), ""),
        )
        for name, entry in found.items()
    ]


def _describe_copy(
    relation: str, pair: Duplicate, places: Mapping[str, tuple[str, int, str]]
) -> str:
    """Say which image another one is a copy of."""
    (part, _, label), (other_part, _, other_label) = places[pair.b], places[pair.a]
    text = f"{relation} {pair.a}"
    if other_label != label:
        text += f", which is labelled {other_label}"
    if other_part != part:
        text += f", which is in the {other_part} part"
    return text


def check_decision(review: Review, decision: Decision) -> None:
    """Check that a decision can be carried out.

    Raises:
        DataError: a relabelled image has no class of the data set.
    """
    classes = review.sources.train.classes
    if decision.action == "relabel" and decision.label not in classes:
        raise DataError("no such class", got=decision.label or "nothing", expected=shorten(classes))


def check_new_file(target: Path, suffix: str = ".csv") -> None:
    """Refuse a file that exists, or whose name does not end in the suffix.

    Raises:
        RunError: it does.
    """
    if target.suffix.lower() != suffix:
        expected = f"one that ends in {suffix}"
        raise RunError("not a name for this file", where=target, expected=expected)
    if target.exists():
        raise RunError("the file exists", where=target, fix="choose another name with --out")


def check_target(review: Review, target: Path, suffix: str = ".csv") -> None:
    """Refuse a file that exists or would lie among the images: nothing of the user's is changed.

    Raises:
        RunError: it does.
    """
    check_new_file(target, suffix)
    root = real_path(Path(review.root).expanduser())
    if root.is_dir() and real_path(target).is_relative_to(root):
        raise RunError(
            "the file would lie among the images", where=target, fix="choose another with --out"
        )


class ReviewedTable:
    """The CSV file of a review, whose lines are made once and changed with each decision.

    Its columns are path (absolute) and label, and group, fold and split where the data set has
    them. Images without a decision keep their label.

    Args:
        review: the data set.
    """

    def __init__(self, review: Review) -> None:
        self.review, parts = review, _parts(review.sources)
        self.places = {
            name: (part, data, row)
            for part, data in parts.items()
            for row, name in enumerate(data.ids)
        }
        has_groups = any(data.groups is not None for data in parts.values())
        has_folds = review.sources.train.folds is not None
        columns = ["group"] * has_groups + ["fold"] * has_folds + ["split"] * (len(parts) > 1)
        self._columns = ["path", "label", *columns]
        self._head = self._format({name: name for name in self._columns})
        self._lines = {name: self._line(name, "") for name in self.places}

    def write(self, path: Path, decisions: Mapping[str, Decision]) -> int:
        """Write the file as decided, and return the number of its rows.

        Args:
            path: the file.
            decisions: by id.

        Raises:
            DataError: an id or a class is unknown.
            RunError: the file cannot be written.
        """
        unknown = [name for name in decisions if name not in self.places]
        if unknown:
            raise DataError("decisions about images that are not there", got=shorten(unknown))
        changed = dict(self._lines)
        for name, decision in decisions.items():
            check_decision(self.review, decision)
            if decision.action == "drop":
                del changed[name]
            elif decision.action == "relabel":
                changed[name] = self._line(name, decision.label)
        write_bytes(path, (self._head + "".join(changed.values())).encode())
        return len(changed)

    def _line(self, name: str, label: str) -> str:
        """The line of an image, with another label or its own."""
        part, data, row = self.places[name]
        return self._format(
            {
                "path": Path(str(data.images[row])).absolute().as_posix(),
                "label": label or data.classes[data.labels[row]],
                # Test images may have no groups where training images have: each is its own.
                "group": data.groups[row] if data.groups is not None else name,
                "fold": data.folds[row] if data.folds is not None else "",
                "split": part,
            }
        )

    def _format(self, cells: Mapping[str, object]) -> str:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow([cells[name] for name in self._columns])
        return text.getvalue()


def write_reviewed(path: Path, review: Review, decisions: Mapping[str, Decision]) -> int:
    """Write the data set as decided, as a CSV file that `fit` reads; see `ReviewedTable`."""
    return ReviewedTable(review).write(path, decisions)


def _parts(sources: Sources) -> dict[str, ImageDataset]:
    test = {} if sources.test is None else {"test": sources.test}
    return {"train": sources.train, **test}


def _is_files(data: ImageDataset) -> bool:
    """Whether every image is a file of its own."""
    return isinstance(data.images, FilePaths)
