"""Figures of the paper, drawn again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from support.paper import fake_item_results, fake_stage

from threefold.paper.figures import draw_figure, draw_stages
from threefold.paper.results import CellResult


@pytest.mark.parametrize("draw", ["dots", "groups", "macs", "curves"])
def test_every_kind_of_figure_is_drawn(draw: str, tmp_path: Path) -> None:
    """Also where a cell was left out, and where the paper has no value."""
    cell = CellResult(
        row="X",
        column="STD",
        paper=0.95,
        ours=0.9,
        interval=(0.8, 0.95),
        per_seed=(0.89, 0.91),
        macs=4_000_000_000,
        parameters=20_000_000,
    )
    cells = (cell, cell.replace(paper=None), cell.replace(ours=None, interval=None))
    stages = (fake_stage(), fake_stage(paper=None))

    path = draw_figure(fake_item_results(cells, stages, draw), tmp_path / "f.png")

    with Image.open(path) as figure:
        assert (np.asarray(figure.convert("RGB")) < 128).any()


def test_a_stage_of_one_epoch_can_be_seen() -> None:
    axes = Figure().add_subplot()

    draw_stages(axes, fake_item_results(stages=(fake_stage(select=(0.5,), paper=None),)))

    assert [line.get_marker() for line in axes.lines] == ["."]
