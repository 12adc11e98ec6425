"""The GPU benchmark runs from end to end on a CPU, at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_runs import make_folder

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.mark.long
@pytest.mark.slow
def test_the_gpu_benchmark_passes_on_a_cpu(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", per_class=24, test=4)
    sets = ["stages.tune.epochs=1", "members.lite0.img_size=32", "folds.select=0.2"]
    command = [sys.executable, SCRIPT, "--out", tmp_path, "--device", "cpu", "--tiny"]
    command += ["--cifar", images, *(word for text in sets for word in ("--set", text))]

    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    parts = {record["part"] for record in records}
    assert parts == {"start", "peak", "head", "data set", "network"}
    (data_set,) = (record for record in records if record["part"] == "data set")
    assert data_set["expected"]["n"] == 4 * 3
