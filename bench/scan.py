"""How long a command takes before it knows its images: a folder of many small files.

    uv run python bench/scan.py --out DISK [--images 1000000] [--classes 1000] [--parts list,known]

DISK is a folder on the disk to be measured; a folder in it is filled with hard links to a few
images of 1 KB, and deleted at the end. Each part runs in a process of its own, whose processor time
(user and system), wall time and largest memory are printed:

- list: names, classes and ids, from the folder alone.
- first: `load_data` for the first time: every image is read, hashed and decoded.
- known: `load_data` again, when the cache knows every image: names, sizes and times only.

For `known` the cache is filled without decoding, so that it can be measured without `first`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LINKS = 20_000
"""Links to one file; file systems limit them."""


def make_images(folder: Path, count: int, classes: int) -> None:
    """Fill class folders with links to JPEG files of 24 x 24."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label:05d}").mkdir(parents=True)
    source = ""
    for number in range(count):
        path = f"{folder}/class{number % classes:05d}/{number:08d}.jpg"
        if number % LINKS == 0:
            pixels = rng.integers(256, size=(24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path, quality=60)
            source = path
        else:
            os.link(source, path)


def run_part(part: str, folder: Path) -> None:
    """Do what a part measures."""
    from threefold.data.load import load_data
    from threefold.data.sources.folder import list_folder
    from threefold.recipe.schema import DataSpec

    spec = DataSpec(source="folder", root=str(folder))
    if part == "list":
        print(f"{len(list_folder(folder).items):,} listed", file=sys.stderr)
    elif part == "fill":
        remember(folder)
    else:
        print(f"{len(load_data(spec, 0).train):,} loaded", file=sys.stderr)


def remember(folder: Path) -> None:
    """Write that every image is sound, without a look at it."""
    from threefold.data import verified
    from threefold.data.sources.folder import list_folder

    items = list_folder(folder).items
    records = np.zeros((len(items), 32), np.uint8)
    names = verified.identify_images(items, None)
    records[:, :16] = np.frombuffer(names.tobytes(), np.uint8).reshape(-1, 16)
    records[:, 16:] = np.random.default_rng(0).integers(1, 256, (len(items), 16))
    path = verified.Known(f"folder {folder}").path
    path.parent.mkdir(parents=True, exist_ok=True)
    records.tofile(path)


def main() -> None:
    """Fill the folder, and print a row for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--parts", default="list,known")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options.part, options.out)
        return
    print("| part | images | processor s | wall s | peak MB |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=options.out) as name:
        images = Path(name).resolve() / "images"
        make_images(images, options.images, options.classes)
        os.environ["THREEFOLD_CACHE"] = str(Path(name) / "cache")
        time.sleep(3)  # files that are newer than two seconds are not remembered
        for part in options.parts.split(","):
            command = [sys.executable, __file__, "--out", str(images), "--part"]
            if part == "known":
                subprocess.run([*command, "fill"], check=True)
            began = time.perf_counter()
            process = subprocess.Popen([*command, part])
            _, status, usage = os.wait4(process.pid, 0)
            if os.waitstatus_to_exitcode(status):
                raise SystemExit(f"{part} failed")
            wall = time.perf_counter() - began
            seconds = usage.ru_utime + usage.ru_stime
            peak = usage.ru_maxrss / 1024
            row = f"| {part} | {options.images:,} | {seconds:.1f} | {wall:.1f} | {peak:.0f} |"
            print(row, flush=True)
    # At the end, since it imports torch: a child's peak counts its parent's memory at the fork.
    from threefold.training.provenance import commit, hardware

    print(f"\n{datetime.date.today()}, {hardware()}, commit {commit()}")


if __name__ == "__main__":
    main()
