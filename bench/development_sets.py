"""The seven development sets as folders: OUT/NAME/train/CLASS and OUT/NAME/test/CLASS.

    uv run python bench/development_sets.py --data ARCHIVES --out FOLDER [--sets elpv,demo]

ARCHIVES is a folder with trashnet.tar.gz, flowers5.tar.gz, elpv.tar.gz, brain_mri.tar.gz,
sign_digits.tar.gz and cifar10_jpeg.tar.gz; docs/results.md names their sources. `demo` is written
from the project's own images. Some sets hold several images of one pupil or one panel: their group
is part of each file's name, and `SETS` has the pattern that finds it.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

PARTS = ("train", "test")
CIFAR_IMAGES = 200
"""Images of each class that the small CIFAR-10 takes, in train and in test."""


class DevelopmentSet(NamedTuple):
    """A data set of small size with a fixed test part."""

    name: str
    archive: str
    """File name of the archive; empty = the project's own images."""
    group_regex: str = ""
    """Finds the group in a file's name; empty = the images have no groups."""

    def groups(self, names: list[str]) -> list[str] | None:
        """Return the group of each image, or None if the set has no groups.

        Args:
            names: file names.
        """
        if not self.group_regex:
            return None
        groups = []
        for name in names:
            match = re.search(self.group_regex, name)
            if match is None:
                raise SystemExit(f"{self.name}: no group ({self.group_regex}) in {name}")
            groups.append(match.group())
        return groups


SETS = {
    item.name: item
    for item in (
        DevelopmentSet("trashnet", "trashnet.tar.gz"),
        DevelopmentSet("flowers5", "flowers5.tar.gz"),
        DevelopmentSet("elpv", "elpv.tar.gz", r"block\d+"),
        DevelopmentSet("brain_mri", "brain_mri.tar.gz"),
        DevelopmentSet("sign_digits", "sign_digits.tar.gz", r"run\d+"),
        DevelopmentSet("cifar10", "cifar10_jpeg.tar.gz"),
        DevelopmentSet("demo", ""),
    )
}


def prepare(name: str, archives: Path | None, out: Path) -> Path:
    """Write a development set and return its folder; a folder that is there already is kept.

    Args:
        name: a key of `SETS`.
        archives: the folder of the .tar.gz files; None = the set is there, or needs none.
        out: where the folder NAME is made. It is renamed into place once complete.
    """
    target = out / name
    if target.exists():
        return target
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        unpacked, made = Path(temporary) / "unpacked", Path(temporary) / "made"
        if name == "demo":
            _write_demo(made)
        else:
            path = (archives or Path()) / SETS[name].archive
            if not path.exists():
                raise SystemExit(f"{path} is missing: name its folder by --data")
            with tarfile.open(path) as archive:
                archive.extractall(unpacked, filter="data")
            _arrange(name, unpacked, made)
        made.rename(target)
    return target


def images_of(folder: Path) -> list[tuple[Path, str]]:
    """List (path, class) of the images in class folders, in order of their path."""
    paths = sorted(path for path in folder.glob("*/*") if path.is_file())
    return [(path, path.parent.name) for path in paths]


def groups_of_test_images(name: str, folder: Path) -> list[str] | None:
    """Return the group of each test image, in the order of `images_of`; None without groups.

    Args:
        name: a key of `SETS`.
        folder: the set, as `prepare` returns it.
    """
    return SETS[name].groups([path.name for path, _ in images_of(folder / "test")])


def _arrange(name: str, unpacked: Path, made: Path) -> None:
    """Move the images of an unpacked archive to made/PART/CLASS."""
    if name == "sign_digits":
        moves = _sign_digits(unpacked / name)
    elif name == "cifar10":
        moves = _first_of_each_class(unpacked)
    else:
        shutil.move(unpacked / name, made)
        return
    for source, place in moves:
        target = made / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target)


def _sign_digits(folder: Path) -> Iterator[tuple[Path, str]]:
    """Sort the photographs by splits.csv; each file's name begins with its pupil."""
    with (folder / "splits.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            image = folder / row["path"]
            yield image, f"{row['split']}/{row['label']}/{row['group']}_{image.name}"


def _first_of_each_class(folder: Path) -> Iterator[tuple[Path, str]]:
    """Take the first images of each class by name, in train and in test."""
    for part in PARTS:
        for class_folder in sorted((folder / part).iterdir()):
            for image in sorted(class_folder.iterdir())[:CIFAR_IMAGES]:
                yield image, f"{part}/{class_folder.name}/{image.name}"


def _write_demo(made: Path) -> None:
    """Write the project's Fashion-MNIST images as PNG."""
    # Not at the top: peers, whose start-up is timed, list images with this module.
    from threefold.data.load import load_data
    from threefold.recipe.schema import DataSpec

    sources = load_data(DataSpec(source="demo"), seed=0)
    for part, images in zip(PARTS, (sources.train, sources.test), strict=True):
        assert images is not None
        for row, label in enumerate(images.labels):
            # Class names hold slashes and spaces.
            name = re.sub(r"[^A-Za-z0-9]+", "-", images.classes[label])
            path = made / part / name / f"{row:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.pixels(row)[..., 0]).save(path)


def main() -> None:
    """Write the sets and print how many images and groups each has."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", default=",".join(SETS))
    args = parser.parse_args()
    for name in args.sets.split(","):
        folder = prepare(name, args.data, args.out)
        for part in PARTS:
            images = images_of(folder / part)
            groups = SETS[name].groups([path.name for path, _ in images])
            count = f", {len(set(groups))} groups" if groups else ""
            print(
                f"{name} {part}: {len(images)} images, {len({c for _, c in images})} classes{count}"
            )


if __name__ == "__main__":
    main()
