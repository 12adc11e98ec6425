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
from threefold.files import read_arrays
from threefold.predictions.formats import read_predictions
from threefold.runtime.predict import find_images
from threefold.training.provenance import commit, hardware
from threefold.training.results import evaluate_run, members_in_file, used_members
from threefold.training.run import Run

SHARES = (0.0025, 0.005, 0.01, 0.02)
HEAD = (
    "| disagreement asked | rows | n | full | cascade | difference (points), 95 % interval "
    "| McNemar p | other class | stop after each stage | MACs |"
)


def line(share: float, saving: Saving) -> str:
    """One row of the table."""
    low, high = (100 * value for value in saving.interval)
    stops = " / ".join(f"{100 * value:.1f}" for value in saving.shares)
    return (
        f"| {share:.2%} | {saving.rows} | {saving.n:,} | {saving.full:.4f} "
        f"| {saving.accuracy:.4f} | {100 * saving.difference:+.2f} [{low:+.2f}, {high:+.2f}] "
        f"| {saving.p:.2f} | {saving.disagreement:.2%} | {stops} | {saving.macs:.3f} |"
    )


def table(made: Sequence[tuple[float, Savings]]) -> None:
    """Every share, on every kind of rows."""
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    for share, savings in made:
        for found in savings.measured:
            print(line(share, found))


def saved(path: Path, names: Sequence[str]) -> None:
    """Saved predictions, combined by the calibrated mean."""
    rows = read_predictions(path)
    rows = rows.select(names or rows.members)
    full = fit_calibration(
        "temperature",
        MeanEnsemble().predict_proba(rows.probs),
        rows.labels,
        rows.parts,
        rows.groups,
    ).probs
    costs = [1.0] * len(rows.members)
    print(f"{len(rows.members)} members of one cost, mean, {len(rows):,} {rows.kind} rows")
    table(
        [
            (
                share,
                fit_savings(
                    rows.probs,
                    rows.labels,
                    full,
                    stages_by_cost(costs),
                    costs=costs,
                    members=rows.members,
                    disagreement=share,
                    groups=rows.groups,
                ),
            )
            for share in SHARES
        ]
    )


def run(folder: Path, networks: bool) -> None:
    """A finished run's chosen ensemble."""
    this = Run.open(folder)
    found, results = evaluate_run(this), this.results
    names = members_in_file(found.ensemble, found.combined)
    used = [names.index(name) for name in used_members(found.ensemble, found.combined)]
    macs = {row.name: row.macs for row in results.members}
    counts = {
        n: this.networks(this.recipe.member(n)) * max(1, this.views(this.recipe.member(n)).count)
        for n in names
    }
    costs = [float(macs[name] * counts[name]) for name in names]
    rows, made = found.fit_rows, []
    for share in SHARES:
        one = fit_savings(
            rows.select(names).probs,
            rows.labels,
            found.calibration.probs,
            stages_by_cost(costs, used),
            costs=costs,
            members=names,
            disagreement=share,
            groups=rows.groups,
        )
        if found.rows.kind == "test":
            test = found.rows
            one = one.measure(
                test.select(names).probs, test.labels, found.probs, "test", test.groups
            )
            doubt(
                results.conformal.as_json() if results.conformal is not None else {},
                one.cascade,
                test.select(names).probs,
                found.probs,
                test.labels,
                share,
            )
            if networks:
                finer(this, names, costs, one.cascade, found.probs, test.labels, share)
        made.append((share, one))
    in_millions = ", ".join(f"{cost / 1e6:.0f} M" for cost in costs)
    print(f"{folder.name}: {found.chosen} of {', '.join(names)}; costs {in_millions} multiply-adds")
    table(made)
    if (folder / "model.onnx").is_file():
        pixels = this.sources.test or this.sources.train
        latency(
            folder / "model.onnx",
            [pixels.pixels(int(i)) for i in np.linspace(0, len(pixels) - 1, 100)],
        )


def doubt(
    conformal: Mapping[str, Any],
    cascade: Cascade,
    probs: np.ndarray,
    full: np.ndarray,
    labels: np.ndarray,
    share: float,
) -> None:
    """Prediction sets and the unknown mark of a run on test rows, of full and of early answers."""
    unknown = UnknownThreshold.from_state(conformal["unknown"]["state"])
    for mode, answers in (("full", full), ("fast", cascade.predict(probs, full).probs)):
        words = []
        for entry in conformal["sets"]:
            found = ConformalSets.from_state(entry["state"]).measure(answers, labels)
            low, high = found.interval
            words.append(
                f"{'by class' if entry['by_class'] else 'sets'} cover {found.coverage:.4f} "
                f"[{low:.4f}, {high:.4f}], mean size {found.mean_size:.3f}"
            )
        rejected = unknown.is_unknown(answers).mean()
        print(f"{share:.2%}, test, {mode}: {'; '.join(words)}; unknown {rejected:.2%}")


def finer(
    this: Run,
    names: Sequence[str],
    costs: Sequence[float],
    cascade: Cascade,
    full: np.ndarray,
    labels: np.ndarray,
    share: float,
) -> None:
    """On test rows: the networks of one fold after another, then all that is left."""
    for fold in this.final_folds:
        paths = [this.folder.job_folder(this.last_job(name, fold)) / "probs.npz" for name in names]
        probs = np.stack([read_arrays(path)["test"].mean(0) for path in paths])
        # The last stage's answer is the full ensemble's, whatever is given for its members.
        answer = cascade.predict(probs, full)
        order = [costs[i] for stage in cascade.stages for i in stage]
        so_far = np.cumsum(order) / (len(this.final_folds) * sum(order))
        so_far[-1] = 1.0
        other = (answer.probs.argmax(1) != full.argmax(1)).mean()
        accuracy = (answer.probs.argmax(1) == labels).mean()
        print(
            f"by network, fold {fold}, {share:.2%}: other class {other:.2%}, "
            f"accuracy {accuracy:.4f}, MACs {so_far[answer.stages - 1].mean():.3f}"
        )


def latency(path: Path, images: Sequence[np.ndarray]) -> None:
    """Milliseconds of an image, by mode and by number of stages, in turns."""
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
    words = parser.parse_args()
    print(f"{hardware()}, commit {commit()}")
    if words.path.is_dir():
        run(words.path, words.networks)
    elif words.path.suffix == ".onnx":
        latency(words.path, [decode(path) for path in find_images([words.images])][:100])
    else:
        saved(words.path, [name for name in words.members.split(",") if name])


if __name__ == "__main__":
    main()
