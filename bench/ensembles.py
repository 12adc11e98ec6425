"""What every ensemble costs and gains: seconds and memory, simulated pools, saved predictions.

    uv run python bench/ensembles.py speed [--members 55] [--rows 26000] [--classes 10] [--methods mean,pool]
    uv run python bench/ensembles.py pools [--draws 20] [--kinds few,equal] [--methods mean,pool] [--raw]
    uv run python bench/ensembles.py verb [--methods mean,pool]
    uv run python bench/ensembles.py saved PREDS.npz [--keep Mixed]

speed: CPU seconds (a busy machine does not stretch them) of a fit on all rows, then a cross-fit in five parts, each method in a process of its own; the peak is that process's.
pools: accuracy (points) and log loss at the temperature of the cross-fitted fit rows, minus the mean's, on 4,000 new rows;
then who loses to the mean by more than luck. --raw: accuracy only, a sixth of the time.
verb: CPU seconds and peak of the whole command `threefold ensemble FILE --method NAME`, start and temperatures included; after a first run, which leaves compiled bytecode behind.
saved: the same differences cross-fitted in five stratified parts; standard errors over rows.
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

import numpy as np
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pools import KINDS, draw_pool

from threefold.ensemble import (
    ENSEMBLES,
    AutoEnsemble,
    apply_temperature,
    cross_fit,
    fit_temperature,
)
from threefold.ensemble import make_ensemble as make
from threefold.paired import holm
from threefold.predictions import Predictions
from threefold.predictions__checks import FLOOR
from threefold.provenance import commit, hardware

QUICK = (*(name for name in ENSEMBLES if not name.startswith("stacked")), "auto")


def losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log loss of each row."""
    return np.asarray(-np.log(np.maximum(probs[np.arange(len(labels)), labels], FLOOR)))


def speed(args: argparse.Namespace) -> None:
    """One line per method, each from a process of its own."""
    print(
        f"{args.members} members, {args.rows:,} rows, {args.classes} classes; {hardware()}, commit {commit()}"
    )
    print(f"{'method':16}{'fit s':>8}{'cross-fit s':>13}{'peak MB':>9}", flush=True)
    probs, labels, _, _ = draw_pool("equal", 0, args.rows, 1, args.members, args.classes)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "pool.npz")  # the process that is measured does not draw the pool
        np.savez(path, probs=probs, labels=labels)
        del probs
        for name in args.methods or QUICK:
            subprocess.run([sys.executable, __file__, "one", path, f"--methods={name}"], check=True)


def verb(args: argparse.Namespace) -> None:
    """One line per method: the whole command in a process of its own."""
    print(
        f"{args.members} members, {args.rows:,} rows, {args.classes} classes; {hardware()}, commit {commit()}"
    )
    print(f"{'threefold ensemble':22}{'CPU s':>8}{'wall s':>8}{'peak MB':>9}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "pool.npz")
        sizes = [f"--{name}={getattr(args, name)}" for name in ("members", "rows", "classes")]
        # A child's peak counts what its parent held when it was started: this process must stay small.
        subprocess.run([sys.executable, __file__, "draw", path, *sizes], check=True)
        env = {
            name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
        }
        subprocess.run(
            [sys.executable, "-m", "threefold", "ensemble", path],
            stdout=subprocess.DEVNULL,
            env=env,
            check=True,
        )
        for name in args.methods or (*ENSEMBLES, "auto"):
            command, began = ["threefold", "ensemble", path, "--method", name], time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, env=env
            )
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            spent = used.ru_utime + used.ru_stime
            failed = f"  failed ({process.returncode})" if process.returncode else ""
            wall = time.perf_counter() - began
            print(
                f"{name:22}{spent:8.1f}{wall:8.1f}{used.ru_maxrss / 1024:9.0f}{failed}", flush=True
            )


def draw(args: argparse.Namespace) -> None:
    """Write a pool to the file."""
    probs, labels, _, _ = draw_pool("equal", 0, args.rows, 1, args.members, args.classes)
    np.savez(args.file, probs=probs, labels=labels)


def one(args: argparse.Namespace) -> None:
    """Seconds and peak of one method."""
    with np.load(args.file, allow_pickle=False) as file:
        probs, labels = file["probs"], file["labels"]
    name, times = args.methods[0], []
    for action in (
        lambda: make(name).fit(probs, labels),
        lambda: cross_fit(lambda: make(name), probs, labels),
    ):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 1024
    print(f"{name:16}{times[0]:8.2f}{times[1]:13.2f}{peak:9.0f}", flush=True)


def pools(args: argparse.Namespace) -> None:
    """Gain over the mean for every kind of pool, and which methods lose somewhere by more than luck."""
    what = "accuracy in points" if args.raw else "accuracy in points, log loss calibrated"
    print(f"{args.draws} draws, {hardware()}, commit {commit()}; {what}, minus the mean's (s.e.)")
    methods = [name for name in args.methods or QUICK if name != "mean"]
    tests: dict[tuple[str, str], tuple[float, float]] = {}
    for kind in args.kinds or KINDS:
        gains: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
        means = []
        for seed in range(args.draws):
            found = judged(draw_pool(kind, seed), methods, args.raw)
            means.append(found["mean"])
            for name in methods:
                gains[name].append(
                    (found[name][0] - found["mean"][0], found[name][1] - found["mean"][1])
                )
        print(
            f"\n{kind}: mean {np.mean(means, 0)[0]:.2f}"
            + ("" if args.raw else f", log loss {np.mean(means, 0)[1]:.4f}")
        )
        for name, values in gains.items():
            middle, error = np.mean(values, 0), np.std(values, 0, ddof=1) / len(values) ** 0.5
            worst = min(value for value, _ in values)
            line = f"  {name:14}{middle[0]:+7.2f} ({error[0]:.2f}) worst {worst:+6.2f}"
            print(line if args.raw else f"{line}  {middle[1]:+8.4f} ({error[1]:.4f})", flush=True)
            p = (
                student.cdf(middle[0] / error[0], len(values) - 1)
                if error[0]
                else float(middle[0] >= 0)
            )
            tests[name, kind] = middle[0], float(p)
    print(
        f"\nmean accuracy below the mean's: one-sided t-test over draws, Holm over {len(tests)} tests, 5 %"
    )
    adjusted = dict(zip(tests, holm([p for _, p in tests.values()]), strict=True))
    for name in methods:
        lost = [
            f"{kind} {tests[name, kind][0]:+.2f}"
            for n, kind in tests
            if n == name and adjusted[n, kind] <= 0.05
        ]
        print(f"  {name:14}{'loses: ' + ', '.join(lost) if lost else 'never'}")


def judged(
    pool: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], methods: list[str], raw: bool
) -> dict[str, tuple[float, float]]:
    """Accuracy in percent and log loss of each method on the new rows; with `raw` the loss is not looked at."""
    fit, labels, new, truth = pool
    found, heat = {}, {}
    for name in ("mean", *methods):
        ensemble = make(name).fit(fit, labels)
        answer = ensemble.predict_proba(new)
        right = 100.0 * float((answer.argmax(1) == truth).mean())
        if raw:
            found[name] = right, 0.0
            continue
        if isinstance(
            ensemble, AutoEnsemble
        ):  # its own cross-fit is nested and takes 30 fits of each candidate
            heat[name] = heat[ensemble.name_]
        else:
            heat[name] = fit_temperature(
                cross_fit(lambda name=name: make(name), fit, labels), labels
            )
        found[name] = right, float(losses(apply_temperature(answer, heat[name]), truth).mean())
    return found


def saved(args: argparse.Namespace) -> None:
    """Gain over the mean on saved predictions."""
    rows = Predictions.load(args.file)
    if args.keep:
        rows = rows.select([name for name in rows.members if args.keep in name])
    print(
        f"{rows.probs.shape}, commit {commit()}; accuracy in %, gains in points (s.e.), log loss calibrated"
    )
    base = None
    for name in args.methods or QUICK:
        began = time.perf_counter()
        crossed = cross_fit(lambda name=name: make(name), rows.probs, rows.labels)
        took = time.perf_counter() - began
        right = 100.0 * (crossed.argmax(1) == rows.labels)
        loss = losses(
            apply_temperature(crossed, fit_temperature(crossed, rows.labels)), rows.labels
        )
        base = base or (right, loss)
        a, b = right - base[0], loss - base[1]
        root = len(a) ** 0.5
        print(
            f"{name:16}{right.mean():7.2f} {a.mean():+6.2f} ({a.std() / root:.2f}) {loss.mean():8.4f} {b.mean():+8.4f} ({b.std() / root:.4f}) {took:7.1f} s",
            flush=True,
        )


def main() -> None:
    """Run one of the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=["speed", "verb", "draw", "one", "pools", "saved"])
    parser.add_argument("file", nargs="?")
    parser.add_argument("--members", type=int, default=55)
    parser.add_argument("--rows", type=int, default=26_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--keep", default="", help="saved: members whose name holds this")
    parser.add_argument(
        "--raw", action="store_true", help="pools: accuracy only, without the fits for temperatures"
    )
    for name in ("kinds", "methods"):
        parser.add_argument(f"--{name}", type=lambda text: text.split(","), default=None)
    args = parser.parse_args()
    {"speed": speed, "verb": verb, "draw": draw, "one": one, "pools": pools, "saved": saved}[
        args.table
    ](args)


if __name__ == "__main__":
    main()
