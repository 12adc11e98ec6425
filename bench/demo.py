"""Time, peak memory and scores of the demo: `uv run python bench/demo.py [RUN]`.

RUN is the run folder, by default a fresh one. Prints the figures of README and docs/results.md.
Claims: at most 6 minutes and 3 GB on two cores, accuracy at least 0.88.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Run the demo in a process of its own and print the split."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "demo"
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "threefold", "demo", "--out", str(out)], check=True)
        wall = time.monotonic() - began
        results = json.loads((out / "results.json").read_text())
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        seconds = results["seconds"] | {
            "start, data, prediction": wall - sum(results["seconds"].values())
        }
        print(
            f"\n{results['hardware']}, {results['threads']} threads, "
            f"commit {results['commit']}, {results['created'][:10]}"
        )
        for name, value in seconds.items():
            print(f"{name:24} {value:7.1f} s  {value / wall:5.0%}")
        print(f"{'whole':24} {wall:7.1f} s   peak memory {memory:.2f} GB")
        for s in results["scores"]:
            if s["rows"] == "test":
                low, high = s["interval"]
                print(f"{s['name']:24} {s['accuracy']:.4f} [{low:.4f}, {high:.4f}]")


if __name__ == "__main__":
    main()
