"""Items, runs and results of the paper's reproduction, made up for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from threefold.paper.results import CellResult, ItemResults, StageCurve
from threefold.predictions.predictions import Predictions
from threefold.predictions.records import VERSION
from threefold.predictions.results_schema import MemberRow
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.lookup import packaged
from threefold.recipe.recipe import Recipe


@dataclass
class FakeResults:
    """The part of a run's results that the measuring reads."""

    members: tuple[MemberRow, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class FakeRun:
    """The part of a finished run that the measuring reads."""

    folder: Any = None
    results: FakeResults = field(default_factory=FakeResults)
    recipe: Recipe = field(default_factory=lambda: packaged("demo"))


def fake_run(
    folder: Path, hits: dict[str, list[bool]], groups: tuple[str, ...] | None = None
) -> FakeRun:
    """Return a run whose members answer two classes, right on the given test rows."""
    right = np.array(list(hits.values()))
    count = right.shape[1]
    Predictions(
        probs=np.where(right[..., None], [0.9, 0.1], [0.1, 0.9]),
        labels=np.zeros(count, int),
        ids=tuple(f"i{n}" for n in range(count)),
        classes=("a", "b"),
        members=tuple(hits),
        groups=groups,
        kind="test",
    ).save(folder / "test.npz")
    members = [
        MemberRow(
            name=name,
            backbone="net",
            img_size=8,
            weights="none",
            head="linear",
            parameters=5,
            macs=7,
        )
        for name in hits
    ]
    return FakeRun(RunFolder(folder), FakeResults(tuple(members)))


def fake_item_results(
    cells: tuple[CellResult, ...] = (), stages: tuple[StageCurve, ...] = (), draw: Any = "dots"
) -> ItemResults:
    """Return the results of a small run of some item."""
    return ItemResults(
        version=VERSION,
        item="table1",
        title="T",
        scale="small",
        protocol="honest",
        draw=draw,
        seeds=(1,),
        created="2026-11-24",
        trained="2026-11-24",
        hardware="",
        threads=2,
        commit="",
        training_minutes=1.0,
        cells=cells,
        comparisons=(),
        stages=stages,
        notes=(),
    )


def fake_stage(**changes: Any) -> StageCurve:
    """Return the curve of a stage of two epochs."""
    stage = StageCurve(
        run="run",
        member="m",
        stage="lr3",
        number=0,
        lr=1e-3,
        select=(0.5, 0.6),
        best=0.6,
        accepted=2,
        folds=2,
        paper=0.95,
    )
    return stage.replace(**changes)
