"""Pictures and pipelines for exported files."""

from __future__ import annotations

import numpy as np

from threefold.ensembles.registry import make_ensemble
from threefold.ensembles.scaling import temperature_module
from threefold.models.pipeline import Combiner, Pipeline
from threefold.training.run import Run


def whole(run: Run, method: str = "mean") -> Pipeline:
    oof = run.predictions("oof")
    return run.pipeline(
        Combiner(
            make_ensemble(method).fit(oof.probs, oof.labels).to_module(), temperature_module(1.3)
        )
    )


def pictures(count: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.integers(
            0, 256, (int(rng.integers(3, 90)), int(rng.integers(3, 90)), 3), dtype=np.uint8
        )
        for _ in range(count)
    ]
