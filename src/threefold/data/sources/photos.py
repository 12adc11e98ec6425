"""Data sets of image files in their official layouts: iNaturalist 2019, Cassava, Surrey ASL.

Each may be unpacked, or still the official archive, which is unpacked once into
`<archive>.unpacked/` beside it (see `archives.unpack`). Images without labels are not used, and
counted in the notes.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from threefold.data.published import CASSAVA_CLASSES, SURREY_LETTERS, count_note
from threefold.data.sources.archives import read_members, safe_name, unpack_beside
from threefold.data.sources.folder import (
    ListedImage,
    Listing,
    find_absent,
    read_file,
)
from threefold.data.walk import is_image, list_entries
from threefold.errors import DataError, shorten
from threefold.names import count_of, find_repeated

_NO_TEST_LABELS = "the test images have no labels and are not used"


def _find_base(
    root: Path,
    archives: tuple[str, ...],
    is_base: Callable[[Path], bool],
    *,
    name: str,
    expected: str,
) -> Path:
    """Find the base folder of a data set: `root`, a folder in it, or in what its archives hold.

    Kaggle's archives contain archives, so unpacked folders are searched in the same way.

    Args:
        root: a folder or an archive.
        archives: names of the official archives.
        is_base: whether a folder is the one.
        name: the data set, for messages.
        expected: what the base folder contains, for messages.
    """
    queue = [root]
    while queue:
        place = queue.pop(0)
        if place.is_file():
            queue.append(unpack_beside(place))
            continue
        for folder in (place, *_list_folders(place)):
            if is_base(folder):
                return folder
        queue += [place / archive for archive in archives if (place / archive).is_file()]
    fix = f"set data.root to its folder or archive, or run: threefold data fetch {name} --to {root}"
    raise DataError("the data set is not there", where=root, expected=expected, fix=fix)


def _list_folders(folder: Path) -> list[Path]:
    """Folders in a folder; none if it does not exist."""
    return list_entries(folder)[0] if folder.is_dir() else []


def _list_images(folder: Path) -> list[Path]:
    return [path for path in list_entries(folder)[1] if is_image(path)]


def _check_files(items: list[ListedImage], table: Path) -> None:
    """Require that every listed image exists and is listed once."""
    repeated, absent = find_repeated(item.id for item in items), find_absent(items)
    if repeated:
        raise DataError("images are listed twice", where=table, got=shorten(repeated))
    if absent:
        what = f"{count_of(len(absent), 'listed image does', 'listed images do')} not exist"
        fix = "unpack the official archive again; it holds every listed image"
        raise DataError(what, where=table, got=shorten(absent), fix=fix)


def _make_listing(
    name: str,
    items: list[ListedImage],
    classes: Iterable[str],
    notes: list[str],
    extra: bool = False,
) -> Listing:
    counts = Counter(item.part for item in items)
    count_notes = count_note(name, counts["train"], counts["test"], extra)
    return Listing(items, count_notes + notes, tuple(classes))


# iNaturalist 2019


def list_inaturalist(root: Path, extra: bool) -> Listing:
    """List iNaturalist 2019 (Van Horn et al. 2018; 1,010 species).

    The official validation images are held out, because the official test images have no labels.
    Classes are in the order of their numbers. If categories.json is present, classes have its
    names instead of the obfuscated ones.

    Args:
        root: folder of train2019.json, val2019.json and train_val2019/; each may still be in its
            .tar.gz.
        extra: also train on the validation images, as the paper did before it split all images
            itself.

    Raises:
        DataError: files are missing, or the annotations contradict each other.
    """
    base = _find_base(
        root,
        ("train_val2019.tar.gz",),
        lambda folder: (folder / "train_val2019").is_dir(),
        name="inaturalist2019",
        expected="train_val2019/ (or train_val2019.tar.gz), train2019.json and val2019.json",
    )
    folders = [base, root.parent if root.is_file() else root, base.parent]
    train_table, train_tree = _read_annotations(folders, "train2019.json")
    val_table, val_tree = _read_annotations(folders, "val2019.json")
    names = _read_category_names(folders, train_tree)
    items = [
        *_list_annotated(train_tree, names, train_table, base, part="train"),
        *_list_annotated(val_tree, names, val_table, base, part="train" if extra else "test"),
    ]
    _check_files(items, train_table)
    notes = ["the official validation images are trained on: nothing is held out"] if extra else []
    classes = [names[number] for number in sorted(names)]
    return _make_listing("inaturalist2019", items, classes, notes, extra)


def _read_annotations(folders: list[Path], name: str) -> tuple[Path, Any]:
    """The path and the content of a JSON file in one of the folders, plain or in its .tar.gz."""
    for folder in folders:
        for path in (folder / name, folder / f"{name}.tar.gz"):
            if path.is_file():
                return path, _read_json(path, name)
    raise DataError("a file of iNaturalist 2019 is missing", where=folders[0] / name)


def _read_json(path: Path, name: str) -> Any:
    try:
        if path.suffix == ".json":
            content = read_file(path)
        else:
            content = read_members(path, [name]).get(name, b"")
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError("not valid JSON", where=path, got=error) from None


def _read_category_names(folders: list[Path], annotations: Any) -> dict[int, str]:
    """Class name by category number; names that several categories share get their number."""
    categories = annotations
    for folder in folders:
        if any(folder.glob("categories.json*")):
            _, categories = _read_annotations([folder], "categories.json")
            break
    try:
        if isinstance(categories, dict):
            categories = categories["categories"]
        names = {int(entry["id"]): str(entry["name"]) for entry in categories}
    except (KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__} {error}"
        raise DataError("the categories cannot be read", where=folders[0], got=got) from None
    counts = Counter(names.values())
    return {
        number: name if counts[name] == 1 else f"{name} ({number})"
        for number, name in names.items()
    }


def _list_annotated(
    tree: Any, names: dict[int, str], table: Path, base: Path, part: str
) -> list[ListedImage]:
    """List the images of an annotation file.

    Args:
        tree: content of the file.
        names: class name by category number.
        table: the file, for messages.
        base: the folder that file names are relative to.
        part: `train` or `test`.
    """
    try:
        files = {image["id"]: safe_name(image["file_name"]) for image in tree["images"]}
        rows = [
            (files[entry["image_id"]], int(entry["category_id"])) for entry in tree["annotations"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__} {error}"
        raise DataError("the annotations cannot be read", where=table, got=got) from None
    unknown = sorted({category for _, category in rows} - set(names))
    if unknown:
        got = shorten(map(str, unknown))
        raise DataError("labels have no category", where=table, got=got)
    return [
        ListedImage(file, str(base / file), label=names[category], part=part)
        for file, category in rows
    ]


# Cassava


def list_icassava(root: Path, extra: bool) -> Listing:
    """List iCassava 2019 (Mwebaze et al. 2019): class folders below train/.

    Two editions are read. Kaggle's has no labels for its test images, so nothing is held out. The
    one of tensorflow_datasets (cassavaleafdata.zip) also has labelled test/ and validation/.

    Args:
        root: folder with train/, a folder above it, or the archive (Kaggle's may hold train.zip).
        extra: add the images of validation/ to the training set.

    Raises:
        DataError: there is no such folder, or class folders are missing.
    """
    base = _find_base(
        root,
        ("cassavaleafdata.zip", "cassava-disease.zip", "train.zip"),
        lambda folder: (folder / "train/cmd").is_dir(),
        name="icassava2019",
        expected="train/cmd and so on",
    )
    train = _list_cassava_part(base, "train")
    test = _list_cassava_part(base, "test")
    validation = _list_cassava_part(base, "validation")
    missing = sorted(set(CASSAVA_CLASSES) - {path.name for path in _list_folders(base / "train")})
    if missing:
        where = base / "train"
        raise DataError("class folders are missing", where=where, got=shorten(missing))
    if extra and not validation:
        expected = "validation/ with class folders"
        raise DataError("there are no extra images", where=base, expected=expected)
    notes = []
    if validation and not extra:
        notes.append(
            f"{len(validation):,} validation images are not used; data.extra = true adds them "
            "to the training set"
        )
    if _list_folders(base / "test") and not test:
        notes.append(_NO_TEST_LABELS)
    items = train + (validation if extra else []) + test
    return _make_listing("icassava2019", items, CASSAVA_CLASSES, notes, extra)


def _list_cassava_part(base: Path, folder: str) -> list[ListedImage]:
    part = "test" if folder == "test" else "train"
    return [
        ListedImage(
            path.relative_to(base).as_posix(), str(path), label=class_folder.name, part=part
        )
        for class_folder in _list_folders(base / folder)
        if class_folder.name in CASSAVA_CLASSES
        for path in _list_images(class_folder)
    ]


def list_cassava2020(root: Path) -> Listing:
    """List Kaggle's Cassava Leaf Disease Classification 2020.

    Nothing is held out: the test images of the competition have no labels.

    Args:
        root: folder of train.csv, label_num_to_disease_map.json and train_images/, the folder
            above it, or the archive.

    Raises:
        DataError: a file is missing or damaged, or the table has labels without a name.
    """
    base = _find_base(
        root,
        ("cassava-leaf-disease-classification.zip",),
        lambda folder: (folder / "train_images").is_dir(),
        name="cassava2020",
        expected="train.csv, label_num_to_disease_map.json and train_images/",
    )
    table = base / "train.csv"
    try:
        names_text = (base / "label_num_to_disease_map.json").read_text("utf-8")
        names = {int(number): str(name) for number, name in json.loads(names_text).items()}
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = [
                (f"train_images/{safe_name(row['image_id'])}", names[int(row["label"])])
                for row in csv.DictReader(stream, strict=True)
            ]
    except OSError as error:
        raise DataError("cannot read the file", where=error.filename, got=error) from None
    except (csv.Error, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        got = f"{type(error).__name__} {error}"
        expected = "image_id,label"
        raise DataError(
            "the labels cannot be read", where=table, expected=expected, got=got
        ) from None
    items = [ListedImage(file, str(base / file), label=label, part="train") for file, label in rows]
    _check_files(items, table)
    notes = [_NO_TEST_LABELS] if (base / "test_images").is_dir() else []
    return _make_listing("cassava2020", items, [names[number] for number in sorted(names)], notes)


# Surrey


def list_surrey(root: Path) -> Listing:
    """List Surrey's ASL finger spelling, data set A (Pugeault and Bowden 2011).

    There are 24 letters (j and z are movements). Depth images are not used. The group of an image
    is its signer, A to E, for `folds.scheme = "leave-one-group-out"`; nothing is held out.

    Args:
        root: dataset5 (with <signer>/<letter>/color_*.png), a folder above it, or
            fingerspelling5.tar.bz2.

    Raises:
        DataError: there is no such folder, or a signer has folders that are not letters.
    """
    base = _find_base(
        root,
        ("fingerspelling5.tar.bz2",),
        lambda folder: (folder / "A/a").is_dir(),
        name="surrey-asl",
        expected="dataset5/A/a and so on",
    )
    items = []
    num_depth = 0
    for signer in _list_folders(base):
        if len(signer.name) != 1:
            continue
        letters = _list_folders(signer)
        unknown = [folder.name for folder in letters if folder.name not in SURREY_LETTERS]
        if unknown:
            what = "folders are none of the 24 letters"
            raise DataError(what, where=signer, got=shorten(unknown))
        for letter in letters:
            for path in _list_images(letter):
                if not path.name.startswith("color_"):
                    num_depth += 1
                    continue
                items.append(
                    ListedImage(
                        id=path.relative_to(base).as_posix(),
                        path=str(path),
                        label=letter.name,
                        part="train",
                        group=signer.name,
                    )
                )
    notes = [f"{num_depth:,} depth images are not used"] if num_depth else []
    return _make_listing("surrey-asl", items, SURREY_LETTERS, notes)
