"""A development set as photographs of a telephone: large JPEG files, for peers.py.

    uv run python bench/enlarge_photos.py --data ARCHIVES --work FOLDER [--sets flowers5]
        [--width 4000] [--height 3000] [--train 60] [--test 40]
    uv run --group bench python bench/peers.py run --work FOLDER --sets flowers5 --budgets 2

The images of peers.py are small, so decoding them costs nothing. Here the first images of each
class are enlarged, with noise in patches of 4 x 4 pixels, which gives the files (some 2 MB) the
size of real ones. `peers.py` finds the set in FOLDER and takes it as it is.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from development_sets import prepare
from PIL import Image

NOISE = 6.0
"""Standard deviation of the noise, of 255."""
PATCH = 4
"""Pixels along a side that share their noise."""
QUALITY = 88
"""Of the JPEG files."""


def enlarge(source: Path, target: Path, width: int, height: int, seed: int) -> None:
    """Write an image as a large photograph."""
    image = Image.open(source).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = -(-height // PATCH), -(-width // PATCH)
    noise = np.random.default_rng(seed).normal(0, NOISE, (rows, columns, 3)).astype(np.float32)
    noise = noise.repeat(PATCH, 0).repeat(PATCH, 1)[:height, :width]
    pixels = np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(target, quality=QUALITY)


def enlarge_set(small: Path, large: Path, counts: dict[str, int], width: int, height: int) -> int:
    """Write the first images of each class of a set.

    Args:
        small: the set, with splits of class folders.
        large: where the large ones go.
        counts: images of each class, by split.
        width: of the large images, in pixels.
        height: likewise.

    Returns:
        How many images were written.
    """
    jobs = []
    for split, count in counts.items():
        for folder in sorted(path for path in (small / split).iterdir() if path.is_dir()):
            for path in sorted(folder.iterdir())[:count]:
                jobs.append((path, large / split / folder.name / f"{path.stem}.jpg"))
    with ThreadPoolExecutor(2) as pool:
        numbered = enumerate(jobs)
        list(pool.map(lambda job: enlarge(*job[1], width, height, job[0]), numbered))
    return len(jobs)


def main() -> None:
    """Write the sets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, help="folder of the archives")
    parser.add_argument("--work", type=Path, required=True, help="folder that peers.py is given")
    parser.add_argument("--sets", default="flowers5")
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--train", type=int, default=60, help="training images of each class")
    parser.add_argument("--test", type=int, default=40, help="test images of each class")
    args = parser.parse_args()
    for name in args.sets.split(","):
        small = prepare(name, args.data, args.work / "small")
        large = args.work / "sets" / name
        if large.exists():
            parser.error(f"{large} is there already")
        counts = {"train": args.train, "test": args.test}
        count = enlarge_set(small, large, counts, args.width, args.height)
        print(f"{large}: {count} photographs of {args.width} x {args.height}")


if __name__ == "__main__":
    main()
