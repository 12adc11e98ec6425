"""Figures of the paper, drawn again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from threefold.files import write_json
from threefold.paper.figures import _curves, draw_figure


@pytest.mark.parametrize("draw", ["dots", "groups", "macs", "curves"])
def test_every_kind_of_figure_is_drawn(draw: str, tmp_path: Path) -> None:
    """Also where a cell was left out, and where the paper has no value."""
    cell = {
        "row": "X",
        "column": "STD",
        "paper": 0.95,
        "ours": 0.9,
        "interval": [0.8, 0.95],
        "per_seed": [0.89, 0.91],
        "macs": 4e9,
        "parameters": 2e7,
    }
    cells = [cell, {**cell, "paper": None}, {**cell, "ours": None, "interval": None}]
    stage = {"run": "run", "member": "m", "select": [0.5, 0.6], "paper": 0.95}
    found = {
        "title": "T",
        "scale": "small",
        "protocol": "honest",
        "trained": "2026-11-24",
        "draw": draw,
        "cells": cells,
        "stages": [stage, {**stage, "paper": None}],
    }
    with Image.open(draw_figure(found, tmp_path / "f.png")) as figure:
        assert (np.asarray(figure.convert("RGB")) < 128).any()
    write_json(tmp_path / "reproduce.json", found)


def test_a_stage_of_one_epoch_can_be_seen() -> None:
    axes = Figure().add_subplot()
    _curves(axes, {"stages": [{"run": "run", "member": "m", "select": [0.5], "paper": None}]})
    assert [line.get_marker() for line in axes.lines] == ["."]
