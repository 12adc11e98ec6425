"""What a cascade saves and costs: accuracy, multiply-adds and latency against the full ensemble.

    uv run python bench/cascade.py runs/demo                        # a finished run
    uv run python bench/cascade.py predictions.npz --members A,B,C  # saved predictions
    uv run python bench/cascade.py model.onnx --images folder       # latency by mode and stages

A run is measured at several shares of disagreement, on test rows with the thresholds of all
out-of-fold rows and on out-of-fold rows with those of other parts. Saved predictions are combined
by the mean, cross-fitted, and every member costs one. `--networks` measures a finer cascade that is
not built: one network after another instead of one member.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import threefold
from threefold.data.images import decode
from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.calibration import fit_calibration
from threefold.ensembles.cascade import Cascade, stages_by_cost
from threefold.ensembles.conformal import ConformalSets, UnknownThreshold
from threefold.evaluation.cascade_savings import Saving, Savings, fit_savings
from threefold.npz_files import read_arrays
from threefold.predictions.formats import read_predictions
from threefold.runtime.predict import find_images
from threefold.training.provenance import commit, hardware
from threefold.training.results.costs import RunCosts
from threefold.training.results.multiclass import evaluate_run, members_in_file, used_members
from threefold.training.run import Run

SHARES = (0.0025, 0.005, 0.01, 0.02)
HEAD = (
    "| allowed disagreement | rows | n | full | cascade | difference (points), 95 % interval "
    "| McNemar p | other class | stop after each stage | MACs |"
)


def line(share: float, saving: Saving) -> str:
    """Return one row of the table."""
    low, high = (100 * value for value in saving.interval)
    stops = " / ".join(f"{100 * value:.1f}" for value in saving.shares)
    return (
        f"| {share:.2%} | {saving.rows} | {saving.n:,} | {saving.full:.4f} "
        f"| {saving.accuracy:.4f} | {100 * saving.difference:+.2f} [{low:+.2f}, {high:+.2f}] "
        f"| {saving.p:.2f} | {saving.disagreement:.2%} | {stops} | {saving.macs:.3f} |"
    )


def print_table(savings_by_share: Mapping[float, Savings]) -> None:
    """Print a line for every share and every kind of rows."""
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    for share, savings in savings_by_share.items():
        for saving in savings.measured:
            print(line(share, saving))


def measure_file(path: Path, names: Sequence[str]) -> None:
    """Measure saved predictions, combined by the calibrated mean."""
    rows = read_predictions(path)
    rows = rows.select(names or rows.members)
    mean = MeanEnsemble().predict_proba(rows.probs)
    full = fit_calibration("temperature", mean, rows.labels, rows.parts, rows.groups).probs
    costs = [1.0] * len(rows.members)
    savings = {
        share: fit_savings(
            rows.probs,
            rows.labels,
            full,
            stages_by_cost(costs),
            costs=costs,
            members=rows.members,
            disagreement=share,
            groups=rows.groups,
        )
        for share in SHARES
    }
    print(f"{len(rows.members)} members of one cost, mean, {len(rows):,} {rows.kind} rows")
    print_table(savings)


def measure_run(folder: Path, networks: bool) -> None:
    """Measure a finished run's chosen ensemble."""
    run = Run.open(folder)
    evaluation, results = evaluate_run(run), run.results
    names = members_in_file(evaluation.ensemble, evaluation.combined)
    used = [names.index(name) for name in used_members(evaluation.ensemble, evaluation.combined)]
    members = RunCosts(run)
    costs = [float(cost.macs) for cost in members.each(names)]
    groups = [members.group(name) for name in names]
    rows, test, savings_by_share = evaluation.fit_rows, evaluation.rows, {}
    for share in SHARES:
        savings = fit_savings(
            rows.select(names).probs,
            rows.labels,
            evaluation.calibration.probs,
            stages_by_cost(costs, used, groups),
            costs=costs,
            members=names,
            disagreement=share,
            groups=rows.groups,
        )
        if test.kind == "test":
            probs, full = test.select(names).probs, evaluation.probs
            savings = savings.measure(probs, test.labels, full, "test", test.groups)
            if results.conformal is not None:
                conformal = results.conformal.as_json()
                print_uncertainty(conformal, savings.cascade, probs, full, test.labels, share)
            if networks:
                print_by_network(run, names, costs, savings.cascade, full, test.labels, share)
        savings_by_share[share] = savings
    in_millions = ", ".join(f"{cost / 1e6:.0f} M" for cost in costs)
    method = f"{evaluation.chosen} of {', '.join(names)}"
    print(f"{folder.name}: {method}; costs {in_millions} multiply-adds")
    print_table(savings_by_share)
    if (folder / "model.onnx").is_file():
        images = run.sources.test or run.sources.train
        sample = [images.pixels(int(i)) for i in np.linspace(0, len(images) - 1, 100)]
        print_latency(folder / "model.onnx", sample)


def print_uncertainty(
    conformal: Mapping[str, Any],
    cascade: Cascade,
    probs: np.ndarray,
    full: np.ndarray,
    labels: np.ndarray,
    share: float,
) -> None:
    """Print prediction sets and unknown images of a run on test rows, of full and fast answers."""
    unknown = UnknownThreshold.from_state(conformal["unknown"]["state"])
    for mode, answers in (("full", full), ("fast", cascade.predict(probs, full).probs)):
        words = []
        for entry in conformal["sets"]:
            coverage = ConformalSets.from_state(entry["state"]).measure(answers, labels)
            low, high = coverage.interval
            words.append(
                f"{'by class' if entry['by_class'] else 'sets'} cover {coverage.coverage:.4f} "
                f"[{low:.4f}, {high:.4f}], mean size {coverage.mean_size:.3f}"
            )
        rejected = unknown.is_unknown(answers).mean()
        print(f"{share:.2%}, test, {mode}: {'; '.join(words)}; unknown {rejected:.2%}")


def print_by_network(
    run: Run,
    names: Sequence[str],
    costs: Sequence[float],
    cascade: Cascade,
    full: np.ndarray,
    labels: np.ndarray,
    share: float,
) -> None:
    """Print, on test rows, a cascade of one fold's networks in turn, then all that is left."""
    for fold in run.final_folds:
        paths = [run.folder.job_folder(run.last_job(name, fold)) / "probs.npz" for name in names]
        probs = np.stack([read_arrays(path)["test"].mean(0) for path in paths])
        # The last stage's answer is the full ensemble's, whatever the probabilities of its members.
        answers = cascade.predict(probs, full)
        stage_costs = [costs[i] for stage in cascade.stages for i in stage]
        total_costs = np.cumsum(stage_costs) / (len(run.final_folds) * sum(stage_costs))
        total_costs[-1] = 1.0
        disagreement = (answers.probs.argmax(1) != full.argmax(1)).mean()
        accuracy = (answers.probs.argmax(1) == labels).mean()
        print(
            f"by network, fold {fold}, {share:.2%}: other class {disagreement:.2%}, "
            f"accuracy {accuracy:.4f}, MACs {total_costs[answers.stages - 1].mean():.3f}"
        )


def print_latency(path: Path, images: Sequence[np.ndarray]) -> None:
    """Print milliseconds per image, by mode and by number of stages."""
    for threads in (1, 0):
        measured = threefold.load(path, threads).measure_latency(images)
        full, fast = measured["full"], measured.get("fast", float("nan"))
        stages = ", ".join(f"{stage:.2f}" for stage in measured.get("stages", []))
        print(
            f"{len(images)} images, threads {threads or 'all'}: full {full:.2f} ms (median); "
            f"fast {fast:.2f} ms (mean), {fast / full:.2f} x; stages {stages} ms"
        )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--members", default="")
    parser.add_argument("--images", default="")
    parser.add_argument("--networks", action="store_true")
    args = parser.parse_args()
    print(f"{hardware()}, commit {commit()}")
    if args.path.is_dir():
        measure_run(args.path, args.networks)
    elif args.path.suffix == ".onnx":
        print_latency(args.path, [decode(path) for path in find_images([args.images])][:100])
    else:
        measure_file(args.path, [name for name in args.members.split(",") if name])


if __name__ == "__main__":
    main()
