"""Send signals to every verb at random moments: exit code, time to the end, and what is left.

    uv run python bench/signals.py [--tries 10] [--seed 0] [--only "train;plan"] [--json out.json]

Each try begins in an empty folder and sends SIGINT, SIGTERM, SIGHUP or SIGUSR1. Right is: exit code
128 + n (or 0, if the verb ended before it noticed, and from a server that was up), one line on
standard error, no temporary file. Every `--resume`-th try of a scenario of `kill.py` then runs the
same commands to their end, and compares every bit with an uninterrupted run. Linux only (fork).
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from kill import SCENARIOS, Bench, Scenario, Words, leftovers, prepare_model, start
from kill_child import Ended, warm_up

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PATIENCE: Final = 60.0
"""Seconds after which a verb that does not end counts as hanging."""
SERVING: Final = 6.0
"""Seconds for which a server is left alone at most."""


def verb(name: str, *words: object) -> Scenario:
    """A verb that reads a finished run or images; RUN, MODEL, IMAGES and OUT stand for paths."""

    def commands(shared: Path, trial: Path) -> list[Words]:
        places = {
            "RUN": shared / "run",
            "MODEL": shared / "run" / "model.onnx",
            "IMAGES": shared / "images",
            "IMAGE": shared / "images" / "test" / "red" / "00.png",
            "RECIPE": shared / "kill.toml",
            "OUT": trial,
        }
        return [[_place(word, places) for word in words]]

    return Scenario(name, commands, copy_prepared, is_exact=False)


def copy_prepared(shared: Path) -> None:
    """Copy the run and the file that all verbs read, which are made once."""
    prepared = shared.parent.parent / "prepared"
    if not prepared.exists():
        prepared.mkdir()
        prepare_model(prepared)
    shutil.copytree(prepared, shared, dirs_exist_ok=True)


def _place(word: object, places: dict[str, Path]) -> object:
    first, slash, rest = str(word).partition("/")
    return places[first] / rest if first in places and (slash or not rest) else word


VERBS: Final = (
    verb("plan", "plan", "IMAGES", "--budget", "1m", "--members", "tf_efficientnet_lite0"),
    verb("lr-find", "lr-find", "RECIPE", "--member", "tuned", "--out", "OUT/lr.png"),
    verb("ensemble", "ensemble", "RUN", "--html", "OUT/page.html"),
    verb("evaluate", "evaluate", "MODEL", "IMAGES/test", "--html", "OUT/page.html"),
    verb("compare", "compare", "RUN", "--html", "OUT/page.html"),
    verb("data check", "data", "check", "IMAGES"),
    verb("explain", "explain", "RUN", "IMAGE", "--out", "OUT/map.png"),
    verb("embed", "embed", "RUN", "IMAGES/test", "--out", "OUT/features.npz"),
    verb("predict --heat", "predict", "MODEL", "IMAGES", "--heat", "OUT/maps"),
    verb("doctor", "doctor", "--speed"),
    verb("serve", "serve", "MODEL", "--port", "0"),
)


class SignalBench(Bench):
    """The tries of one scenario."""

    def run_serving(self) -> None:
        """Take the place of `run_whole` for a server, which does not end."""
        self._begin()
        self.phases, self.seconds, self.right = [], SERVING, {}

    def send_one(self, number: int) -> Ended | None:
        """Send a signal at a random moment of the commands; None if they ended before."""
        self._begin()
        left = self.random.uniform(0, self.seconds)
        for words in self.commands():
            child = start(words, self.trial)
            ended = child.wait(left)
            if ended is None:
                child.send(number)
                ended = child.wait(PATIENCE)
                if ended is None:
                    self.tally.hangs.append(f"{words[0]}: {child.phase}")
                    child.send(signal.SIGKILL)
                    child.wait(PATIENCE)
                self.tally.kills[child.phase] += 1
                return ended
            left = max(0.0, left - ended.seconds)
        return None


def try_scenario(bench: SignalBench, tries: int, resume: int) -> dict[str, Any]:
    """Send signals to a scenario; returns a row of the table."""
    is_server = bench.scenario.name == "serve"
    bench.run_serving() if is_server else bench.run_whole()
    codes: Counter[str] = Counter()
    slowest = 0.0
    wrong = []
    for number in range(tries):
        sign = SIGNALS[(number + bench.random.randrange(2)) % len(SIGNALS)]
        ended = bench.send_one(sign)
        if ended is None:
            codes["ended before"] += 1
            continue
        codes[f"{sign.name} {ended.code}"] += 1
        slowest = max(slowest, ended.seconds)
        is_right = ended.code in (128 + sign, 0) and ended.errors.count("\n") <= 1
        if not is_right or "Traceback" in ended.errors or "Exception ignored" in ended.errors:
            wrong.append(f"{sign.name} in {ended.phase}: {ended.code}: {ended.errors[-800:]}")
        left = [name for name in leftovers(bench.trial) if not name.endswith(".resume")]
        bench.tally.leftovers += [f"{sign.name} in {ended.phase}: {name}" for name in left]
        if bench.scenario.is_exact and number % resume == 0:
            bench.check(f"{sign.name} in {ended.phase}")
    return {
        "tries": tries,
        "codes": dict(codes),
        "phases": dict(bench.tally.kills),
        "slowest end, s": round(slowest, 1),
        "wrong": wrong,
        "resumed": bench.tally.trials,
        "faults": bench.tally.faults() + len(wrong),
        **{
            kind: getattr(bench.tally, kind)
            for kind in ("mismatches", "tracebacks", "failures", "hangs", "leftovers")
        },
    }


def main() -> int:
    """Run the tries; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tries", type=int, default=10, help="of each verb")
    parser.add_argument("--resume", type=int, default=3, help="resume every n-th try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of verbs, separated by semicolons")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    names = options.only.split(";") if options.only else []
    warm_up()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="signals") as folder:
        for scenario in (*SCENARIOS, *VERBS):
            if names and scenario.name not in names:
                continue
            base = Path(folder) / f"{len(rows)}"
            row = try_scenario(
                SignalBench(scenario, base, options.seed), options.tries, options.resume
            )
            rows[f"{len(rows)} {scenario.name}"] = row
            print(scenario.name, json.dumps(row, indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(any(row["faults"] for row in rows.values()))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
