"""What every ensemble costs and gains: seconds and memory, simulated pools, saved predictions.

    uv run python bench/ensembles.py speed [--members 55] [--rows 26000] [--classes 10] [--methods mean,pool]
    uv run python bench/ensembles.py pools [--draws 20] [--kinds few,equal] [--methods mean,pool]
    uv run python bench/ensembles.py saved PREDS.npz [--keep Mixed]

speed: CPU seconds (a busy machine does not stretch them) of a fit on all rows, then a cross-fit in five parts, each method in a process of its own; the peak is that process's.
pools: accuracy (points) and log loss at the temperature of the cross-fitted fit rows, minus the mean's, on 4,000 new rows.
saved: the same differences cross-fitted in five stratified parts; standard errors over rows.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pools import KINDS, draw_pool

from threefold.ensemble import ENSEMBLES, AutoEnsemble, apply_temperature, cross_fit, fit_temperature
from threefold.ensemble import make_ensemble as make
from threefold.predictions import FLOOR, Predictions
from threefold.provenance import commit, hardware

QUICK = (*(name for name in ENSEMBLES if not name.startswith("stacked")), "auto")


def losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log loss of each row."""
    return np.asarray(-np.log(np.maximum(probs[np.arange(len(labels)), labels], FLOOR)))


def speed(args: argparse.Namespace) -> None:
    """One line per method, each from a process of its own."""
    print(f"{args.members} members, {args.rows:,} rows, {args.classes} classes; {hardware()}, commit {commit()}")
    print(f"{'method':16}{'fit s':>8}{'cross-fit s':>13}{'peak MB':>9}", flush=True)
    probs, labels, _, _ = draw_pool("equal", 0, args.rows, 1, args.members, args.classes)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "pool.npz")  # the process that is measured does not draw the pool
        np.savez(path, probs=probs, labels=labels)
        del probs
        for name in args.methods or QUICK:
            subprocess.run([sys.executable, __file__, "one", path, f"--methods={name}"], check=True)


def one(args: argparse.Namespace) -> None:
    """Seconds and peak of one method."""
    with np.load(args.file, allow_pickle=False) as file:
        probs, labels = file["probs"], file["labels"]
    name, times = args.methods[0], []
    for action in (lambda: make(name).fit(probs, labels), lambda: cross_fit(lambda: make(name), probs, labels)):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 1024
    print(f"{name:16}{times[0]:8.2f}{times[1]:13.2f}{peak:9.0f}", flush=True)


def pools(args: argparse.Namespace) -> None:
    """Gain over the mean for every kind of pool."""
    print(
        f"{args.draws} draws, commit {commit()}; accuracy in points, log loss calibrated, both minus the mean's (s.e.)"
    )
    methods = [name for name in args.methods or QUICK if name != "mean"]
    for kind in args.kinds or KINDS:
        gains: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
        means = []
        for seed in range(args.draws):
            fit, labels, new, truth = draw_pool(kind, seed)
            found, heat = {}, {}
            for name in ("mean", *methods):
                ensemble = make(name).fit(fit, labels)
                raw = ensemble.predict_proba(new)
                if isinstance(
                    ensemble, AutoEnsemble
                ):  # its own cross-fit is nested and takes 30 fits of each candidate
                    heat[name] = heat[ensemble.name_]
                else:
                    heat[name] = fit_temperature(cross_fit(lambda name=name: make(name), fit, labels), labels)
                warm = apply_temperature(raw, heat[name])
                found[name] = 100 * (raw.argmax(1) == truth).mean(), losses(warm, truth).mean()
            means.append(found["mean"])
            for name in methods:
                gains[name].append((found[name][0] - found["mean"][0], found[name][1] - found["mean"][1]))
        print(f"\n{kind}: mean {np.mean(means, 0)[0]:.2f}, log loss {np.mean(means, 0)[1]:.4f}")
        for name, values in gains.items():
            middle, error = np.mean(values, 0), np.std(values, 0, ddof=1) / len(values) ** 0.5
            worst = min(value for value, _ in values)
            print(
                f"  {name:14}{middle[0]:+7.2f} ({error[0]:.2f}) worst {worst:+6.2f}  {middle[1]:+8.4f} ({error[1]:.4f})",
                flush=True,
            )


def saved(args: argparse.Namespace) -> None:
    """Gain over the mean on saved predictions."""
    rows = Predictions.load(args.file)
    if args.keep:
        rows = rows.select([name for name in rows.members if args.keep in name])
    print(f"{rows.probs.shape}, commit {commit()}; accuracy in %, gains in points (s.e.), log loss calibrated")
    base = None
    for name in args.methods or QUICK:
        began = time.perf_counter()
        crossed = cross_fit(lambda name=name: make(name), rows.probs, rows.labels)
        took = time.perf_counter() - began
        right = 100.0 * (crossed.argmax(1) == rows.labels)
        loss = losses(apply_temperature(crossed, fit_temperature(crossed, rows.labels)), rows.labels)
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
    parser.add_argument("table", choices=["speed", "one", "pools", "saved"])
    parser.add_argument("file", nargs="?")
    parser.add_argument("--members", type=int, default=55)
    parser.add_argument("--rows", type=int, default=26_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--keep", default="", help="saved: members whose name holds this")
    for name in ("kinds", "methods"):
        parser.add_argument(f"--{name}", type=lambda text: text.split(","), default=None)
    args = parser.parse_args()
    {"speed": speed, "one": one, "pools": pools, "saved": saved}[args.table](args)


if __name__ == "__main__":
    main()
