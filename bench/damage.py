"""Damage every file of a run in many ways, and count what becomes of it.

    uv run python bench/damage.py [--flips 200] [--seed 0] [--only TEXT] [--kinds flips,faults,...]

A tiny run is trained, exported and reported. Each trial damages one file of a copy and lets every
verb read it, in this process, with a time limit. What comes of a trial is the worst of its verbs:

    hang        a verb did not end within the limit
    traceback   a verb raised what is no line of error
    silent      an answer is another one, and no verb said a word about it
    found       a verb named the fault, and no answer is another one without a word
    harmless    every answer is bit for bit that of the undamaged run

The kinds: bytes flipped in a finished run, in one of several labels per image, and in an
interrupted one; files truncated, emptied, removed, and replaced (by a folder, a pipe, a circle of
links, a file of another kind, the same file of another run, one that may not be read); bytes
flipped in exported files and in predictions of other programs, which are not ours to hash but must
not end in a traceback. The exit code is 1 if anything was silent, a traceback or a hang.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import damage_runs as runs
import numpy as np

from threefold.errors import ThreefoldError
from threefold.evaluation.saved import score_saved
from threefold.predictions.formats import read_predictions, write_predictions
from threefold.predictions.predictions import Predictions
from threefold.predictions.run_check import check_run
from threefold.runtime.model import load

LIMIT = 900
"""Seconds that a verb may take; generous, because the machine may be busy."""

NOBODY = 65534
"""A user who may not read what is root's."""

ORDER = ("hang", "traceback", "silent", "found", "harmless")
"""Outcomes, the worst first."""

EVERY = 20
"""One trial of so many also tries the slow verbs that do not read the damaged file."""

_ALL = ("recipe", "run.json", "results", "manifest")
_SCORED = ("ledger", "groups", "images", "views", "backbones", "jobs")
SLOW = {
    "ensemble": (*_ALL, "oof", "test.npz", "ledger"),
    "report": (*_ALL, "chosen", "thumbs", "jobs"),
    "charts": (*_ALL, "chosen", "jobs"),
    "export": (*_ALL, *_SCORED, "ensemble"),
    "fit": (*_ALL, "model", "chosen", "thumbs"),
    "score again": (*_ALL, *_SCORED, "pseudo", "duplicates", "features", "oof", "test.npz"),
}
"""Verbs that take half a second or more, and the beginnings of the names of files they read."""


class TimedOutError(Exception):
    """A verb did not end."""


class Trial(NamedTuple):
    """One fault in a copy of a run."""

    kind: str
    file: str
    damage: Callable[[Path], object]
    protected: bool = False
    """Whether the verbs run as a user without rights to the file."""


def flip(rng: np.random.Generator) -> Callable[[Path], None]:
    """Return what changes a random bit of a file."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        position = int(rng.integers(len(content)))
        content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)

    return damage


def flips(files: Mapping[str, int], count: int, rng: np.random.Generator) -> Iterator[Trial]:
    """Yield flips: each file once in turn, then by the root of their sizes, so that small files and
    large ones are both hit."""
    names = list(files)
    weights = np.sqrt([max(files[name], 1) for name in names])
    drawn = rng.choice(len(names), max(0, count - len(names)), p=weights / weights.sum())
    chosen = [*rng.permutation(names).tolist(), *(names[i] for i in drawn)][:count]
    for name in chosen:
        yield Trial("flip", name, flip(rng))


def faults(files: Mapping[str, int], foreign: Path) -> Iterator[Trial]:
    """Yield what else can be wrong with each file."""
    for name in files:
        for kind, damage in REPLACEMENTS.items():
            yield Trial(kind, name, damage)
        if (foreign / name).is_file():
            content = (foreign / name).read_bytes()
            yield Trial("foreign", name, partial(_put, content=content))
        if os.geteuid() == 0:
            yield Trial("no permission", name, lambda path: path.chmod(0), protected=True)


def _put(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _picture() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.arange(3))
    return buffer.getvalue()


REPLACEMENTS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: _put(path, path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "emptied": lambda path: _put(path, b""),
    "removed": Path.unlink,
    "a folder": lambda path: _replace(path, Path.mkdir),
    "a pipe": lambda path: _replace(path, os.mkfifo),
    "circle of links": lambda path: _replace(path, lambda p: p.symlink_to(p.name)),
    "another kind": lambda path: _put(path, _picture()),
}


class Result(NamedTuple):
    """What came of a trial."""

    trial: Trial
    outcome: str
    said: str


class Campaign:
    """Trials on copies of one run.

    Args:
        made: the undamaged run.
        verbs: those that read it.
        place: a folder for the copies.
    """

    def __init__(self, made: Path, verbs: Mapping[str, runs.Verb], place: Path) -> None:
        self.made, self.verbs, self.place = made, verbs, place
        self.right: dict[str, Any] = {}
        self.tried = 0
        for name, verb in verbs.items():
            run = runs.copy_run(made, place / "run", "recipe.toml")
            outcome, answer = attempt(verb, run)
            if outcome != "answer":
                raise RuntimeError(f"{name} does not work on the undamaged run: {answer}")
            self.right[name] = answer

    def try_one(self, trial: Trial) -> Result:
        """Damage a copy, and let every verb read it."""
        self.tried += 1
        outcomes: dict[str, str] = {}
        content: bytes | None = None
        for name, verb in self.verbs.items():
            if not trial.file.startswith(SLOW.get(name, "")) and self.tried % EVERY:
                continue
            run = runs.copy_run(self.made, self.place / "run", trial.file)
            path = run / trial.file
            if content is not None:
                path.write_bytes(content)
            else:
                trial.damage(path)
                if trial.kind == "flip":
                    content = path.read_bytes()
            kind, answer = self._attempt(verb, run, trial.protected)
            if kind == "answer":
                kind = self._compare(name, answer, trial.file)
            outcomes[name] = f"{kind}: {answer[0] if kind == 'found' else answer}"[:1500]
        worst = min(outcomes, key=lambda name: ORDER.index(outcomes[name].partition(":")[0]))
        outcome, _, said = outcomes[worst].partition(": ")
        if outcome == "harmless":
            said = ""
        return Result(trial, outcome, f"{worst}: {said}")

    def _attempt(self, verb: runs.Verb, run: Path, protected: bool) -> tuple[str, Any]:
        if not protected:
            return attempt(verb, run)
        with runs.another_user(NOBODY, self.place):
            os.seteuid(0)
            for path in run.rglob("*"):
                if not path.is_symlink() and path.stat().st_mode & 0o777 == 0:
                    os.chown(path, 0, 0)
            os.seteuid(NOBODY)
            return attempt(verb, run)

    def _compare(self, name: str, answer: Any, damaged: str) -> str:
        """An equal answer is harmless; another one is found if the verb says more than before.

        The hash of the damaged file is no answer; whatever is made of the file is one.
        """
        value, words = answer
        right, usual = self.right[name]
        value, right = (_without(tree, damaged) for tree in (value, right))
        if [word for word in words if word not in usual]:
            return "found"
        return "harmless" if value == right else "silent"


def _without(answer: Any, damaged: str) -> Any:
    """Return an answer without the hash of a file."""
    if not isinstance(answer, dict) or "hashes" not in answer:
        return answer
    hashes = {name: digest for name, digest in answer["hashes"].items() if name != damaged}
    return {**answer, "hashes": hashes}


def attempt(verb: runs.Verb, run: Path) -> tuple[str, Any]:
    """Run a verb; returns the outcome, and its answer or what it said."""
    words = runs.Words()

    def stop(*_: object) -> None:
        raise TimedOutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = verb(run, words)
    except ThreefoldError as error:
        text = str(error)
        return ("found" if "\n" not in text else "traceback"), [text]
    except TimedOutError:
        return "hang", traceback.format_exc()[-900:]
    except KeyboardInterrupt:
        raise
    except OSError as error:
        # The command line prints it as one line, if it names the file.
        named = error.filename is not None
        return ("found" if named else "traceback"), [traceback.format_exc()[-900:]]
    except Exception:
        return "traceback", traceback.format_exc()[-900:]
    finally:
        signal.alarm(0)
    return "answer", (value, words.notes)


def user_files(place: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """Write predictions in every format, and the exported file of a run, with what reads each."""
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), (2, 40)).astype(np.float32)
    rows = Predictions(
        probs=probs,
        labels=rng.integers(0, 3, 40),
        ids=tuple(f"i{n}" for n in range(40)),
        classes=("a", "b", "c"),
        members=("x", "y"),
        kind="foreign",
    )
    files: dict[str, tuple[Path, Callable[[Path], Any]]] = {}
    for suffix in ("npz", "csv", "parquet"):
        path = place / f"rows.{suffix}"
        try:
            write_predictions(rows, path)
        except ThreefoldError:  # without pyarrow
            continue
        files[suffix] = (path, lambda p: repr(score_saved([p])[0]))
    np.save(place / "rows.npy", probs[0])
    files["npy"] = (place / "rows.npy", lambda p: read_predictions(p, labels=place / "rows.csv"))
    return files


def try_user_files(made: Path, place: Path, count: int, rng: np.random.Generator) -> list[Result]:
    """Flip bytes of files that a user gives: never a traceback, never a hang."""
    files = user_files(place / "rows")
    exported = place / "rows" / "model.onnx"
    shutil.copy(made / "model.onnx", exported)
    images = [str(path) for path in sorted(made.parent.rglob("*.png"))[:2]]
    files["onnx"] = (exported, lambda p: load(p).predict_proba(images).tolist())
    results = []
    for suffix, (path, read) in files.items():
        content, right = path.read_bytes(), None
        for number in range(-1, count):
            if number >= 0:
                flip(rng)(path)
            kind, answer = attempt(lambda p, _, r=read: r(p), path)
            if number < 0:
                right = answer
            elif kind == "answer":
                # What is not ours to hash may be read as it is; our exported file may not.
                is_ours = suffix == "onnx" and answer != right
                kind = "silent" if is_ours else "harmless"
            path.write_bytes(content)
            if number >= 0:
                trial = Trial("flip", path.name, flip(rng))
                results.append(Result(trial, kind, str(answer)[-900:]))
    return results


def try_check(made: Path, place: Path, count: int, rng: np.random.Generator) -> list[Result]:
    """Flip bytes, and let `threefold doctor RUN` find them: all of them, harmless or not."""
    files = sizes(made)
    results = []
    for trial in flips(files, count, rng):
        run = runs.copy_run(made, place / "run", trial.file)
        trial.damage(run / trial.file)
        kind, answer = attempt(lambda r, _: check_run(r).faults, run)
        if kind == "answer":
            named = [fault for fault in answer[0] if trial.file in str(fault.path)]
            kind = "found" if named or answer[0] else "silent"
        results.append(Result(trial, kind, str(answer)[-900:]))
    return results


def sizes(run: Path) -> dict[str, int]:
    """Sizes of a run's files by name."""
    return {name: (run / name).stat().st_size for name in runs.list_files(run)}


def main() -> int:
    """Run the campaigns and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=200, help="flips in the finished run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="trials whose kind or file has this text")
    parser.add_argument("--kinds", default="flips,faults,labels,stopped,files,check")
    parser.add_argument("--share", type=float, default=1.0, help="part of the replaced files")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    kinds = args.kinds.split(",")
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="damage") as folder:
        base = Path(folder)
        base.chmod(0o755)
        os.environ["THREEFOLD_CACHE"] = str(base / "cache")
        for kind, results in campaigns(base, kinds, args, rng):
            counts.setdefault(kind, Counter())
            for result in results:
                counts[kind][result.outcome] += 1
                if result.outcome in ORDER[:3]:
                    trial = result.trial
                    print(f"{result.outcome:10}{trial.kind:16}{trial.file}: {result.said}")
                    sys.stdout.flush()
    print(f"\n{'':16}" + "".join(f"{name:>11}" for name in ("tried", *ORDER[::-1])))
    for kind, counter in counts.items():
        figures = [sum(counter.values()), *(counter[name] for name in ORDER[::-1])]
        print(f"{kind:16}" + "".join(f"{figure:11}" for figure in figures))
    return int(any(counter[name] for counter in counts.values() for name in ORDER[:3]))


def campaigns(
    base: Path, kinds: list[str], args: argparse.Namespace, rng: np.random.Generator
) -> Iterator[tuple[str, Iterator[Result] | list[Result]]]:
    """Yield the results of each kind of trial."""
    trial_place = base / "trial"

    def run_all(campaign: Campaign, trials: Iterator[Trial]) -> Iterator[Result]:
        for trial in trials:
            if args.only in f"{trial.kind} {trial.file}":
                yield campaign.try_one(trial)

    made = runs.make_run(base / "made")
    if {"flips", "faults"} & set(kinds):
        campaign = Campaign(made, runs.VERBS, trial_place)
        if "flips" in kinds:
            yield "flips", run_all(campaign, flips(sizes(made), args.flips, rng))
        if "faults" in kinds:
            foreign = runs.make_run(base / "other", seed=7)
            trials = (t for t in faults(sizes(made), foreign) if rng.random() < args.share)
            yield "replaced", run_all(campaign, trials)
    if "labels" in kinds:
        several = runs.make_multilabel_run(base / "labels")
        campaign = Campaign(several, runs.MULTILABEL_VERBS, trial_place)
        trials = flips(sizes(several), args.flips // 4, rng)
        yield "several labels", run_all(campaign, trials)
    if "stopped" in kinds:
        stopped = runs.make_run(base / "stopped", batches=10)
        campaign = Campaign(stopped, runs.RESUME_VERBS, trial_place)
        yield "interrupted", run_all(campaign, flips(sizes(stopped), args.flips // 4, rng))
    if "files" in kinds:
        yield "user's files", try_user_files(made, base / "user", args.flips // 5, rng)
    if "check" in kinds:
        yield "doctor", try_check(made, trial_place, args.flips, rng)


if __name__ == "__main__":
    sys.exit(main())
