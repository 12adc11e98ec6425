"""What every ensemble costs and gains: seconds and memory, simulated pools, saved predictions.

    uv run python bench/ensembles.py speed [--members 55] [--rows 26000] [--methods mean,pool]
    uv run python bench/ensembles.py pools [--draws 20] [--kinds few,equal] [--methods mean,pool]
    uv run python bench/ensembles.py verb [--methods mean,pool]
    uv run python bench/ensembles.py saved PREDS.npz [--keep Mixed]

speed: CPU seconds (independent of the machine's load) of a fit on all rows, of the answers to them,
    and of a cross-fit (in two parts, with at most 10,000 rows in five). Each method runs in a
    process of its own; the peak is that process's memory.
pools: accuracy (points) and log loss on 4,000 new rows at the temperature of the cross-fitted fit
    rows, minus those of the mean; then which methods lose to the mean by more than chance. `auto`
    is the method that `choose` picks among the others. --raw: accuracy only, without `auto`, in a
    sixth of the time.
verb: CPU seconds and peak memory of the whole command `threefold ensemble FILE --method NAME`,
    including the start and the temperatures, after a first run that compiles the bytecode.
saved: the same differences, cross-fitted in five stratified parts; standard errors over rows.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.pools import KINDS, draw_pool

from threefold.ensembles.cross_fit import cross_fit
from threefold.ensembles.registry import ENSEMBLES, choose, make_ensemble
from threefold.ensembles.scaling import apply_temperature, fit_temperature
from threefold.predictions.checks import FLOOR
from threefold.predictions.predictions import Predictions
from threefold.stats.paired_tests import holm

QUICK = tuple(name for name in ENSEMBLES if not name.startswith("stacked"))


class Score(NamedTuple):
    """Accuracy in percent, and log loss (0 if not computed)."""

    accuracy: float
    log_loss: float


def losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log loss of each row."""
    return np.asarray(-np.log(np.maximum(probs[np.arange(len(labels)), labels], FLOOR)))


def provenance() -> str:
    """Name the hardware and the commit."""
    from threefold.training.provenance import commit, hardware  # imports torch, for seconds

    return f"{hardware()}, commit {commit()}"


def print_size(args: argparse.Namespace) -> None:
    """Print the size of the pool, the hardware and the commit."""
    size = f"{args.members} members, {args.rows:,} rows, {args.classes} classes"
    print(f"{size}; {provenance()}")


def speed(args: argparse.Namespace) -> None:
    """Print a line per method, each from a process of its own."""
    print_size(args)
    print(f"{'method':16}{'fit s':>8}{'answer s':>10}{'cross-fit s':>13}{'peak MB':>9}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # The measured process must not draw the pool itself: that would raise its peak.
        args.file = str(Path(folder) / "pool.npz")
        draw(args)
        for name in args.methods or QUICK:
            command = [sys.executable, __file__, "one", args.file, f"--methods={name}"]
            subprocess.run(command, check=True)


def verb(args: argparse.Namespace) -> None:
    """Print a line per method: the whole command in a process of its own."""
    print_size(args)
    print(f"{'threefold ensemble':22}{'CPU s':>8}{'wall s':>8}{'peak MB':>9}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "pool.npz")
        sizes = [f"--{name}={getattr(args, name)}" for name in ("members", "rows", "classes")]
        # A child's peak counts its parent's memory at the fork, so this process must stay small.
        subprocess.run([sys.executable, __file__, "draw", path, *sizes], check=True)
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        command = [sys.executable, "-m", "threefold", "ensemble", path]
        subprocess.run(command, stdout=subprocess.DEVNULL, env=env, check=True)
        for name in args.methods or (*ENSEMBLES, "auto"):
            start = time.perf_counter()
            process = subprocess.Popen(
                [*command, "--method", name], stdout=subprocess.DEVNULL, env=env
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            wall, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
            failed = f"  failed ({process.returncode})" if process.returncode else ""
            peak = usage.ru_maxrss / 1024
            print(f"{name:22}{cpu:8.1f}{wall:8.1f}{peak:9.0f}{failed}", flush=True)


def draw(args: argparse.Namespace) -> None:
    """Write a pool to the file."""
    probs, labels, _, _ = draw_pool("equal", 0, args.rows, 1, args.members, args.classes)
    np.savez(args.file, probs=probs, labels=labels)


def one(args: argparse.Namespace) -> None:
    """Print seconds and peak memory of one method."""
    with np.load(args.file, allow_pickle=False) as file:
        probs, labels = file["probs"], file["labels"]
    name, times = args.methods[0], []
    ensemble = make_ensemble(name)
    for action in (
        lambda: ensemble.fit(probs, labels),
        lambda: ensemble.predict_proba(probs),
        lambda: cross_fit(lambda: make_ensemble(name), probs, labels),
    ):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 1024
    print(f"{name:16}{times[0]:8.2f}{times[1]:10.2f}{times[2]:13.2f}{peak:9.0f}", flush=True)


def pools(args: argparse.Namespace) -> None:
    """Print the gain over the mean for every kind of pool, then who loses by more than chance."""
    figures = "accuracy in points" if args.raw else "accuracy in points, log loss calibrated"
    print(f"{args.draws} draws, {provenance()}; {figures}, minus the mean's (s.e.)")
    names = [name for name in args.methods or QUICK if name != "mean"]
    gains: dict[tuple[str, str], np.ndarray] = {}
    for kind in args.kinds or KINDS:
        draws = [scores(draw_pool(kind, seed), names, args.raw) for seed in range(args.draws)]
        mean = np.mean([draw["mean"] for draw in draws], 0)
        print(f"\n{kind}: mean {mean[0]:.2f}" + ("" if args.raw else f", log loss {mean[1]:.4f}"))
        for name in draws[0]:
            if name == "mean":
                continue
            gain = np.array([np.subtract(draw[name], draw["mean"]) for draw in draws])
            gains[name, kind] = gain[:, 0]
            middle, error = gain.mean(0), gain.std(0, ddof=1) / len(gain) ** 0.5
            line = f"  {name:14}{middle[0]:+7.2f} ({error[0]:.2f}) worst {gain[:, 0].min():+6.2f}"
            print(line if args.raw else f"{line}  {middle[1]:+8.4f} ({error[1]:.4f})", flush=True)
    print_losers(gains)


def print_losers(gains: dict[tuple[str, str], np.ndarray]) -> None:
    """Print the pools in which a method loses accuracy to the mean.

    One-sided t-tests over the draws of each (method, kind of pool), adjusted by Holm's method.
    """
    print(f"\none-sided t-tests over draws, Holm over {len(gains)} tests, 5 %")
    p_values = []
    for gain in gains.values():
        error = gain.std(ddof=1) / len(gain) ** 0.5
        p = student_t.cdf(gain.mean() / error, len(gain) - 1) if error else gain.mean() >= 0
        p_values.append(float(p))
    adjusted = dict(zip(gains, holm(p_values), strict=True))
    for method in dict.fromkeys(name for name, _ in gains):
        lost = [
            f"{kind} {gain.mean():+.2f}"
            for (name, kind), gain in gains.items()
            if name == method and adjusted[name, kind] <= 0.05
        ]
        print(f"  {method:14}{'loses: ' + ', '.join(lost) if lost else 'never'}")


def scores(
    pool: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], names: list[str], raw: bool
) -> dict[str, Score]:
    """Score each method on the new rows of a pool; with `raw` by accuracy only."""
    probs, labels, new, truth = pool
    table, crossed = {}, {}
    for name in ("mean", *names):
        answers = make_ensemble(name).fit(probs, labels).predict_proba(new)
        accuracy = 100.0 * float((answers.argmax(1) == truth).mean())
        if raw:
            table[name] = Score(accuracy, 0.0)
            continue
        crossed[name] = cross_fit(lambda name=name: make_ensemble(name), probs, labels)
        temperature = fit_temperature(crossed[name], labels)
        loss = losses(apply_temperature(answers, temperature), truth).mean()
        table[name] = Score(accuracy, float(loss))
    if crossed:
        table["auto"] = table[choose(crossed, labels).name]
    return table


def saved(args: argparse.Namespace) -> None:
    """Print the gain over the mean on saved predictions."""
    rows = Predictions.load(args.file)
    if args.keep:
        rows = rows.select([name for name in rows.members if args.keep in name])
    figures = "accuracy in %, gains in points (s.e.), log loss calibrated"
    print(f"{rows.probs.shape}, {provenance()}; {figures}")
    base = None
    for name in args.methods or QUICK:
        start = time.perf_counter()
        crossed = cross_fit(lambda name=name: make_ensemble(name), rows.probs, rows.labels)
        seconds = time.perf_counter() - start
        right = 100.0 * (crossed.argmax(1) == rows.labels)
        calibrated = apply_temperature(crossed, fit_temperature(crossed, rows.labels))
        loss = losses(calibrated, rows.labels)
        base = base or (right, loss)
        a, b = right - base[0], loss - base[1]
        root = len(a) ** 0.5
        print(
            f"{name:16}{right.mean():7.2f} {a.mean():+6.2f} ({a.std() / root:.2f}) "
            f"{loss.mean():8.4f} {b.mean():+8.4f} ({b.std() / root:.4f}) {seconds:7.1f} s",
            flush=True,
        )


def main() -> None:
    """Print one of the tables."""
    tables = {
        "speed": speed,
        "verb": verb,
        "draw": draw,
        "one": one,
        "pools": pools,
        "saved": saved,
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=tables)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--members", type=int, default=55)
    parser.add_argument("--rows", type=int, default=26_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--keep", default="", help="saved: members whose name contains this")
    parser.add_argument("--raw", action="store_true", help="pools: accuracy only")
    for name in ("kinds", "methods"):
        parser.add_argument(f"--{name}", type=lambda text: text.split(","), default=None)
    args = parser.parse_args()
    tables[args.table](args)


if __name__ == "__main__":
    main()
