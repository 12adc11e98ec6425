"""The frozen command line, and a way to call it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

CLUSTER = {"--executor", "--address"}

# A training option is a recipe key, never a flag: think before adding one here.
SURFACE = {
    "demo": {"--out", "--verbose"},
    "fit": {
        "--out",
        "--budget",
        "--quality",
        "--members",
        "--set",
        "--log",
        "--verbose",
        "--devices",
        *CLUSTER,
    },
    "plan": {"--budget", "--quality", "--members", "--set"},
    "train": {"--out", "--set", "--log", "--verbose", "--devices", "--processes", *CLUSTER},
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
    "export": {
        "--out",
        "--method",
        "--members",
        "--precision",
        "--fixed-size",
        "--no-cascade",
        "--web",
        "--web-runtime",
        "--card",
    },
    "distill": {"--student", "--out", "--set", "--log", "--verbose", *CLUSTER},
    "predict": {
        "--top",
        "--json",
        "--csv",
        "--mode",
        "--budget",
        "--out",
        "--device",
        "--batch",
        "--heat",
        "--executor",
        "--address",
    },
    "explain": {"--out", "--class", "--similar", "--json"},
    "embed": {"--out", "--members", "--size"},
    "serve": {"--host", "--port", "--api-key", "--limit", "--mode", "--budget", "--workers"},
    "report": {"--out"},
    "ui": {"--runs", "--port", "--open"},
    "push": {"--private", "--licence"},
    "pull": {"--out", "--revision"},
    "lr-find": {
        "--member",
        "--stage",
        "--out",
        "--steps",
        "--low",
        "--high",
        "--budget",
        "--quality",
        "--members",
        "--set",
        "--json",
    },
    "search": {"--out", "--space", "--trials", "--budget", "--set", "--verbose"},
    "doctor": {"--speed", "--mend", "--json"},
    "clean": {"--yes"},
    "list": set(),
    "data": set(),
    "data fetch": {"--to", "--extra", "--accept-licence"},
    "data check": {"--as", "--set", "--json"},
    "data export": {"--format", "--out", "--as", "--set"},
    "data review": {"--as", "--out", "--port", "--set"},
    "reproduce": {"--scale", "--protocol", "--out", "--data", "--seeds", "--set", *CLUSTER},
}


def threefold_command(
    *words: str,
    stdin: str = "",
    encoding: str = "utf-8",
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the program; `encoding` is that of its terminal, `variables` join the environment."""
    return subprocess.run(
        [sys.executable, "-m", "threefold", *words],
        capture_output=True,
        encoding=encoding,
        env={**os.environ, "PYTHONIOENCODING": encoding, **(variables or {})},
        input=stdin,
        check=False,
    )
