"""Draw the results of an item as a PNG file: our values with intervals beside the paper's."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from threefold.files import write_bytes
from threefold.paper.results import ItemResults, StageCurve

_OURS, _PAPER = "#1f5fa8", "#c2541b"
_MEMBER_COLORS = ("#1f5fa8", "#2e8b57", "#8a4fa3", "#b8860b", "#444444", "#c04080", "#2f8f9d")
_ACCURACY = "share of images answered right"
_SCALES = {
    "full": "full scale",
    "small": "small: other networks, fewer images and epochs than the paper's",
    "smoke": "smoke: made-up pictures, says nothing about the paper",
}


def draw_figure(results: ItemResults, path: Path) -> Path:
    """Draw dots, learning curves, accuracy against multiply-adds, or accuracy by group.

    Args:
        results: the content of reproduce.json.
        path: the PNG file to write.

    Returns:
        `path`.
    """
    is_list = results.draw in ("dots", "groups")
    height = 1.6 + 0.28 * max(8, len(results.cells)) if is_list else 5.0
    figure = Figure(figsize=(8.0, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if results.draw == "curves":
        draw_stages(axes, results)
    elif results.draw == "macs":
        _draw_costs(axes, results)
    else:
        _draw_cells(axes, results)
    setting = f"{_SCALES[results.scale]}, protocol {results.protocol}, {results.trained[:10]}"
    figure.suptitle(f"{results.title}\n{setting}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""})
    write_bytes(path, buffer.getvalue())
    return path


def _draw_cells(axes: Axes, results: ItemResults) -> None:
    """Draw a line per cell: our dot in its interval, the paper's diamond."""
    for line, cell in enumerate(results.cells):
        if cell.ours is not None and cell.interval is not None:
            axes.plot(cell.interval, (line, line), color=_OURS, linewidth=2)
            axes.plot(cell.ours, line, "o", color=_OURS, markersize=5)
            if len(cell.per_seed) > 1:
                seeds = [line] * len(cell.per_seed)
                axes.plot(cell.per_seed, seeds, "|", color=_OURS, markersize=9)
        if cell.paper is not None:
            axes.plot(cell.paper, line, "D", color=_PAPER, fillstyle="none", markersize=6)
    axes.set_yticks(range(len(results.cells)), [cell.label for cell in results.cells], fontsize=8)
    axes.set_ylim(len(results.cells) - 0.4, -0.6)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_xlabel(_ACCURACY)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    _add_legend(axes)


def draw_stages(axes: Axes, results: ItemResults) -> None:
    """Draw accuracy on the select rows epoch by epoch, and the notebooks' best of each stage."""
    members: dict[tuple[str, str], list[StageCurve]] = {}
    for stage in results.stages:
        members.setdefault((stage.run, stage.member), []).append(stage)
    several_runs = len({run for run, _ in members}) > 1
    for i, ((run, member), stages) in enumerate(members.items()):
        color, epoch = _MEMBER_COLORS[i % len(_MEMBER_COLORS)], 0
        for stage in stages:
            label = None
            if stage is stages[0]:
                label = f"{member}, {run}" if several_runs else member
            epochs = range(epoch + 1, epoch + 1 + len(stage.select))
            # With points, since a stage of one epoch has no line.
            axes.plot(
                epochs, stage.select, ".-", color=color, linewidth=1.2, markersize=5, label=label
            )
            epoch += len(stage.select)
            if stage.paper is not None:
                axes.plot(epoch, stage.paper, "D", color=color, fillstyle="none", markersize=6)
            if stage is not stages[-1]:
                axes.axvline(epoch + 0.5, color="#999999", linewidth=0.5)
    axes.grid(axis="y", linewidth=0.4)
    axes.set(xlabel="epoch", ylabel="accuracy on the select rows (diamonds: the authors' best)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(fontsize=7)


def _draw_costs(axes: Axes, results: ItemResults) -> None:
    """Draw accuracy against multiply-adds, with areas by parameters (paper, figure 4)."""
    cells = [cell for cell in results.cells if cell.macs]
    largest = max((cell.parameters or 0 for cell in cells), default=0) or 1
    for cell in cells:
        billions = (cell.macs or 0) / 1e9
        parameters = cell.parameters or 0
        if cell.ours is not None and cell.interval is not None:
            axes.plot((billions, billions), cell.interval, color=_OURS, linewidth=1.2)
            area = 30 + 300 * parameters / largest
            axes.scatter(billions, cell.ours, s=area, color=_OURS, alpha=0.5)
            axes.annotate(
                f"{cell.row}\n{parameters / 1e6:.1f} M",
                (billions, cell.ours),
                fontsize=7,
                xytext=(6, 4),
                textcoords="offset points",
            )
        if cell.paper is not None:
            axes.plot(billions, cell.paper, "D", color=_PAPER, fillstyle="none", markersize=6)
    axes.grid(linewidth=0.4)
    axes.set(xlabel="multiply-adds of one image, 10⁹", ylabel=_ACCURACY)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _add_legend(axes)


def _add_legend(axes: Axes) -> None:
    ours = Line2D([], [], color=_OURS, marker="o", label="ours, 95 % interval")
    paper = Line2D(
        [], [], color=_PAPER, marker="D", fillstyle="none", linestyle="none", label="the paper"
    )
    axes.legend(handles=[ours, paper], fontsize=8)
