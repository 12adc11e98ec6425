"""The same run gives the same file, whatever Python's hashes are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.paths import ROOT

BUILD = """
import hashlib
from support.cascades import make_cascade_case
from threefold.exporting import onnx_cascade, onnx_graph
case = make_cascade_case()
graph = onnx_graph.build_graph(case.pipeline, stages=case.cascade.stages)
names = onnx_graph.network_names(case.pipeline)
cascade = onnx_cascade.add_cascade(graph, case.cascade, names)
for model in (graph, cascade):
    print(hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest())
"""


@pytest.mark.long
def test_nodes_have_one_order() -> None:
    digests = set()
    for seed in ("1", "2"):
        process = subprocess.run(
            [sys.executable, "-c", BUILD],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "tests")},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        digests.add(process.stdout)

    assert len(digests) == 1
    assert len(digests.pop().split()) == 2
