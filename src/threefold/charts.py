"""The report's charts: inline SVG in the page's colours (CSS variables), so that one chart serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from threefold import stats

# Drawn in these stand-in colours, which become the page's variables in the finished SVG.
_INK, _SOFT, _LINE, _ACCENT = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {_INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)", _ACCENT: "var(--accent)"}
_STYLE: Any = {  # Any: newer matplotlib types the keys, older does not
    "svg.fonttype": "none",
    "svg.hashsalt": "threefold",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
_BINS = 10
_Array = np.ndarray[Any, Any]


def score_dots(scores: Sequence[Mapping[str, Any]]) -> Markup:
    """Accuracy and interval of every ensemble and member, in the order given.

    Args:
        scores: entries of results.json's `scores`. Those on the same rows as the first get full dots, the others rings.
    """
    names = list(dict.fromkeys(s["name"] for s in scores))

    def draw(axes: Axes) -> None:
        for score in scores:
            _draw_score(axes, score, names.index(score["name"]), score["rows"] == scores[0]["rows"])
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(_percent_ticks())
        axes.set_xlabel("share of images answered right")
        axes.grid(axis="x")

    return _svg(draw, (6.6, 0.8 + 0.36 * len(names)), "Accuracy of every ensemble and member, with its interval")


def learning_curve(name: str, stages: Sequence[Sequence[Mapping[str, Any]]], limits: tuple[float, float]) -> Markup:
    """Accuracy on the select rows, epoch by epoch, of one member: stages side by side, one line per fold.

    Args:
        name: the member's.
        stages: for each stage, the history.json of every fold.
        limits: of the accuracy axis, the same for all members of a run.
    """

    def draw(axes: Axes) -> None:
        start = 0
        for number, histories in enumerate(stages, 1):
            width = max((len(history["epochs"]) for history in histories), default=0)
            if not width:
                continue
            if start:
                axes.axvline(start, color=_LINE, linewidth=1.0)
            for history in histories:
                _draw_stage(axes, history, start)
            axes.text(start + width / 2, 1.03, f"stage {number}", transform=axes.get_xaxis_transform(), ha="center")
            start += width
        axes.set(xlim=(0, start), ylim=limits, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.yaxis.set_major_formatter(_percent_ticks())
        axes.grid(axis="y")

    return _svg(draw, (4.2, 2.7), f"Learning curve of {name}: accuracy on the select rows after each epoch")


def reliability(probs: _Array, labels: _Array, level: float) -> Markup:
    """Of the answers given with about this confidence, the share that was right; bars count the answers.

    Args:
        probs: (n, k).
        labels: (n,).
        level: of the intervals through the dots.
    """
    curve = stats.reliability_curve(probs, labels, bins=_BINS)

    def draw(axes: Axes) -> None:
        # The bins are closed at their upper end, so the mean confidence says which bin a point is.
        axes.bar((np.ceil(curve.confidence * _BINS) - 0.5) / _BINS, curve.n / len(labels), 0.9 / _BINS, color=_LINE)
        for x, share, n in zip(*curve, strict=True):
            interval = stats.wilson_interval(round(share * n), int(n), level)
            axes.plot((x, x), interval, color=_ACCENT, linewidth=1.2)
            axes.plot(x, share, "o", color=_ACCENT, markersize=5)
        axes.plot((0, 1), (0, 1), color=_SOFT, linewidth=1.0, linestyle=(0, (3, 3)))
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="stated confidence", ylabel="share answered right")
        axes.xaxis.set_major_formatter(_percent_ticks())
        axes.yaxis.set_major_formatter(_percent_ticks())
        axes.grid(axis="both")

    return _svg(draw, (4.4, 3.8), "Share of right answers against stated confidence")


def _draw_score(axes: Axes, score: Mapping[str, Any], line: int, main: bool) -> None:
    if main:
        colour = _ACCENT if score["kind"] == "ensemble" else _INK
        axes.plot(score["interval"], (line, line), color=colour, linewidth=2.0, solid_capstyle="round")
        axes.plot(score["accuracy"], line, "o", color=colour, markersize=6)
    else:
        axes.plot(score["interval"], (line + 0.3, line + 0.3), color=_SOFT, linewidth=1.0)
        axes.plot(score["accuracy"], line + 0.3, "o", color=_SOFT, markersize=4, fillstyle="none")


def _draw_stage(axes: Axes, history: Mapping[str, Any], start: int) -> None:
    """One fold in one stage; a dot marks the epoch that was kept, a dashed line with a cross a stage that was not."""
    y = [epoch["select_accuracy"] for epoch in history["epochs"]]
    x = [start + position for position in range(1, len(y) + 1)]
    # A later stage begins at the weights it was handed; before the first there is nothing worth a line.
    led = ([start, *x], [history["started_from"], *y]) if start else (x, y)
    if not history["kept"]:
        axes.plot(*led, color=_SOFT, linewidth=1.2, linestyle=(0, (2, 2)))
        axes.plot(x[-1:], y[-1:], "x", color=_SOFT, markersize=5, clip_on=False)
        return
    axes.plot(*led, color=_ACCENT, linewidth=1.2)
    best = [place for place, epoch in enumerate(history["epochs"]) if epoch["epoch"] == history["best_epoch"]]
    for place in best:
        axes.plot(x[place], y[place], "o", color=_ACCENT, markersize=4, clip_on=False)


def _percent_ticks() -> PercentFormatter:
    return PercentFormatter(1.0, symbol="\u00a0%")


def _svg(draw: Callable[[Axes], None], size: tuple[float, float], label: str) -> Markup:
    """Draw with matplotlib (`size` in inches), and keep of its file what an HTML page needs."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # not unique over the charts of one page, and nothing refers to them
    svg = re.sub(r' (?:xmlns(?::xlink)?|width|height)="[^"]*"', "", svg, count=4)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(label)}"', 1))
