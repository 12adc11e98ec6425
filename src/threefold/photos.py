"""Data sets of image files in their official layouts: iNaturalist 2019, both Cassava sets, Surrey ASL finger spelling.

Each may lie unpacked or as the official archive; an archive is unpacked once, beside itself, into
`<archive>.unpacked/` (see `archives.unpack`). Images without labels are not used, and counted in the notes.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from threefold.archives import read_members, safe_name, unpack_beside
from threefold.data__published import CASSAVA_CLASSES, SURREY_LETTERS, count_note
from threefold.errors import DataError
from threefold.images import IMAGE_SUFFIXES
from threefold.listing import ListedImage, Listing, shorten


def _found(
    root: Path, archives: tuple[str, ...], has: Callable[[Path], bool], name: str, expected: str
) -> Path:
    """The folder that `has` what is looked for: `root`, a folder in it, or what its archives unpack to.

    Kaggle's archives hold archives, so what was unpacked is looked through in the same way.
    """
    ahead = [root]
    while ahead:
        place = ahead.pop(0)
        if place.is_file():
            ahead.append(unpack_beside(place))
            continue
        found = next((folder for folder in (place, *_folders(place)) if has(folder)), None)
        if found:
            return found
        ahead += [place / archive for archive in archives if (place / archive).is_file()]
    fix = f"set data.root to its folder or archive, or run: threefold data fetch {name} --to {root}"
    raise DataError("the data set is not there", where=root, expected=expected, fix=fix)


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, by name, without hidden files; nothing if there is no such folder."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(
            "cannot read the folder", where=folder, got=error.strerror or error
        ) from None


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _images(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def _require(items: list[ListedImage], table: Path) -> None:
    """Listed files have to exist, and only once."""
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise DataError("images are listed twice", where=table, got=shorten(twice))
    absent = [item.id for item in items if not item.path.is_file()]
    if absent:
        fix = "unpack the official archive again; it holds every listed image"
        raise DataError(
            f"{len(absent)} listed images do not exist", where=table, got=shorten(absent), fix=fix
        )


def _listing(
    name: str,
    items: list[ListedImage],
    classes: Iterable[str],
    notes: list[str],
    extra: bool = False,
) -> Listing:
    parts = Counter(item.part for item in items)
    return Listing(
        items, count_note(name, parts["train"], parts["test"], extra) + notes, tuple(classes)
    )


# iNaturalist 2019 -----------------------------------------------------------------------------------------------------


def list_inaturalist(root: Path, extra: bool) -> Listing:
    """iNaturalist 2019 (Van Horn et al. 2018; 1,010 species): train2019.json, val2019.json and train_val2019/.

    The official validation images are the held-out ones: the official test images have no labels. Classes are in the
    order of their numbers; where categories.json lies there too, they have its names and not the obfuscated ones.

    Args:
        root: folder of the official files; the images and each .json may still be in their .tar.gz.
        extra: train on the validation images too, as the paper did before it split all images itself.

    Raises:
        DataError: files are missing, or the annotations contradict each other.
    """
    expected = "train_val2019/ (or train_val2019.tar.gz), train2019.json and val2019.json"
    archives = ("train_val2019.tar.gz",)
    images = _found(
        root, archives, lambda at: (at / "train_val2019").is_dir(), "inaturalist2019", expected
    )
    folders = [images, root.parent if root.is_file() else root, images.parent]
    trees = {part: _annotations(folders, f"{part}2019.json") for part in ("train", "val")}
    names = _category_names(folders, trees["train"][1])
    items = [
        ListedImage(
            file, images / file, names[label], "test" if part == "val" and not extra else "train"
        )
        for part, (table, tree) in trees.items()
        for file, label in _labelled(tree, names, table)
    ]
    _require(items, trees["train"][0])
    notes = ["the official validation images are trained on: nothing is held out"] if extra else []
    return _listing(
        "inaturalist2019", items, [names[number] for number in sorted(names)], notes, extra
    )


def _annotations(folders: list[Path], name: str) -> tuple[Path, Any]:
    """A JSON file, or the one in its archive."""
    for folder in folders:
        for path in (folder / name, folder / f"{name}.tar.gz"):
            if path.is_file():
                try:
                    content = (
                        path.read_bytes()
                        if path.suffix == ".json"
                        else read_members(path, [name]).get(name, b"")
                    )
                    return path, json.loads(content)
                except OSError as error:
                    raise DataError(
                        "cannot read the file", where=path, got=error.strerror or error
                    ) from None
                except (ValueError, RecursionError) as error:
                    raise DataError("not valid JSON", where=path, got=error) from None
    raise DataError("there is no such file of iNaturalist 2019", where=folders[0] / name)


def _category_names(folders: list[Path], tree: Any) -> dict[int, str]:
    """Class name by category number; numbers are added to names that several categories have."""
    table = next((folder for folder in folders if any(folder.glob("categories.json*"))), None)
    found = _annotations([table], "categories.json")[1] if table else tree
    try:
        listed = found["categories"] if isinstance(found, dict) else found
        names = {int(entry["id"]): str(entry["name"]) for entry in listed}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "the categories cannot be read", where=folders[0], got=f"{type(error).__name__} {error}"
        ) from None
    count = Counter(names.values())
    return {
        number: name if count[name] == 1 else f"{name} ({number})" for number, name in names.items()
    }


def _labelled(tree: Any, names: dict[int, str], table: Path) -> list[tuple[str, int]]:
    """File name and category number of each annotation."""
    try:
        files = {image["id"]: safe_name(image["file_name"]) for image in tree["images"]}
        rows = [
            (files[entry["image_id"]], int(entry["category_id"])) for entry in tree["annotations"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "the annotations cannot be read", where=table, got=f"{type(error).__name__} {error}"
        ) from None
    unknown = sorted({label for _, label in rows} - set(names))
    if unknown:
        raise DataError("labels have no category", where=table, got=shorten(map(str, unknown)))
    return rows


# Cassava --------------------------------------------------------------------------------------------------------------


def list_icassava(root: Path, extra: bool) -> Listing:
    """iCassava 2019 (Mwebaze et al. 2019): class folders cbb, cbsd, cgm, cmd, healthy below train/.

    Two editions are read. Kaggle's has no labels for its test images, so nothing is held out. The one that
    tensorflow_datasets uses (cassavaleafdata.zip) has labelled test/ and validation/ too.

    Args:
        root: folder with train/, a folder above it, or the archive (Kaggle's may hold train.zip).
        extra: add the images of validation/ to the training set.

    Raises:
        DataError: there is no such folder, or class folders are missing.
    """
    archives = ("cassavaleafdata.zip", "cassava-disease.zip", "train.zip")
    base = _found(
        root,
        archives,
        lambda folder: (folder / "train/cmd").is_dir(),
        "icassava2019",
        "train/cmd and so on",
    )
    parts = {part: _folders(base / part) for part in ("train", "validation", "test")}
    items, notes = [], []
    for part, folders in parts.items():
        known = [folder for folder in folders if folder.name in CASSAVA_CLASSES]
        if part == "train" and len(known) < len(CASSAVA_CLASSES):
            absent = sorted(set(CASSAVA_CLASSES) - {folder.name for folder in known})
            raise DataError("class folders are missing", where=base / part, got=shorten(absent))
        if part == "validation" and not extra and known:
            unused = sum(len(_images(folder)) for folder in known)
            notes.append(
                f"{unused:,} validation images are not used; data.extra = true adds them to the training set"
            )
            continue
        for folder in known:
            items += [
                ListedImage(
                    path.relative_to(base).as_posix(),
                    path,
                    folder.name,
                    "test" if part == "test" else "train",
                )
                for path in _images(folder)
            ]
    if extra and not any(item.id.startswith("validation/") for item in items):
        raise DataError(
            "there are no extra images", where=base, expected="validation/ with class folders"
        )
    if parts["test"] and not any(item.part == "test" for item in items):
        notes.append("the test images have no labels and are not used")
    return _listing("icassava2019", items, CASSAVA_CLASSES, notes, extra)


def list_cassava2020(root: Path) -> Listing:
    """Kaggle's Cassava Leaf Disease Classification 2020: train.csv, label_num_to_disease_map.json, train_images/.

    Nothing is held out: the test images of the competition have no labels.

    Args:
        root: that folder, one above it, or the archive.

    Raises:
        DataError: a file is missing or damaged, or the table has labels that have no name.
    """
    archives = ("cassava-leaf-disease-classification.zip",)
    expected = "train.csv, label_num_to_disease_map.json and train_images/"
    base = _found(
        root, archives, lambda folder: (folder / "train_images").is_dir(), "cassava2020", expected
    )
    table, names_file = base / "train.csv", base / "label_num_to_disease_map.json"
    try:
        names = {
            int(number): str(name)
            for number, name in json.loads(names_file.read_text("utf-8")).items()
        }
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = [
                (safe_name(row["image_id"]), int(row["label"]))
                for row in csv.DictReader(stream, strict=True)
            ]
        items = [
            ListedImage(f"train_images/{file}", base / "train_images" / file, names[label], "train")
            for file, label in rows
        ]
    except OSError as error:
        raise DataError(
            "cannot read the file", where=error.filename, got=error.strerror or error
        ) from None
    except (csv.Error, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        got = f"{type(error).__name__} {error}"
        raise DataError(
            "the labels cannot be read", where=table, expected="image_id,label", got=got
        ) from None
    _require(items, table)
    notes = (
        ["the test images have no labels and are not used"]
        if (base / "test_images").is_dir()
        else []
    )
    return _listing("cassava2020", items, [names[number] for number in sorted(names)], notes)


# Surrey ---------------------------------------------------------------------------------------------------------------


def list_surrey(root: Path) -> Listing:
    """Surrey's ASL finger spelling, data set A (Pugeault and Bowden 2011): dataset5/<signer>/<letter>/color_*.png.

    24 letters (j and z are movements). Depth images are not used. The group of an image is its signer, A to E, for
    `folds.scheme = "leave-one-group-out"`; nothing is held out.

    Args:
        root: dataset5, a folder above it, or fingerspelling5.tar.bz2.

    Raises:
        DataError: there is no such folder, or a signer has folders that are no letters.
    """
    archives = ("fingerspelling5.tar.bz2",)
    base = _found(
        root,
        archives,
        lambda folder: (folder / "A/a").is_dir(),
        "surrey-asl",
        "dataset5/A/a and so on",
    )
    items, depth = [], 0
    for signer in _folders(base):
        if len(signer.name) != 1:
            continue
        strange = [folder.name for folder in _folders(signer) if folder.name not in SURREY_LETTERS]
        if strange:
            raise DataError(
                "folders are none of the 24 letters", where=signer, got=shorten(strange)
            )
        for letter in _folders(signer):
            images = _images(letter)
            colour = [path for path in images if path.name.startswith("color_")]
            depth += len(images) - len(colour)
            items += [
                ListedImage(
                    path.relative_to(base).as_posix(), path, letter.name, "train", signer.name
                )
                for path in colour
            ]
    notes = [f"{depth:,} depth images are not used"] if depth else []
    return _listing("surrey-asl", items, SURREY_LETTERS, notes)
