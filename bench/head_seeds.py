"""Does a recurrent head help? Compare the heads of the recipe `heads` over several seeds.

    uv run python bench/head_seeds.py [--runs FOLDER] [--seeds 5] [--set a.b=c ...]

Missing runs in the folder are trained. For each head the tables have the mean paired difference in
accuracy to `std`, its interval for other seeds and other images (`seeds_difference`, crossed random
effects), and the exact McNemar counts of each seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from threefold import train
from threefold.predictions.predictions import Predictions
from threefold.recipe import packaged
from threefold.stats.paired_tests import mcnemar_exact, seeds_difference
from threefold.training.provenance import commit, hardware


def print_table(kind: str, rows: list[Predictions]) -> None:
    """Print one line per head."""
    hits = np.stack([p.probs.argmax(-1) == p.labels for p in rows])  # (seeds, members, images)
    print(f"\n{kind}, {hits.shape[2]} images, {hits.shape[0]} seeds")
    print(
        f"{'head':14}{'accuracy':>10}{'lowest':>9}{'highest':>9}{'minus std':>11}"
        f"{'95 % interval':>22}{'p':>7}  McNemar, by seed"
    )
    for i, name in enumerate(rows[0].members):
        per_seed = hits[:, i].mean(1)
        cells = f"{name:14}{per_seed.mean():10.4f}{per_seed.min():9.4f}{per_seed.max():9.4f}"
        if i:
            difference = seeds_difference(hits[:, i], hits[:, 0])
            interval = f"[{difference.low:+.4f}, {difference.high:+.4f}]"
            tests = [mcnemar_exact(seed[i], seed[0]) for seed in hits]
            counts = ", ".join(f"{test.only_a}:{test.only_b} (p {test.p:.2g})" for test in tests)
            cells += f"{difference.estimate:+11.4f}{interval:>22}{difference.p:7.2f}  {counts}"
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
    print_table("out of fold", [run.predictions("oof") for run in runs])
    if runs[0].sources.test is not None:
        print_table("test (two fold models averaged)", [run.predictions("test") for run in runs])


if __name__ == "__main__":
    main()
