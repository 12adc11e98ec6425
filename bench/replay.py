"""Test the authors' own Fashion-MNIST predictions again, and the choice between their ensembles.

    uv run python bench/replay.py PREDS.npz [--methods mean,pool,...] [--all]

PREDS.npz holds the authors' ten softmax outputs on the 10,000 test images, named by `members`.
Three tables are printed:

pairs: the paper's comparisons, with discordant rows, exact McNemar tests, and the number of images
needed to show a difference of this size. Verdicts take each question alone; Holm adjusts for all.
choice: the best subset for the mean of the members, chosen on the scored rows (as in the paper) and
cross-fitted.
methods: every ensemble of all members (copies counted once), cross-fitted in five stratified parts
and compared with the mean. `--all` adds the two that train a network (minutes).
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np

from threefold.ensembles.cross_fit import cross_fit, stratified_parts
from threefold.ensembles.diversity import distinct, duplicates
from threefold.ensembles.registry import ENSEMBLES, make_ensemble
from threefold.ensembles.scaling import apply_temperature, fit_temperature
from threefold.predictions.checks import FLOOR
from threefold.predictions.predictions import Predictions
from threefold.stats.paired_differences import Difference, paired_bootstrap
from threefold.stats.paired_tests import holm, mcnemar_exact, verdict
from threefold.stats.sample_size import required_rows_from_counts
from threefold.stats.scores import wilson_interval
from threefold.training.provenance import commit, hardware

NETWORKS = ("stacked-shrunk", "stacked")
SHORT = {
    "FashionMNIST_": "",
    "MulModel_": "",
    "Mixed_STDSE_LSTMXc_STD_IcR_299_": "Mixed/",
    "_Mul": "",
    "_2111_v1": "",
}


def short(name: str) -> str:
    """Shorten a member's name to what tells it from the others."""
    for long, brief in SHORT.items():
        name = name.replace(long, brief)
    return name


def share(hits: np.ndarray) -> str:
    """Accuracy with Wilson's interval."""
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return f"{hits.mean():.4f} [{low:.4f}, {high:.4f}]"


def signed(difference: Difference) -> str:
    """A difference with its interval."""
    return f"{difference.estimate:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def pairs(hits: dict[str, np.ndarray], table: list[tuple[str, str]]) -> None:
    """One line per comparison of two rows of hits."""
    print(
        f"\n{'pairs':47}{'right alone':>12}{'difference, 95 % interval':>29}"
        f"{'p':>9}{'Holm':>9}{'images needed':>15}"
    )
    tests = [mcnemar_exact(hits[a], hits[b]) for a, b in table]
    for (a, b), (only_a, only_b, p), adjusted in zip(
        table, tests, holm([test.p for test in tests]), strict=True
    ):
        n = len(hits[a])
        needed = (
            f"{required_rows_from_counts(only_a, only_b, n):,}" if only_a != only_b else "no number"
        )
        difference = signed(paired_bootstrap(hits[a], hits[b]))
        print(
            f"{a + ' - ' + b:47}{f'{only_a} : {only_b}':>12}{difference:>29}"
            f"{p:9.4f}{adjusted:9.4f}{needed:>15}"
        )
        print(f"    {verdict(a, b, only_a, only_b, p, test='exact McNemar', n=n)}")


def claims(rows: Predictions) -> None:
    """The paper's comparisons."""
    hits = {
        short(name): probs.argmax(-1) == rows.labels
        for name, probs in zip(rows.members, rows.probs, strict=True)
    }
    mixed = rows.select([name for name in rows.members if "_Mixed_" in name])
    for method in ("mean", "pruned", "vote"):
        hits[method] = make_ensemble(method).predict_proba(mixed.probs).argmax(-1) == rows.labels
    best = short(max(mixed.members, key=lambda name: hits[short(name)].sum()))
    std, gru = "SEResNext101_LRG299", "SEResNext101_LRG299_GRU"
    for name in ("mean", "pruned", "vote", best, std, gru):
        print(f"{name:32}{share(hits[name])}")
    table = [
        ("mean", best),
        ("pruned", best),
        ("vote", best),
        ("mean", "pruned"),
        (std, gru),
        (best, std),
    ]
    pairs(hits, table)


def subset_hits(probs: np.ndarray, labels: np.ndarray) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """List all subsets of the members, and the hits of their means (subsets, n)."""
    numbers = range(len(probs))
    subsets = [
        s for size in range(1, len(probs) + 1) for s in itertools.combinations(numbers, size)
    ]
    return subsets, np.stack(
        [probs[list(s)].sum(0, dtype=np.float64).argmax(-1) == labels for s in subsets]
    )


def choice(rows: Predictions, keep: list[int]) -> None:
    """The best subset, apparent and cross-fitted, against the mean of all."""
    probs, labels = rows.probs[keep], rows.labels
    subsets, hits = subset_hits(probs, labels)
    mean_of_all = hits[-1]
    part = stratified_parts(labels)
    honest = np.zeros(len(labels), bool)
    chosen = []
    for value in np.unique(part):
        is_held_out = part == value
        chosen.append(int(hits[:, ~is_held_out].sum(1).argmax()))
        honest[is_held_out] = hits[chosen[-1], is_held_out]
    apparent = hits[hits.sum(1).argmax()]
    print(
        f"\nchoice: the best of {len(subsets)} subsets of {len(keep)} networks "
        f"(of {len(rows.members)} files)"
    )
    print(f"{'picked on the scored rows':38}{share(apparent)}")
    print(f"{'picked on other rows (five parts)':38}{share(honest)}")
    print(f"{'mean of all, nothing picked':38}{share(mean_of_all)}")
    print(
        f"optimism of the choice {100 * (apparent.mean() - honest.mean()):+.2f} points; "
        "chosen in the five parts:"
    )
    for value, index in enumerate(chosen):
        print(f"    {value}: {', '.join(short(rows.members[keep[i]]) for i in subsets[index])}")
    pairs({"picked elsewhere": honest, "all": mean_of_all}, [("picked elsewhere", "all")])


def methods(rows: Predictions, keep: list[int], names: list[str]) -> None:
    """Every ensemble cross-fitted, against the mean of all and the best single member."""
    probs, labels = rows.probs[keep], rows.labels
    rows_in_order = np.arange(len(labels))
    hits, losses, times = {}, {}, {}
    for name in names:
        start = time.process_time()
        combined = cross_fit(lambda name=name: make_ensemble(name), probs, labels)
        hits[name] = combined.argmax(-1) == labels
        calibrated = apply_temperature(combined, fit_temperature(combined, labels))
        losses[name] = -np.log(np.maximum(calibrated[rows_in_order, labels], FLOOR))
        times[name] = time.process_time() - start
    tests = {name: mcnemar_exact(hits[name], hits["mean"]) for name in names if name != "mean"}
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    print(
        f"\n{'methods, cross-fitted':22}{'accuracy, 95 % interval':>26}"
        f"{'log loss':>10}{'minus mean':>29}",
        end="",
    )
    print(f"{'right alone':>13}{'p':>8}{'Holm':>8}{'CPU s':>8}")
    for name in names:
        line = f"{name:22}{share(hits[name]):>26}{losses[name].mean():10.4f}"
        if name in tests:
            a, b, p = tests[name]
            difference = signed(paired_bootstrap(hits[name], hits["mean"]))
            line += (
                f"{difference:>29}{f'{a} : {b}':>13}{p:8.3f}{adjusted[name]:8.3f}{times[name]:8.1f}"
            )
        print(line, flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=None)
    parser.add_argument("--all", action="store_true", help="also the methods that train a network")
    args = parser.parse_args()
    rows = Predictions.load(args.file)
    print(f"{len(rows.members)} files, {len(rows):,} images; {hardware()}, commit {commit()}")
    claims(rows)
    keep = distinct(rows.probs)
    for group in duplicates(rows.probs):
        print(
            f"\none network, counted once: {', '.join(short(rows.members[i]) for i in group)}",
            end="",
        )
    print()
    choice(rows, keep)
    names = args.methods or [n for n in ENSEMBLES if args.all or n not in NETWORKS]
    methods(rows, keep, ["mean", *(n for n in names if n != "mean")])


if __name__ == "__main__":
    main()
