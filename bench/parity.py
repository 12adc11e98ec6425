"""Compare an exported file with the pipeline in eager float32 PyTorch, one line per precision.

    uv run python bench/parity.py RUN [--images 1000] [--precisions float32,float16,bfloat16,int8]

RUN is a finished run with test rows; it is only read. Every precision is built, written, loaded
with `threefold.load` and run on each image by itself. Prints the largest and the 99th percentile
difference of a probability, the images with another class, the correct answers before and after,
the file's size and the processor time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import threefold
from threefold.exporting import onnx_graph
from threefold.exporting.export import chosen_ensemble, spread_rows
from threefold.exporting.parity import compare
from threefold.exporting.quantization import CALIBRATION_IMAGES
from threefold.runtime.tolerances import TOLERANCES
from threefold.training.provenance import commit, hardware
from threefold.training.run import Run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--precisions", default=",".join(TOLERANCES))
    args = parser.parse_args()
    run = Run.open(args.run)
    test, train = run.sources.test, run.sources.train
    assert test is not None, "the run has no test rows"
    ensemble = chosen_ensemble(run)
    names = ensemble.members
    pipeline = run.pipeline(ensemble.combiner, names)
    rows = spread_rows(test, args.images)
    images = [test.pixels(row) for row in rows]
    print(
        f"{hardware()}, torch {torch.__version__}, commit {commit()}, {time.strftime('%Y-%m-%d')}; "
        f"{len(images)} test images, {len(names)} members",
        flush=True,
    )
    expected = pipeline.predict_proba(images)
    calibration = [train.pixels(row) for row in spread_rows(train, CALIBRATION_IMAGES)]
    print(
        f"{'precision':10}{'MB':>8}{'largest':>10}{'99 %':>10}{'other class':>13}"
        f"{'correct':>14}{'lost':>6}{'gained':>8}{'CPU ms an image':>17}"
    )
    for precision in args.precisions.split(","):
        model = onnx_graph.build_graph(pipeline, precision, calibration)
        onnx_graph.set_card(model, onnx_graph.card_of(pipeline, precision, {}))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(model.SerializeToString())
            loaded = threefold.load(path, threads=1)
            start = time.process_time()
            answers = loaded.predict_proba(images)
            milliseconds = 1000 * (time.process_time() - start) / len(images)
            report = compare(expected, answers, precision, test.labels[rows])
            accuracy = report.accuracy
            assert accuracy is not None
            percentile = float(np.quantile(np.abs(answers - expected).max(1), 0.99))
            correct = f"{accuracy.before} -> {accuracy.after}"
            print(
                f"{precision:10}{path.stat().st_size / 1e6:8.1f}"
                f"{report.max_difference:10.1e}{percentile:10.1e}"
                f"{report.changed + report.ties:13}{correct:>14}"
                f"{accuracy.lost:6}{accuracy.gained:8}{milliseconds:17.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
