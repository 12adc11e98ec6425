"""Whether several workers with few threads are faster than one with many, on this machine.

    uv run python bench/workers.py [--layouts 1x2,2x1] [--folds 4] [--images 40] [--side 96] \
        [--backbone tf_efficientnet_lite0] [--rounds 3] [--json FILE]

A layout WxT is W worker processes with T threads each (1xT: one process, no workers). Each trains
the same recipe (one member from random weights, one epoch) on the same coloured noise, in a folder
of its own. The layouts take turns, so that a busy neighbour slows all of them. Time is wall time of
`train`, with the start of the workers; `jobs` is that from the first job's start to the end of the
last. The weights of layouts with equal threads are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from noise_runs import add_options, job_seconds, start_training, write_images, write_record

from threefold.files import sha256


def write_recipe(path: Path, images: Path, options: argparse.Namespace, workers: int) -> None:
    """Write a recipe with one member and a stage of one epoch."""
    path.write_text(
        f'name = "workers"\n[data]\nroot = "{images}"\n[folds]\nk = {options.folds}\n'
        f'[train]\ndevices = {workers}\nprecision = "float32"\nbatch_size = 16\ndevice = "cpu"\n'
        '[[stages]]\nname = "one"\nepochs = 1\nlr = 1e-3\n'
        f'[[members]]\nname = "m"\nbackbone = "{options.backbone}"\nweights = "none"\n'
        f"img_size = {options.side}\n",
        encoding="utf-8",
    )


def train(folder: Path, recipe: Path, threads: int) -> tuple[float, float, str]:
    """Train in a new process; returns seconds, those of the jobs, and a hash of all weights."""
    began = time.monotonic()
    jobs = job_seconds(start_training(recipe, folder, threads))
    seconds = time.monotonic() - began
    hashes = " ".join(sha256(path) for path in sorted(folder.rglob("weights.safetensors")))
    return seconds, jobs, hashes


def main() -> None:
    """Measure, print a table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", default="1x2,2x1")
    add_options(parser, folds=4, images=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    layouts = [tuple(map(int, text.split("x"))) for text in options.layouts.split(",")]
    taken: dict[tuple[int, ...], list[tuple[float, float]]] = {layout: [] for layout in layouts}
    weights: dict[int, set[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        images = Path(place) / "images"
        write_images(images, options.images, options.side)
        for turn in range(options.rounds):
            for workers, threads in layouts:
                recipe = Path(place) / "recipe.toml"
                write_recipe(recipe, images, options, workers)
                folder = Path(place) / f"{workers}x{threads}-{turn}"
                seconds, jobs, hashes = train(folder, recipe, workers * threads)
                taken[workers, threads].append((seconds, jobs))
                weights.setdefault(threads, set()).add(hashes)
    rows = [
        {
            "workers": workers,
            "threads": threads,
            "seconds": round(statistics.median(total for total, _ in values), 2),
            "jobs": round(statistics.median(jobs for _, jobs in values), 2),
        }
        for (workers, threads), values in taken.items()
    ]
    for row in rows:
        print(
            f"{row['workers']} x {row['threads']} threads: {row['seconds']:.1f} s, "
            f"jobs {row['jobs']:.1f} s, {rows[0]['jobs'] / row['jobs']:.2f} x the first"
        )
    same = all(len(hashes) == 1 for hashes in weights.values())
    print(f"weights of equal threads are {'equal' if same else 'DIFFERENT'}")
    if options.json:
        write_record(options.json, rows, equal=same)


if __name__ == "__main__":
    main()
