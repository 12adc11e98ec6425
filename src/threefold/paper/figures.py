"""Figures of `reproduce.json`: our values with their intervals beside the paper's, as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from threefold.files import write_bytes

_OURS, _PAPER = "#1f5fa8", "#c2541b"
_SCALES = {
    "full": "full scale",
    "small": "small: other networks, fewer images and epochs than the paper's",
    "smoke": "smoke: made-up pictures, says nothing about the paper",
}
_COLOURS = ("#1f5fa8", "#2e8b57", "#8a4fa3", "#b8860b", "#444444", "#c04080", "#2f8f9d")


def draw_figure(found: Mapping[str, Any], path: Path) -> Path:
    """Draw what `reproduce` found: dots, learning curves, accuracy against multiply-adds, or accuracy by group.

    Args:
        found: the content of reproduce.json.
        path: the PNG file to write.

    Returns:
        `path`.
    """
    import io

    height = (
        1.6 + 0.28 * max(8, len(found["cells"])) if found["draw"] in ("dots", "groups") else 5.0
    )
    figure = Figure(figsize=(8.0, height), dpi=120, layout="constrained")
    draw = {"curves": _curves, "macs": _macs}.get(found["draw"], _dots)
    draw(figure.add_subplot(), found)
    figure.suptitle(
        f"{found['title']}\n{_SCALES[found['scale']]}, protocol {found['protocol']}, {found['trained'][:10]}",
        fontsize=10,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""})
    write_bytes(path, buffer.getvalue())
    return path


def _dots(axes: Axes, found: Mapping[str, Any]) -> None:
    """A line per cell: our dot in its interval, the paper's diamond."""
    cells = found["cells"]
    for line, cell in enumerate(cells):
        _ours(axes, cell, line)
        if cell["paper"] is not None:
            axes.plot(cell["paper"], line, "D", color=_PAPER, fillstyle="none", markersize=6)
    axes.set_yticks(
        range(len(cells)), [f"{c['row']} {c['column']}".strip() for c in cells], fontsize=8
    )
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_xlabel("share of images answered right")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes)


def _ours(axes: Axes, cell: Mapping[str, Any], line: float) -> None:
    if cell["ours"] is None:
        return
    axes.plot(cell["interval"], (line, line), color=_OURS, linewidth=2)
    axes.plot(cell["ours"], line, "o", color=_OURS, markersize=5)
    if len(cell["per_seed"]) > 1:
        axes.plot(cell["per_seed"], [line] * len(cell["per_seed"]), "|", color=_OURS, markersize=9)


def _curves(axes: Axes, found: Mapping[str, Any]) -> None:
    """Accuracy on the select rows, epoch by epoch; the notebooks' best epoch of each stage as diamonds."""
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for stage in found["stages"]:
        lines.setdefault((stage["run"], stage["member"]), []).append(stage)
    several = len({run for run, _ in lines}) > 1
    for i, ((run, member), stages) in enumerate(lines.items()):
        colour, start = _COLOURS[i % len(_COLOURS)], 0
        for stage in stages:
            x = range(start + 1, start + 1 + len(stage["select"]))
            label = (f"{member}, {run}" if several else member) if stage is stages[0] else None
            # With points: a stage of one epoch has no line.
            axes.plot(
                x, stage["select"], ".-", color=colour, linewidth=1.2, markersize=5, label=label
            )
            start += len(stage["select"])
            if stage["paper"] is not None:
                axes.plot(start, stage["paper"], "D", color=colour, fillstyle="none", markersize=6)
            if stage is not stages[-1]:
                axes.axvline(start + 0.5, color="#999999", linewidth=0.5)
    axes.grid(axis="y", linewidth=0.4)
    axes.set(xlabel="epoch", ylabel="accuracy on the select rows (diamonds: the authors' best)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(fontsize=7)


def _macs(axes: Axes, found: Mapping[str, Any]) -> None:
    """Accuracy against multiply-adds, area by parameters (paper, figure 4)."""
    cells = [c for c in found["cells"] if c.get("macs")]
    largest = max((c["parameters"] for c in cells), default=1)
    for cell in cells:
        x = cell["macs"] / 1e9
        if cell["ours"] is not None:
            axes.plot((x, x), cell["interval"], color=_OURS, linewidth=1.2)
            axes.scatter(
                x, cell["ours"], s=30 + 300 * cell["parameters"] / largest, color=_OURS, alpha=0.5
            )
            text = f"{cell['row']}\n{cell['parameters'] / 1e6:.1f} M"
            axes.annotate(
                text, (x, cell["ours"]), fontsize=7, xytext=(6, 4), textcoords="offset points"
            )
        if cell["paper"] is not None:
            axes.plot(x, cell["paper"], "D", color=_PAPER, fillstyle="none", markersize=6)
    axes.grid(linewidth=0.4)
    axes.set(xlabel="multiply-adds of one image, 10⁹", ylabel="share of images answered right")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes)


def _legend(axes: Axes) -> None:
    marks: Sequence[Line2D] = (
        Line2D([], [], color=_OURS, marker="o", label="ours, 95 % interval"),
        Line2D(
            [], [], color=_PAPER, marker="D", fillstyle="none", linestyle="none", label="the paper"
        ),
    )
    axes.legend(handles=list(marks), fontsize=8)
