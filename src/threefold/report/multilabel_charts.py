"""Charts of several labels per image: average precision, curves of each label, co-occurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from threefold.names import printable
from threefold.predictions.multilabel_results import LabelScore, MultilabelScore
from threefold.report.charts import WIDTH, name_lines
from threefold.report.svg import ACCENT, INK, LINE, SOFT, draw_svg, short_name
from threefold.stats.multilabel import label_reliability, precision_recall
from threefold.stats.scores import wilson_interval

MATRIX_LABELS = 30
"""A larger matrix cannot be read."""
MAX_LINES = 60
"""Largest number of labels with a line of their own, those of the lowest average precision."""
SMALL = (2.7, 2.3)
"""Inches of the chart of one label."""
_DASHED: Any = (0, (3, 3))
_Array = np.ndarray[Any, Any]


def score_dots(scores: Sequence[MultilabelScore]) -> Markup:
    """Draw mean average precision and interval of every ensemble and member, in order."""

    def draw(axes: Axes) -> None:
        for line, score in enumerate(scores):
            colour = ACCENT if score.kind == "ensemble" else INK
            interval = score.mean_average_precision_interval
            axes.plot(interval, (line, line), color=colour, linewidth=2, solid_capstyle="round")
            axes.plot(score.mean_average_precision, line, "o", color=colour, markersize=6)
        name_lines(axes, [short_name(printable(score.name)) for score in scores])
        axes.set_xlabel("mean average precision")

    size = (WIDTH, 0.9 + 0.34 * len(scores))
    return draw_svg(draw, size, "Mean average precision with its interval")


def label_dots(labels: Sequence[LabelScore]) -> Markup:
    """Draw average precision and interval of each label; a line marks the share of its images.

    Args:
        labels: those with an average precision, in the order of the lines.
    """
    shown = labels[:MAX_LINES]

    def draw(axes: Axes) -> None:
        for line, label in enumerate(shown):
            interval = label.average_precision_interval or (0.0, 1.0)
            axes.plot(interval, (line, line), color=INK, linewidth=2, solid_capstyle="round")
            axes.plot(label.average_precision or 0.0, line, "o", color=INK, markersize=6)
        name_lines(axes, [short_name(printable(label.name)) for label in shown])
        axes.set(xlim=(-0.02, 1.02), xlabel="average precision")

    size = (WIDTH, 0.9 + (0.34 if len(shown) <= 16 else 0.25) * len(shown))
    return draw_svg(draw, size, "Average precision of each label with its interval")


def precision_recall_curve(
    name: str, probs: _Array, targets: _Array, point: tuple[float | None, float | None]
) -> Markup:
    """Draw precision against recall of one label, and where its threshold stands.

    Args:
        name: of the label.
        probs: (n,).
        targets: (n,).
        point: recall and precision of the labels that are given; None where not defined.
    """
    recall, precision = precision_recall(probs, targets)

    def draw(axes: Axes) -> None:
        rate = float(np.mean(targets))
        axes.plot((0, 1), (rate, rate), color=SOFT, linewidth=1.0, linestyle=_DASHED)
        axes.step([0.0, *recall], [precision[0], *precision], where="pre", color=ACCENT)
        if point[0] is not None and point[1] is not None:
            axes.plot(point[0], point[1], "o", color=INK, markersize=6)
        axes.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.04), xlabel="recall", ylabel="precision")
        axes.grid(axis="both")

    return draw_svg(draw, SMALL, f"Precision against recall of {printable(name)}")


def reliability(name: str, probs: _Array, targets: _Array, level: float) -> Markup:
    """Draw the share of images with one label against its stated probability.

    Args:
        name: of the label.
        probs: (n,).
        targets: (n,).
        level: level of the intervals through the dots.
    """
    curve = label_reliability(probs, targets)

    def draw(axes: Axes) -> None:
        axes.plot((0, 1), (0, 1), color=SOFT, linewidth=1.0, linestyle=_DASHED)
        for x, share, n in zip(*curve, strict=True):
            interval = wilson_interval(round(share * n), int(n), level)
            axes.plot((x, x), interval, color=ACCENT, linewidth=1.2)
            axes.plot(x, share, "o", color=ACCENT, markersize=5)
        axes.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.04), xlabel="probability", ylabel="frequency")
        axes.grid(axis="both")

    return draw_svg(draw, SMALL, f"Frequency against probability of {printable(name)}")


def cooccurrence(targets: _Array, classes: Sequence[str]) -> Markup:
    """Draw the share of the images with one label (row) that have another, too (column).

    Args:
        targets: (n, k).
        classes: k names.
    """
    together = targets.astype(np.float64).T @ targets
    shares = together / np.maximum(np.diag(together)[:, None], 1)
    k = len(classes)
    names = [short_name(printable(name), 18) for name in classes]

    def draw(axes: Axes) -> None:
        for row, column in np.argwhere(shares > 0):
            share = float(shares[row, column])
            if row == column:
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=LINE, lw=0))
                continue
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, color=ACCENT, alpha=share, lw=0)
            )
            if k <= 15:
                colour = "#ffffff" if share > 0.6 else INK
                text = f"{100 * share:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8.0, color=colour)
        axes.set_xticks(range(k), names, rotation=90)
        axes.set_yticks(range(k), names)
        axes.set(
            xlim=(-0.5, k - 0.5),
            ylim=(k - 0.5, -0.5),
            xlabel="that also have",
            ylabel="of the images with",
            aspect="equal",
        )
        axes.tick_params(length=0)

    side = 1.6 + (0.42 if k <= 15 else 0.28) * k
    return draw_svg(draw, (side, side), "How often labels occur together, in per cent")
