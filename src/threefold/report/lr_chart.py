"""The chart of a learning-rate range test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from threefold.errors import RunError
from threefold.files import write_bytes
from threefold.report.chart_files import Chart
from threefold.report.svg import ACCENT, INK, SOFT, draw_png, draw_svg

_Array = np.ndarray[Any, Any]
_SIZE = (5.6, 3.4)
_DASHED: Any = (0, (3, 3))
_HEADROOM = 0.4
"""Share of the losses' span that is shown above their start, for the names of the lines."""


def plot_learning_rates(curve: tuple[_Array, _Array, _Array], marks: Mapping[str, float]) -> Chart:
    """Draw losses against learning rates.

    Args:
        curve: learning rates, losses and smoothed losses, each (s,).
        marks: names and learning rates of vertical lines.
    """
    label = "Loss of each step against its learning rate"
    return Chart.of([("", draw_svg(lambda axes: _draw(axes, curve, marks), _SIZE, label))])


def save_learning_rates(
    path: Path, curve: tuple[_Array, _Array, _Array], marks: Mapping[str, float]
) -> Path:
    """Write the chart as .svg or .png, and return its path.

    Raises:
        RunError: the name has another ending, or the file cannot be written.
    """
    check_chart_name(path)
    if path.suffix.lower() == ".svg":
        return plot_learning_rates(curve, marks).save(path)
    write_bytes(path, draw_png(lambda axes: _draw(axes, curve, marks), _SIZE))
    return path


def check_chart_name(path: Path) -> None:
    """Refuse a name that ends in neither .svg nor .png.

    Raises:
        RunError: one line about it.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise RunError(
            "unknown kind of chart", where=path, expected="a name that ends in .svg or .png"
        )


def _draw(axes: Axes, curve: tuple[_Array, _Array, _Array], marks: Mapping[str, float]) -> None:
    rates, losses, smoothed = curve
    axes.plot(rates, losses, ".", color=SOFT, markersize=4, alpha=0.6)
    axes.plot(rates, smoothed, color=ACCENT, linewidth=1.8)
    axes.set_xscale("log")
    low = float(min(smoothed.min(), np.quantile(losses, 0.02)))
    high = float(max(smoothed[: max(1, int(smoothed.argmin()) + 1)].max(), losses[:10].max()))
    span = max(high - low, 1e-6)
    axes.set_ylim(low - 0.1 * span, high + _HEADROOM * span)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.0e}"))
    axes.xaxis.set_minor_locator(NullLocator())
    for height, (name, rate) in zip((0.99, 0.92, 0.85), marks.items(), strict=False):
        axes.axvline(rate, ymax=height, color=SOFT, linewidth=1.0, linestyle=_DASHED)
        axes.annotate(
            f"{name} {rate:.2g} ",
            (rate, height),
            xycoords=("data", "axes fraction"),
            ha="right" if rate > rates[0] else "left",
            va="top",
            color=INK,
            fontsize=8.0,
        )
    axes.set(xlabel="learning rate", ylabel="loss of the step's images")
    axes.grid(axis="y")
