"""A disk that is full, read-only or out of quota at every write of every verb, one at a time.

    OMP_NUM_THREADS=1 python bench/full_disk.py                 # every write of the small verbs
    OMP_NUM_THREADS=1 python bench/full_disk.py --only train --errors ENOSPC
    OMP_NUM_THREADS=1 python bench/full_disk.py --real          # as root: disks really full

Each trial copies a folder, fails one write of one command (`disk_faults`), and gives the command
again without the fault. It counts: one clear line and exit code 1; went on, with everything on
disk; tracebacks; hangs; commands that said done but had not written; runs that did not go on to
the same bits. `--real` runs the commands on small file systems in memory, on a read-only mount,
and as another user.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from disk_faults import FAULTS, DiskFaults, Fault
from full_disk_verbs import Command, commands
from PIL import Image
from tiny_recipe import tiny_recipe

ROOT: Final = Path(tempfile.gettempdir()) / f"full_disk_{os.getuid()}"
TRIAL: Final = ROOT / "trial"
MODULES: Final = ROOT / "modules"
"""What the last command has imported."""
SECONDS: Final = 240.0
"""After which a command counts as hanging."""
LATE: Final = {"openvino", "wandb", "mlflow"}
"""Packages that start threads when they are imported, which a fork would not have."""
REASONS: Final = (*(getattr(errno, name) for name in FAULTS), errno.EFBIG, errno.EPERM)
NOBODY: Final = 65534
PRINTED_BYTES: Final = 2048
"""Room for the message of a command, which is written into a file."""
REAL_SIZES: Final = 6
"""Sizes of disks that are tried, from none to almost enough."""
VOLATILE: Final = re.compile(
    r"seconds|created|^at$|^time|per_second|elapsed|latency|^files$|^sha256$|_ms$|^commit$|^bytes$"
    r"|^test_opened$"
)
"""Keys of JSON whose values are of one process, or of all that opened the test rows."""
RECIPE: Final[dict[str, Any]] = {"name": "tiny", **tiny_recipe("images")}


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    """Exit code; minus the number of the signal; -99 for a hang."""
    out: str
    err: str
    operations: list[str]


def make_images() -> None:
    """Write images of two classes, for training and for the test."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 8, "test": 3}.items():
        for name, colour in {"red": (200, 60, 60), "blue": (60, 60, 200)}.items():
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 50, (32, 32, 3)), 0, 255).astype(np.uint8)
                path = TRIAL / "images" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    import tomli_w

    (TRIAL / "recipe.toml").write_text(tomli_w.dumps(RECIPE))
    (TRIAL / "tmp").mkdir()


STATES: Final[dict[str, tuple[str, str]]] = {
    "images": ("", ""),
    "trained": ("images", "train recipe.toml --out run"),
    "finished": ("trained", "export run --out run/model.onnx"),
    **{
        f"with {suffix}": ("finished", f"export run --out m.{suffix}")
        for suffix in ("onnx", "pt2", "xml", "mlpackage", "tflite")
    },
}
"""State -> the one before, and the command that leads to it."""


def main() -> None:
    """Run the trials that the arguments ask for, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression of commands")
    parser.add_argument("--errors", default=",".join(FAULTS))
    parser.add_argument("--most", type=int, default=0, help="writes to fail; 0 = every one")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--list", action="store_true", help="name the writes of each command")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="200")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a problem to `doctor`
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    import_all()
    chosen = {n: c for n, c in commands().items() if re.search(arguments.only, n)}
    total: Counter[str] = Counter()
    for name, command in chosen.items():
        if arguments.list:
            for line in observe(command, "EROFS").operations:
                print(f"{name}: {line}")
            continue
        trials = real_trials if arguments.real else injected_trials
        counts: Counter[str] = Counter()
        try:
            for result in trials(name, command, arguments.errors.split(","), arguments.most):
                counts[result] += 1
        except LookupError as error:
            print(f"{name}: skipped, {error}", flush=True)
            continue
        total += counts
        print(f"{name}: {sum(counts.values())} {dict(counts)}; so far {dict(total)}", flush=True)
    print(f"all: {sum(total.values())} {dict(total)}")
    shutil.rmtree(ROOT, ignore_errors=True)


def import_all() -> None:
    """Import what the commands need once, so that each is a fork of this process."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import timm
    import torch

    import threefold.cli.main
    import threefold.exporting.export
    import threefold.report.pages  # noqa: F401

    torch.set_num_threads(1)
    timm.list_models("test_*")


def injected_trials(name: str, command: Command, errors: Sequence[str], most: int) -> Iterator[str]:
    """Fail writes of a command, and yield what came of each."""
    for error in errors:
        clean = observe(command, error)
        if clean.code:
            raise LookupError(f"the command fails by itself: {clean.err.strip()[-300:]}")
        right = digests()
        count = len(clean.operations)
        places = np.random.default_rng(zlib.crc32(f"{name} {error}".encode())).permutation(count)
        for at in map(int, places[: most or count]):
            restore(command)
            outcome = run(command, Fault(error, at))
            failed = outcome.operations.index("FAILED") if "FAILED" in outcome.operations else 0
            place = outcome.operations[failed - 1] if failed else "nothing"
            verdict = judge(command, outcome, right)
            if verdict not in ("one line", "went on"):
                where = place.replace(str(TRIAL), "").strip()
                print(f"  {name} {error} at {at}, {where}: {verdict}: {_tail(outcome)}", flush=True)
            yield verdict.split(":")[0]


def judge(command: Command, outcome: Outcome, right: dict[str, str]) -> str:
    """Say how a command met a fault, and whether it then goes on to the same end."""
    verdict = _first_verdict(command, outcome)
    if verdict == "went on":
        different = _differences(command, digests(), right)
        is_admitted = bool(command.admits) and command.admits in outcome.err
        if different and not is_admitted:
            verdict = f"said done but is not: {different}"
    if command.check:
        checked = run(Command("", action=command.check), None)
        if checked.code:
            return f"lost what was there: {checked.err.strip()[-300:]} ({verdict})"
    if verdict == "went on" and not command.repeats:
        return verdict
    again = run(command, None)
    if again.code:
        return f"does not go on: {again.err.strip()[-300:]} ({verdict})"
    different = _differences(command, digests(), right)
    if different:
        return f"other bits: {different} ({verdict})"
    litter = [path for path in TRIAL.rglob(".*.tmp") if "/cache/" not in str(path)]
    litter += (TRIAL / "tmp").iterdir()
    is_forbidden = re.search("Read-only|Permission", outcome.err)  # nor can it be deleted then
    if litter and not is_forbidden and verdict in ("one line", "went on"):
        return f"litter: {', '.join(str(p.relative_to(TRIAL)) for p in litter)}"
    return verdict


def _first_verdict(command: Command, outcome: Outcome) -> str:
    if outcome.code == -99:
        return "hang"
    if outcome.code < 0:
        return f"killed by signal {-outcome.code}"
    if re.search("Traceback|Exception ignored|Error in ", outcome.err):
        return "traceback"
    if outcome.code == 0:
        return "went on"
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    marked = [line for line in lines if line.startswith("error ")]
    reasons = [os.strerror(number).lower() for number in REASONS] + ["the disk is nearly full"]
    if outcome.code in command.codes[1:]:  # the code says it; the message may not be writable
        return "one line"
    if outcome.code != 1 or len(marked) != 1:
        return f"unclear, exit {outcome.code}"
    if not any(reason in marked[0].lower() for reason in reasons):
        return "unclear, no reason"
    return "one line"


def _tail(outcome: Outcome) -> str:
    return " | ".join(outcome.err.strip().splitlines()[-3:])[-600:]


def _differences(command: Command, found: dict[str, str], right: dict[str, str]) -> str:
    names = sorted(n for n in found.keys() | right.keys() if found.get(n) != right.get(n))
    names = [name for name in names if not name.startswith(command.varies)]
    return ", ".join(names[:4])


# One command


def restore(command: Command) -> None:
    """Put the trial's folder into the state before a command."""
    _empty(TRIAL)
    source = state(command.state)
    _empty(TRIAL)
    shutil.copytree(source, TRIAL, dirs_exist_ok=True)
    if command.before:
        here = os.getcwd()
        os.chdir(TRIAL)
        command.before()
        os.chdir(here)


def _empty(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@cache
def state(name: str) -> Path:
    """Return a folder in a state, which is made once."""
    before, words = STATES[name]
    folder = ROOT / "states" / name
    if before:
        source = state(before)
        _empty(TRIAL)
        shutil.copytree(source, TRIAL, dirs_exist_ok=True)
        outcome = run(Command(words), None)
        if outcome.code:
            raise LookupError(f"cannot make the state {name}: {outcome.err.strip()[-300:]}")
    else:
        _empty(TRIAL)
        make_images()
    shutil.copytree(TRIAL, folder)
    return folder


def observe(command: Command, error: str) -> Outcome:
    """Run a command without a fault, and list the operations that an error would hit."""
    restore(command)
    return run(command, Fault(error, -1))


def run(
    command: Command, fault: Fault | None, prepare: Callable[[], object] = lambda: None
) -> Outcome:
    """Run a command in a fork of this process.

    Args:
        command: what to run, in the trial's folder.
        fault: what fails; None = nothing is injected.
        prepare: called in the child before.
    """
    files = [ROOT / name for name in ("out", "err", "operations")]
    for file in files:
        file.write_text("")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _be_child(command, fault, prepare, *files)
    deadline = time.monotonic() + SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = -99
            break
        time.sleep(0.01)
    for module in MODULES.read_text().split() if MODULES.exists() else ():
        if module.partition(".")[0] not in LATE:
            with suppress(Exception):  # the next fork finds it imported
                importlib.import_module(module)
    out, err, operations = (file.read_text(errors="replace") for file in files)
    return Outcome(code, out, err, operations.splitlines())


def _be_child(
    command: Command,
    fault: Fault | None,
    prepare: Callable[[], object],
    out: Path,
    err: Path,
    operations: Path,
) -> None:
    """Run a command as the program does, and end."""
    code = 70
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
        listing = open(operations, "a", buffering=1)  # noqa: SIM115
        os.chdir(TRIAL)
        tempfile.tempdir = None
        here = {"THREEFOLD_CACHE": "cache", "TMPDIR": "tmp", "MPLCONFIGDIR": "../mpl"}
        os.environ.update({name: str(TRIAL / value) for name, value in here.items()})
        sys.argv = ["threefold", *command.words.split()]
        prepare()
        if fault is not None:
            DiskFaults([TRIAL], fault, lambda line: listing.write(line + "\n")).install()
        before = {*sys.modules}
        code = _call(command.action)
        with suppress(OSError):  # another user may not write there
            MODULES.write_text("\n".join({*sys.modules} - before))
    except BaseException:
        traceback.print_exc()
    finally:
        gc.collect()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _call(action: Callable[[], object] | None) -> int:
    """Run an action as the program runs a verb, or the program itself; returns the exit code."""
    from threefold.cli import app, main

    if action is not None:
        app.app = action  # type: ignore[assignment]
    try:
        main.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def digests() -> dict[str, str]:
    """Return what a trial's folder holds, without caches, locks, and the values of one process."""
    found = {}
    for path in sorted(TRIAL.rglob("*")):
        name = path.relative_to(TRIAL).as_posix()
        if not path.is_file() or re.match(r"(cache|tmp|hf)/|(.*/)?\.", name):
            continue
        found[name] = hashlib.sha256(_content(path)).hexdigest()[:12]
    return found


def _content(path: Path) -> bytes:
    if path.suffix in (".html", ".sha256"):
        return path.suffix.encode()
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        return json.dumps([_stable(json.loads(line)) for line in lines]).encode()
    return content


def _stable(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _stable(v) for k, v in tree.items() if not VOLATILE.search(k)}
    return [_stable(value) for value in tree] if isinstance(tree, list) else tree


# Disks that are really full


def real_trials(name: str, command: Command, errors: Sequence[str], most: int) -> Iterator[str]:
    """Run a command on file systems that refuse, and yield what came of it; needs root."""
    with _mounted(TRIAL):
        clean = observe(command, "ENOSPC")
        if clean.code:
            raise LookupError(f"the command fails by itself: {clean.err.strip()[-300:]}")
        right, most = digests(), _used()
        largest = max(path.stat().st_size for path in TRIAL.rglob("*") if path.is_file())
        restore(command)
        least = _used()
        for part in np.linspace(0, 1, REAL_SIZES, endpoint=False):
            cases: dict[str, Callable[[], Outcome]] = {
                f"{part:.2f} of the room": partial(_run_in, command, part, least, most),
                f"files up to {part:.2f}": partial(_run_limited, command, int(part * largest)),
            }
            if part == 0:
                cases["read-only"] = partial(_run_read_only, command)
                cases["another user"] = partial(run, command, None, _become_nobody)
                cases["temporary files elsewhere"] = partial(_run_elsewhere, command)
            for case, attempt in cases.items():
                restore(command)
                verdict = judge(command, outcome := attempt(), right)
                if verdict not in ("one line", "went on"):
                    print(f"  {name}, {case}: {verdict}: {_tail(outcome)}", flush=True)
                yield verdict.split(":")[0]


@contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    """Have a file system in memory at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", "size=1g,mode=755", "tmpfs", folder)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(*words: object) -> None:
    try:
        subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LookupError(f"cannot mount: {error}") from None


def _used() -> int:
    status = os.statvfs(TRIAL)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _run_in(command: Command, part: float, least: int, most: int) -> Outcome:
    """Run with only a part of the room that the command's files take."""
    _mount("-o", f"remount,size={max(_used(), int(least + part * (most - least)))}", TRIAL)
    try:
        return run(command, None)
    finally:
        _mount("-o", "remount,size=1g", TRIAL)


def _run_limited(command: Command, size: int) -> Outcome:
    """Run with a limit on the size of files, which leaves room for what is printed into one."""
    limit = max(size, PRINTED_BYTES)
    return run(command, None, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))


def _run_read_only(command: Command) -> Outcome:
    _mount("-o", "remount,ro", TRIAL)
    try:
        return run(command, None)
    finally:
        _mount("-o", "remount,rw", TRIAL)


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _run_elsewhere(command: Command) -> Outcome:
    """Run with the temporary files on another file system."""
    with _mounted(TRIAL / "tmp"):
        return run(command, None)


if __name__ == "__main__":
    main()
