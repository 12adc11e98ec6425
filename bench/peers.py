"""threefold against its peers: from a folder to a finished model, at several time budgets.

    uv run --group bench python bench/peers.py run --data ARCHIVES --work FOLDER
        [--sets elpv,demo] [--systems threefold,fastai,probe,timm] [--budgets 0.5,1,2,5,10,20]
    uv run python bench/peers.py table --work FOLDER [--data ARCHIVES]
    uv run python bench/peers.py plot --work FOLDER [--out docs/peers.png]

`run` gives each system (peer_systems.py) a folder with training images only and a budget in
minutes, and times the process that makes the model, start-up included. A second process answers the
test images. Each result is one line of FOLDER/results.jsonl, with the images that it has right, so
an interrupted series goes on where it stopped. A process is stopped at 1.5 times its budget ("did
not finish"). A result that more time cannot change is not measured again at larger budgets. A peer
whose library is missing is left out; `--python` names an interpreter that has it.

bench/results/peers.jsonl has the newest results: with it as FOLDER/results.jsonl, `plot` draws them
and `table --data` prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from development_sets import SETS, groups_of_test_images, prepare
from hits import pack_hits
from peer_systems import NETWORKS, PREDICTIONS
from peer_tables import (
    Promise,
    Result,
    digest_names,
    plot_results,
    print_tables,
    read_results,
)

from threefold.json_files import read_json
from threefold.models.member import create_backbone, save_weights
from threefold.recipe.schema import MemberSpec
from threefold.stats.scores import accuracy, correct, log_loss, share_interval
from threefold.training.provenance import commit, hardware

BUDGETS = "0.5,1,2,5,10,20"
GRACE = 1.5
"""A process is stopped after this multiple of its budget."""
LIBRARIES = {"fastai": "fastai", "probe": "sklearn", "timm": "timm", "threefold": "threefold"}
"""The library that each system needs."""
PACKAGES = ("threefold", "torch", "timm", "fastai", "scikit-learn", "onnxruntime")
WORKER = Path(__file__).with_name("peer_systems.py")


class Finished(NamedTuple):
    """How a process ended."""

    code: int | None
    """None if it was stopped."""
    seconds: float
    peak_gb: float
    """Peak memory of its largest process."""


def run_process(command: Sequence[str], limit: float, log: Path) -> Finished:
    """Run a command with its output in a file; stop it and its children after `limit` seconds."""
    # With this variable every import compiles its source again: for torch and its kin, 10 seconds.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with log.open("ab") as stream:
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        stopped = False
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if not stopped and time.monotonic() - began > limit:
                os.killpg(process.pid, signal.SIGKILL)
                stopped = True
            time.sleep(0.02)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    code = None if stopped else process.returncode
    return Finished(code, seconds, usage.ru_maxrss / 2**20)


def write_weights(folder: Path) -> None:
    """Write the networks' ImageNet weights under timm's names, as a hub's cache would have them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NETWORKS:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            network = create_backbone(MemberSpec(name=name, backbone=name), pretrained=True)
            save_weights(network.state_dict(), path)


def fit_command(system: str, name: str, train: Path, model: Path, minutes: float) -> list[str]:
    """Return the command that fits a system, without the interpreter.

    Args:
        system: a key of `peer_systems.PREDICTIONS`.
        name: the development set.
        train: one folder per class.
        model: where the model goes.
        minutes: the budget.
    """
    if system == "threefold":
        command = ["-m", "threefold", "fit", str(train), "--out", str(model)]
        command += ["--budget", f"{60 * minutes:g}s"]
        if SETS[name].group_regex:
            command += ["--set", f"data.group_regex={SETS[name].group_regex}"]
            command += ["--set", "folds.scheme=grouped"]
        return command
    weights = model.parent / "weights"
    deadline = time.time() + 60 * minutes
    return [
        *(str(WORKER), "fit", system, "--train", str(train), "--model", str(model)),
        *("--weights", str(weights), "--deadline", f"{deadline:.3f}"),
    ]


def measure(args: argparse.Namespace, name: str, system: str, minutes: float) -> Result:
    """Fit one system on one set within a budget, and score its answers on the test images."""
    python = sys.executable if system == "threefold" else args.python
    folder = args.work / "sets" / name
    model = args.work / "model"
    # No run may read the features that another one has cached.
    cache = args.work / "cache"
    os.environ["THREEFOLD_CACHE"] = str(cache)
    for folder_of_last_run in (model, cache):
        shutil.rmtree(folder_of_last_run, ignore_errors=True)
    label = f"{name}-{system}-{minutes:g}"
    log = args.work / "logs" / f"{label}.txt"
    log.parent.mkdir(exist_ok=True)
    command = [python, *fit_command(system, name, folder / "train", model, minutes)]
    fitted = run_process(command, 60 * minutes * GRACE, log)
    result = Result(
        set=name,
        system=system,
        minutes=minutes,
        seconds=round(fitted.seconds, 2),
        peak_gb=round(fitted.peak_gb, 2),
        status="did not finish",
        hardware=hardware(),
        threads=args.threads,
        date=date.today().isoformat(),
        commit=commit(),
        versions=versions(python),
    )
    if fitted.code is None:
        return result
    answers = args.work / "answers" / f"{label}.npz"
    answers.parent.mkdir(exist_ok=True)
    predict = [python, str(WORKER), "predict", system, "--images", str(folder / "test")]
    predict += ["--model", str(model), "--answers", str(answers)]
    done = read_done(system, model)
    nothing = system != "threefold" and not any(model.glob("*.model"))
    if nothing and fitted.code == 0:
        return result
    if fitted.code != 0 or run_process(predict, 3600, log).code != 0:
        return result._replace(status=f"failed, see {log}")
    return score(result._replace(status="ok", **done), answers)


def read_done(system: str, model: Path) -> dict[str, Any]:
    """Read what a fit says about itself: threefold's promise, or a peer's epochs."""
    if system == "threefold" and (model / "results.json").exists():
        expected = read_json(model / "results.json")["expected"]
        if expected is None:
            return {}
        low, high = expected["interval"]
        return {"promise": Promise(expected["accuracy"], low, high, expected["n"])}
    if (model / "done.json").exists():
        done = read_json(model / "done.json")
        return {"complete": done.pop("complete", False), "details": done}
    return {}


def score(result: Result, answers: Path) -> Result:
    """Add the scores of the answers to a result."""
    with np.load(answers, allow_pickle=False) as file:
        probs, labels, names = file["probs"].astype(np.float64), file["labels"], file["names"]
    probs /= probs.sum(1, keepdims=True)
    groups = SETS[result.set].groups(names.tolist())
    right = correct(probs, labels)
    low, high = share_interval(right, groups)
    return result._replace(
        hits=pack_hits(right),
        names=digest_names(names.tolist()),
        accuracy=accuracy(probs, labels),
        low=low,
        high=high,
        log_loss=log_loss(probs, labels),
        images=len(labels),
    )


def versions(python: str) -> dict[str, str]:
    """Return the versions of the packages that an interpreter has."""
    script = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    output = subprocess.run(
        [python, "-c", script, *PACKAGES], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(output.stdout)
    return found


def available(systems: Sequence[str], python: str) -> list[str]:
    """Return the systems whose library an interpreter has; name the others."""
    kept = []
    for system in systems:
        test = (
            f"import importlib.util as u; raise SystemExit(not u.find_spec('{LIBRARIES[system]}'))"
        )
        interpreter = sys.executable if system == "threefold" else python
        if subprocess.run([interpreter, "-c", test], check=False).returncode == 0:
            kept.append(system)
        else:
            print(f"{system} is left out: {LIBRARIES[system]} is not installed")
    return kept


def run(args: argparse.Namespace) -> None:
    """Measure what is missing in the results, the smallest budgets first."""
    os.environ |= {
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    args.work.mkdir(parents=True, exist_ok=True)
    args.work = args.work.resolve()
    write_weights(args.work / "weights")
    systems = available(args.systems.split(","), args.python)
    path = args.work / "results.jsonl"
    results = read_results(path)
    for minutes in sorted(map(float, args.budgets.split(","))):
        for name in args.sets.split(","):
            prepare(name, args.data, args.work / "sets")
            for system in systems:
                same = [r for r in results if (r.set, r.system) == (name, system)]
                if any(r.minutes == minutes for r in same):
                    continue
                known = [r for r in same if r.complete and r.seconds <= 60 * minutes]
                if known:
                    result = known[0]._replace(minutes=minutes)
                else:
                    result = measure(args, name, system, minutes)
                results.append(result)
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(result.to_json()) + "\n")
                print(result.line(), flush=True)


def main() -> None:
    """Run the comparison, or print or draw its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("step", choices=("run", "table", "plot"))
    parser.add_argument("--work", type=Path, required=True, help="folder of results and models")
    parser.add_argument("--data", type=Path, help="folder of the archives")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--systems", default=",".join(PREDICTIONS))
    parser.add_argument("--budgets", default=BUDGETS, help="minutes, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peers")
    parser.add_argument("--out", type=Path, default=Path("docs/peers.png"))
    args = parser.parse_args()
    if args.step == "run":
        run(args)
        return
    results = read_results(args.work / "results.jsonl")
    if args.step == "plot":
        plot_results(results, args.out)
        return
    groups = {}
    for name in dict.fromkeys(result.set for result in results if SETS[result.set].group_regex):
        folder = prepare(name, args.data, args.work / "sets")
        groups[name] = groups_of_test_images(name, folder)
    print_tables(results, groups)


if __name__ == "__main__":
    main()
