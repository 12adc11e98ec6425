"""Does a recurrent head help? The recipe `heads` with several seeds, its members paired image by image.

    uv run python bench/head_seeds.py [--runs FOLDER] [--seeds 5] [--set a.b=c ...]

Finished runs in the folder are read, missing ones are trained. Each head against `std`: the mean paired difference in
accuracy with an interval for other seeds AND other images (`paired.seeds_difference`, crossed random effects), and per
seed the exact McNemar counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from threefold import train
from threefold.paired import mcnemar_exact, seeds_difference
from threefold.predictions import Predictions
from threefold.provenance import commit, hardware
from threefold.recipe import packaged


def table(kind: str, rows: list[Predictions]) -> None:
    """One line per head."""
    hits = np.stack([p.probs.argmax(-1) == p.labels for p in rows]).astype(
        float
    )  # seeds, members, images
    print(f"\n{kind}, {hits.shape[2]} images, {hits.shape[0]} seeds")
    print(
        f"{'head':14}{'accuracy':>10}{'lowest':>9}{'highest':>9}{'minus std':>11}{'95 % interval':>22}{'p':>7}  McNemar, by seed"
    )
    for i, name in enumerate(rows[0].members):
        per_seed = hits[:, i].mean(1)
        cells = f"{name:14}{per_seed.mean():10.4f}{per_seed.min():9.4f}{per_seed.max():9.4f}"
        if i:
            found = seeds_difference(hits[:, i] > 0, hits[:, 0] > 0)
            counts = [mcnemar_exact(a[i] > 0, a[0] > 0) for a in hits]
            words = ", ".join(f"{c.only_a}:{c.only_b} (p {c.p:.2g})" for c in counts)
            cells += f"{found.estimate:+11.4f}{f'[{found.low:+.4f}, {found.high:+.4f}]':>22}{found.p:7.2f}  {words}"
        print(cells)


def main() -> None:
    """Train what is missing, then print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/heads"))
    parser.add_argument("--recipe", default="heads")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    runs = [
        train(packaged(args.recipe, [*args.set, f"seed={seed}"]), args.runs / f"seed{seed}")
        for seed in range(args.seeds)
    ]
    minutes = sum(run.results.seconds["train"] for run in runs) / 60
    first = runs[0].results
    print(
        f"{args.recipe}: {minutes:.0f} minutes of training, "
        f"{first.hardware}, {first.threads} threads,"
    )
    print(
        f"trained at commit {first.commit}, {first.created[:10]}; read on {hardware()}, {commit()}"
    )
    table("out of fold", [run.predictions("oof") for run in runs])
    if runs[0].sources.test is not None:
        table("test (two fold models averaged)", [run.predictions("test") for run in runs])


if __name__ == "__main__":
    main()
