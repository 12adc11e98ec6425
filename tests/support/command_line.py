"""The frozen command line, and a way to call it."""

from __future__ import annotations

import os
import subprocess
import sys

# A training option is a recipe key, never a flag: think before adding one here.
SURFACE = {
    "demo": {"--out", "--verbose"},
    "fit": {"--out", "--budget", "--quality", "--members", "--set", "--verbose"},
    "plan": {"--budget", "--quality", "--members", "--set"},
    "train": {"--out", "--set", "--verbose"},
    "ensemble": {
        "--method",
        "--members",
        "--top",
        "--reopen-test",
        "--labels",
        "--classes",
        "--json",
        "--html",
    },
    "evaluate": {"--members", "--labels", "--classes", "--json", "--html", "--data", "--card"},
    "compare": {"--shared", "--labels", "--classes", "--json", "--html", "--data", "--card"},
    "export": {"--out", "--method", "--members", "--precision", "--web", "--web-runtime"},
    "distill": {"--student", "--out", "--set", "--verbose"},
    "predict": {
        "--top",
        "--json",
        "--csv",
        "--mode",
        "--budget",
        "--out",
        "--device",
        "--batch",
    },
    "serve": {"--host", "--port", "--api-key", "--limit", "--mode", "--budget"},
    "report": {"--out"},
    "list": set(),
    "data": set(),
    "data fetch": {"--to", "--extra", "--accept-licence"},
    "data check": {"--as", "--json"},
    "reproduce": {"--scale", "--protocol", "--out", "--data", "--seeds", "--set"},
}


def threefold_command(
    *words: str, stdin: str = "", encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    """Run the program; `encoding` is that of its terminal."""
    return subprocess.run(
        [sys.executable, "-m", "threefold", *words],
        capture_output=True,
        encoding=encoding,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        input=stdin,
        check=False,
    )
