"""Matplotlib drawings as inline SVG, in CSS variables for the page's light and dark colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

INK: Final = "#010203"
SOFT: Final = "#040506"
LINE: Final = "#070809"
ACCENT: Final = "#0a0b0c"
"""Stand-in colours of a drawing, which become the page's variables in the finished SVG."""

PAGE_COLOURS: Final = {
    "var(--ink)": "#1b1d20",
    "var(--soft)": "#62676f",
    "var(--line)": "#d9dce1",
    "var(--accent)": "#0a6c8c",
}
"""The page's variables on a light page, as report.css has them."""

_VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", ACCENT: "var(--accent)"}
_STYLE: Any = {  # Any: newer matplotlib types the keys, older does not
    "svg.fonttype": "none",
    "svg.hashsalt": "threefold",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


LARGEST_SCALE = 1.4
"""Most by which a page enlarges a drawing."""


def draw_svg(draw: Callable[[Axes], None], size: tuple[float, float], label: str) -> Markup:
    """Draw on a pair of axes, and return an SVG element for an HTML page.

    Args:
        draw: draws with the colours of this module.
        size: width and height in inches, of 6 rem each; the page scales the drawing to the
            available width, up to `LARGEST_SCALE`.
        label: text for screen readers.
    """
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser's fonts draw the text; matplotlib only measures it, and may lack a glyph.
        warnings.filterwarnings(
            "ignore", message=r"Glyph .* missing from font|.*Matplotlib currently does not support"
        )
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The ids of groups are not unique over the charts of one page, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' (?:xmlns(?::xlink)?|width|height)="[^"]*"', "", svg, count=4)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    # A small drawing, such as the matrix of two classes, is not blown up to the page's width.
    width = f"width: min(100%, {size[0] * LARGEST_SCALE * 6:.1f}rem)"
    head = f'<svg role="img" aria-label="{Markup.escape(label)}" style="{width}"'
    return Markup(svg.replace("<svg", head, 1))


def draw_png(draw: Callable[[Axes], None], size: tuple[float, float], dpi: int = 150) -> bytes:
    """Draw as `draw_svg` does, dark on white, and return a PNG file.

    Args:
        draw: draws with the colours of this module.
        size: width and height in inches.
        dpi: pixels for each inch.
    """
    colours = {stand_in: PAGE_COLOURS[name] for stand_in, name in _VARIABLES.items()}
    style = {key: colours.get(value, value) for key, value in _STYLE.items()}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        for artist in figure.findobj():
            _recolour(artist, colours)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _recolour(artist: Artist, colours: Mapping[str, str]) -> None:
    """Replace stand-in colours of an artist: of lines and texts, of edges and faces."""
    for part in ("color", "edgecolor", "facecolor", "markeredgecolor", "markerfacecolor"):
        get, put = (getattr(artist, f"{verb}_{part}", None) for verb in ("get", "set"))
        if get is None or put is None:
            continue
        colour = get()
        if is_color_like(colour) and to_hex(colour) in colours:
            put(colours[to_hex(colour)])


def percent_ticks() -> PercentFormatter:
    """Return a formatter of shares as per cent, with a space before the sign."""
    return PercentFormatter(1.0, symbol="\u00a0%")


def short_name(name: str, length: int = 26) -> str:
    """Shorten a name beside a chart in the middle, since the ends of long names differ."""
    name = " ".join(name.split())
    if len(name) <= length:
        return name
    head = length // 3
    return f"{name[:head]}…{name[head + 1 - length :]}"
