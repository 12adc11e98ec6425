"""A stand-in for the child process of `threefold ui`: the same files and signals, without torch.

With a budget of 0 it trains until it is stopped; images whose name has `broken` cannot be used.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

TASK, STATE, RUN = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
JOB = ["lite0", "fold0", "tune1"]


def write(event: str, **values: Any) -> None:
    """Append an event."""
    with open(STATE / "events.jsonl", "a") as file:
        file.write(json.dumps({"event": event, "time": time.time(), **values}) + "\n")


def stop(*_: object) -> None:
    """End as training does that was told to."""
    write("stopped", task=TASK)
    sys.exit()


def check(data: str) -> None:
    """Find one class."""
    tree = {"classes": {"cat": {"train": 3}}, "sizes": {}, "skipped": 0, "findings": []}
    (STATE / "check.json").write_text(json.dumps({**tree, "usable": "broken" not in data}))


def plan(settings: dict[str, Any]) -> None:
    """Write a recipe."""
    RUN.mkdir(parents=True, exist_ok=True)
    (RUN / "recipe.toml").write_text("")
    tree = {"decisions": [], "members": [], "settings": settings}
    (STATE / "plan.json").write_text(json.dumps(tree))


def fit(settings: dict[str, Any]) -> None:
    """Train for ever, or at once."""
    (RUN / "run.json").write_text("{}")
    write("jobs", jobs=[JOB], images=[9])
    write("job", job=JOB, skipped=False)
    for i in range(4):
        write("epoch", job=JOB, epoch=i, loss=1 / (i + 1), select_accuracy=0.6 + i / 10, images=9)
    while settings["budget"] == "0":
        time.sleep(0.02)
    (RUN / "report.html").write_text("<p>report</p>")
    (RUN / "model.onnx").write_bytes((RUN.parent / "colours.onnx").read_bytes())


def main() -> None:
    """Do the task."""
    state = json.loads((STATE / "state.json").read_text())
    with FileLock(STATE / ".lock", timeout=20):
        (STATE / "process").write_text(str(os.getpid()))
        signal.signal(signal.SIGTERM, stop)
        write("task", task=TASK)
        if TASK == "check":
            check(state["data"])
        elif TASK == "plan":
            plan(state["settings"])
        else:
            fit(state["settings"])
        write("done", task=TASK)


main()
