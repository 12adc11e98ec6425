"""The charts of the report and of the page about saved predictions, as inline SVG.

Every function returns an SVG element in the colours of the page. Scores are drawn unchanged. Only
the points of the reliability curve, and places where dots do not hide each other, are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

from threefold.names import printable
from threefold.predictions.results_schema import Score, SizeCurveRecord
from threefold.report.svg import ACCENT, INK, LINE, SOFT, draw_svg, percent_ticks, short_name
from threefold.stats import scores as stats

MATRIX_CLASSES = 30
"""A larger matrix cannot be read; the list of confused pairs can."""
MAX_LINES = 24
"""Largest number of lines of scores; the members beyond it share the last one."""
WIDTH = 5.6
"""Inches of a chart over the whole width: its 9 point letters suit a phone and a large screen."""
_BINS = 10
_DASHED: Any = (0, (3, 3))
_Array = np.ndarray[Any, Any]


def score_dots(scores: Sequence[Score], max_lines: int = MAX_LINES) -> Markup:
    """Draw accuracy and interval of every ensemble and member, in order.

    Args:
        scores: entries of results.json's `scores`. Those on the same rows as the first get full
            dots, the others rings.
        max_lines: of more names than this, the last ones share one line without intervals.
    """
    keys = list(dict.fromkeys((s.kind, s.name) for s in scores))
    shown = keys if len(keys) <= max_lines else keys[: max_lines - 1]
    names = [short_name(name) for _, name in shown]
    if len(keys) > len(shown):
        names.append(f"{len(keys) - len(shown)} others")

    def draw(axes: Axes) -> None:
        for score in scores:
            is_main, key = score.rows == scores[0].rows, (score.kind, score.name)
            if key in shown:
                _draw_score(axes, score, shown.index(key), is_main)
            elif is_main:
                axes.plot(score.accuracy, len(shown), "o", color=SOFT, markersize=4, alpha=0.6)
        name_lines(axes, names)
        axes.xaxis.set_major_formatter(percent_ticks())
        axes.set_xlabel("share of images answered right")

    height = 0.8 + (0.36 if len(names) <= 16 else 0.28) * len(names)
    return draw_svg(
        draw, (WIDTH, height), "Accuracy of every ensemble and member, with its interval"
    )


def learning_curve(
    name: str,
    stages: Sequence[Sequence[Mapping[str, Any]]],
    limits: tuple[float, float],
    metric: str = "accuracy",
) -> Markup:
    """Draw a member's accuracy on the select rows after each epoch: stages side by side.

    Args:
        name: name of the member.
        stages: for each stage, the history.json of every fold; each gets a line.
        limits: ends of the accuracy axis, the same for all members of a run.
        metric: what takes the place of the accuracy, in words.
    """

    def draw(axes: Axes) -> None:
        start = 0
        for number, histories in enumerate(stages, 1):
            width = max((len(history["epochs"]) for history in histories), default=0)
            if not width:
                continue
            if start:
                axes.axvline(start, color=LINE, linewidth=1.0)
            for history in histories:
                _draw_stage(axes, history, start)
            axes.text(
                start + width / 2,
                1.03,
                f"stage {number}",
                transform=axes.get_xaxis_transform(),
                ha="center",
            )
            start += width
        axes.set(xlim=(0, max(1, start)), ylim=limits, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.yaxis.set_major_formatter(percent_ticks())
        axes.grid(axis="y")

    return draw_svg(
        draw, (4.2, 2.7), f"Learning curve of {name}: {metric} on the select rows after each epoch"
    )


def reliability(probs: _Array, labels: _Array, level: float) -> Markup:
    """Draw the share of right answers against confidence, with bars for the number of answers.

    Args:
        probs: probabilities (n, k).
        labels: class numbers (n,).
        level: level of the intervals through the dots.
    """
    curve = stats.reliability_curve(probs, labels, bins=_BINS)

    def draw(axes: Axes) -> None:
        # The bins are closed at their upper end, so the mean confidence gives a point's bin.
        axes.bar(
            (np.ceil(curve.confidence * _BINS) - 0.5) / _BINS,
            curve.n / len(labels),
            0.9 / _BINS,
            color=LINE,
        )
        for x, share, n in zip(*curve, strict=True):
            interval = stats.wilson_interval(round(share * n), int(n), level)
            axes.plot((x, x), interval, color=ACCENT, linewidth=1.2)
            axes.plot(x, share, "o", color=ACCENT, markersize=5)
        axes.plot((0, 1), (0, 1), color=SOFT, linewidth=1.0, linestyle=_DASHED)
        axes.set(
            xlim=(0, 1.02),
            ylim=(0, 1.02),
            xlabel="stated confidence",
            ylabel="share answered right",
        )
        axes.xaxis.set_major_formatter(percent_ticks())
        axes.yaxis.set_major_formatter(percent_ticks())
        axes.grid(axis="both")

    return draw_svg(draw, (4.4, 3.8), "Share of right answers against stated confidence")


def confusion(matrix: _Array, classes: Sequence[str]) -> Markup:
    """Draw counts of answers (columns) to images of each class (rows), shaded by share of the row.

    Args:
        matrix: counts (k, k).
        classes: k names.
    """
    k = len(matrix)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names = [short_name(printable(name), 18) for name in classes]

    def draw(axes: Axes) -> None:
        for row, column in np.argwhere(matrix > 0):
            is_dark = shares[row, column] > 0.6
            axes.add_patch(
                Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, color=ACCENT, alpha=shares[row, column], lw=0
                )
            )
            axes.text(
                column,
                row,
                f"{matrix[row, column]}",
                ha="center",
                va="center",
                fontsize=8.0 if k <= 15 else 6.0,
                color="#ffffff" if is_dark else INK,
            )
        axes.set_xticks(range(k), names, rotation=90)
        axes.set_yticks(range(k), names)
        axes.set(
            xlim=(-0.5, k - 0.5),
            ylim=(k - 0.5, -0.5),
            xlabel="answer",
            ylabel="right class",
            aspect="equal",
        )
        axes.tick_params(length=0)

    side = 1.6 + (0.42 if k <= 15 else 0.28) * k
    return draw_svg(draw, (side, side), "Number of answers for each right class")


def frequency_grid(right: int, low: int, high: int, of: int) -> Markup:
    """Draw squares for right answers, for those within the interval, and for wrong answers.

    Args:
        right: expected number of right answers.
        low: lower end of its interval.
        high: upper end of its interval.
        of: total number of squares, a multiple of 10.
    """
    columns = 10 if of <= 100 else 40
    rows = math.ceil(of / columns)
    side = "0.84"

    def squares(first: int, last: int) -> str:
        return "".join(
            f"M{cell % columns} {cell // columns}h{side}v{side}h-{side}z"
            for cell in range(max(0, first), min(of, last))
        )

    label = f"{of} squares: about {right} right, between {low} and {high}"
    parts = (("sure", squares(0, low)), ("maybe", squares(low, high)), ("wrong", squares(high, of)))
    drawn = "".join(f'<path class="{name}" d="{path}"/>' for name, path in parts if path)
    return Markup(
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {columns} {rows}">{drawn}</svg>'
    )


def optimism(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw an arrow for every choice: from its apparent accuracy to that on rows it has not seen.

    Args:
        rows: entries with name, apparent, honest (shares) and difference.
    """

    def draw(axes: Axes) -> None:
        for line, row in enumerate(rows):
            apparent, honest = row["apparent"], row["honest"]
            axes.plot(
                apparent, line, "o", color=SOFT, markersize=7, fillstyle="none", markeredgewidth=1.3
            )
            if apparent != honest:
                style = {
                    "arrowstyle": "-|>",
                    "color": SOFT,
                    "shrinkA": 4,
                    "shrinkB": 4,
                    "linewidth": 1.2,
                }
                axes.annotate("", (honest, line), (apparent, line), arrowprops=style)
            axes.plot(honest, line, "o", color=ACCENT, markersize=7)
        name_lines(axes, [short_name(row["name"]) for row in rows])
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(percent_ticks())
        axes.set_xlabel("share of images answered right")

    return draw_svg(
        draw,
        (WIDTH, 0.8 + 0.4 * len(rows)),
        "Accuracy that every choice appears to reach, and really reaches",
    )


def pareto(points: Sequence[Mapping[str, Any]], level: float) -> Markup:
    """Draw accuracy against multiply-adds, with the Pareto front and the chosen ensemble marked.

    Dots of nearly the same cost are set side by side. Points with a number are drawn with interval
    and number, the others small.

    Args:
        points: entries with macs (above 0), accuracy, interval, kind, number (or None), front and
            chosen.
        level: level of the intervals, for the name of the axis.
    """
    numbered = sorted((p for p in points if p["number"]), key=lambda p: (p["macs"], p["number"]))
    logs = np.log10([float(p["macs"]) for p in numbered])
    span = max(float(np.ptp(np.log10([float(p["macs"]) for p in points]))), 0.5)
    places = _side_by_side(logs, 0.021 * span * 1.12)

    def draw(axes: Axes) -> None:
        for point in points:
            if not point["number"]:
                axes.plot(
                    np.log10(point["macs"]),
                    point["accuracy"],
                    "o",
                    color=SOFT,
                    markersize=3,
                    alpha=0.5,
                )
        front = [(x, p["accuracy"]) for x, p in zip(places, numbered, strict=True) if p["front"]]
        axes.step(*zip(*front, strict=True), where="post", color=LINE, linewidth=2.5, zorder=1)
        for x, point in zip(places, numbered, strict=True):
            _draw_cost(axes, float(x), point)
        all_places = [*places, *(np.log10(p["macs"]) for p in points)]
        axes.set_xlim(min(all_places) - 0.06 * span, max(all_places) + 0.06 * span)
        _cost_ticks(axes)
        axes.yaxis.set_major_formatter(percent_ticks())
        axes.set(
            xlabel="multiply-adds for one image",
            ylabel=f"answered right, with {100 * level:g}\u00a0% interval",
        )
        axes.grid(axis="y")

    return draw_svg(draw, (WIDTH, 4.0), "Accuracy against multiply-adds for one image")


def differences(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw the difference in accuracy of every pair with its interval, in points.

    Args:
        rows: entries with a, b, difference, interval (shares) and sure (there is evidence).
    """

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=SOFT, linewidth=1.0, linestyle=_DASHED)
        for line, row in enumerate(rows):
            colour = ACCENT if row["sure"] else INK
            axes.plot(
                [100 * v for v in row["interval"]],
                (line, line),
                color=colour,
                linewidth=2,
                solid_capstyle="round",
            )
            axes.plot(
                100 * row["difference"],
                line,
                "o",
                color=colour,
                markersize=6,
                fillstyle="full" if row["sure"] else "none",
            )
        name_lines(
            axes, [f"{short_name(row['a'], 20)} − {short_name(row['b'], 20)}" for row in rows]
        )
        axes.set_xlabel("difference in points; right of the line the first is better")

    height = 0.9 + (0.36 if len(rows) <= 16 else 0.26) * len(rows)
    return draw_svg(draw, (WIDTH, height), "Differences in accuracy with their intervals")


def size_curve(curve: SizeCurveRecord) -> Markup:
    """Draw the accuracy of the mean of 1, 2, ... members in random order and best first.

    Args:
        curve: shares for each number of members.
    """
    sizes = np.arange(1, len(curve.mean) + 1)

    def draw(axes: Axes) -> None:
        axes.fill_between(sizes, curve.low, curve.high, color=LINE, alpha=0.6, linewidth=0)
        axes.plot(sizes, curve.mean, color=SOFT, linewidth=1.5)
        axes.plot(
            sizes,
            curve.ordered,
            color=ACCENT,
            linewidth=1.8,
            marker="o" if len(sizes) <= 15 else "",
            markersize=4,
        )
        axes.set(xlim=(0.5, len(sizes) + 0.5), xlabel="number of members", ylabel="answered right")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        axes.yaxis.set_major_formatter(percent_ticks())
        axes.grid(axis="y")

    return draw_svg(draw, (WIDTH, 3.2), "Accuracy against the number of members that are averaged")


def name_lines(axes: Axes, names: Sequence[str]) -> None:
    """Name the lines of a chart from the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _draw_score(axes: Axes, score: Score, line: int, is_main: bool) -> None:
    if is_main:
        colour = ACCENT if score.kind == "ensemble" else INK
        axes.plot(score.interval, (line, line), color=colour, linewidth=2.0, solid_capstyle="round")
        axes.plot(score.accuracy, line, "o", color=colour, markersize=6)
    else:
        axes.plot(score.interval, (line + 0.3, line + 0.3), color=SOFT, linewidth=1.0)
        axes.plot(score.accuracy, line + 0.3, "o", color=SOFT, markersize=4, fillstyle="none")


def _draw_cost(axes: Axes, x: float, point: Mapping[str, Any]) -> None:
    """Draw a dot with its interval, its number above, and a ring round the chosen one."""
    colour = ACCENT if point["kind"] == "ensemble" else INK
    axes.plot((x, x), point["interval"], color=colour, linewidth=1.0, alpha=0.6)
    axes.plot(x, point["accuracy"], "o", color=colour, markersize=6)
    if point["chosen"]:
        axes.plot(
            x,
            point["accuracy"],
            "o",
            color=colour,
            markersize=12,
            fillstyle="none",
            markeredgewidth=1.5,
        )
    place: Any = {
        "ha": "center",
        "va": "bottom",
        "fontsize": 8.0,
        "weight": "bold" if point["chosen"] else "normal",
    }
    # On three heights, since the numbers of neighbours would touch on one.
    above = (x, 1.01 + 0.04 * (point["number"] % 3))
    leader = {"arrowstyle": "-", "color": LINE, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate(
        str(point["number"]),
        (x, point["interval"][1]),
        above,
        textcoords=("data", "axes fraction"),
        arrowprops=leader,
        color=colour,
        **place,
    )


def _side_by_side(places: _Array, gap: float) -> _Array:
    """Move ascending places as little as possible (least squares) until they are `gap` apart."""
    steps = gap * np.arange(len(places))
    return np.asarray(isotonic_regression(places - steps).x + steps)


def _cost_ticks(axes: Axes) -> None:
    """Name round numbers on an axis of powers of ten."""
    low, high = axes.get_xlim()
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [
            step * 10.0**power
            for power in powers
            for step in steps
            if low <= np.log10(step * 10.0**power) <= high
        ]
        if len(ticks) >= 3:
            break
    if not ticks:  # the costs are nearly equal, and no round number lies between them
        ticks = [10 ** ((low + high) / 2)]
    ticks = ticks[:: math.ceil(len(ticks) / 6)]
    axes.set_xticks(np.log10(ticks), [short_count(tick) for tick in ticks])


def short_count(value: float) -> str:
    """Write a large count in words, such as 412 million or 1.24 billion."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= 0.9995 * size:  # a value that rounds to 1,000 gets the next word
            return f"{value / size:.3g} {word}"
    return f"{value:.3g}"


def _draw_stage(axes: Axes, history: Mapping[str, Any], start: int) -> None:
    """Draw one fold in one stage.

    A dot marks the best epoch of an accepted stage; a dashed line with a cross, a dropped stage.
    """
    y = [epoch["select_accuracy"] for epoch in history["epochs"]]
    x = [start + position for position in range(1, len(y) + 1)]
    line = (x, y)
    if start:  # a later stage begins at the accuracy of the weights that it takes over
        line = ([start, *x], [history["start_accuracy"], *y])
    if not history["accepted"]:
        axes.plot(*line, color=SOFT, linewidth=1.2, linestyle=(0, (2, 2)))
        axes.plot(x[-1:], y[-1:], "x", color=SOFT, markersize=5, clip_on=False)
        return
    axes.plot(*line, color=ACCENT, linewidth=1.2)
    for place, accuracy, epoch in zip(x, y, history["epochs"], strict=True):
        if epoch["epoch"] == history["best_epoch"]:
            axes.plot(place, accuracy, "o", color=ACCENT, markersize=4, clip_on=False)
