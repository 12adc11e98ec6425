"""Charts of the report on their own: for a notebook, or as files."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from threefold.errors import RunError
from threefold.files import write_bytes
from threefold.names import printable
from threefold.report.svg import PAGE_COLOURS

_GAP: Final = 28
"""Units above each of several drawings, for its title."""


@dataclass(frozen=True, repr=False)
class Chart:
    """A drawing that a notebook shows, and that can be saved as a file.

    Attributes:
        svg: the whole SVG document, dark on white.
    """

    svg: str

    @classmethod
    def of(cls, drawings: Sequence[tuple[str, str]]) -> Chart:
        """Put drawings of the report below each other.

        Args:
            drawings: titles and SVG elements of `charts`; an empty title takes no space.
        """
        parts, width, top = [], 0.0, 0.0
        for title, markup in drawings:
            drawing = str(markup)  # Markup would escape what is put into it
            right, bottom = _size(drawing)
            if title:
                text = html.escape(printable(title, ""))
                parts.append(f'<text x="8" y="{top + 18:g}" font-weight="600">{text}</text>')
                top += _GAP
            frame = f'x="0" y="{top:g}" width="{right:g}" height="{bottom:g}"'
            parts.append(drawing.replace("<svg", f"<svg {frame}", 1))
            width, top = max(width, right), top + bottom
        body = "".join(parts)
        for variable, colour in PAGE_COLOURS.items():
            body = body.replace(variable, colour)
        return cls(
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width:g}pt" height="{top:g}pt" viewBox="0 0 {width:g} {top:g}" '
            f'font-family="system-ui, sans-serif" font-size="12">'
            f'<rect width="100%" height="100%" fill="#fff"/>{body}</svg>'
        )

    def __repr__(self) -> str:
        """Say in one line what it is, since the document has thousands of characters."""
        width, height = _size(self.svg)
        return f'<Chart of {width:.0f} x {height:.0f} points; save("chart.svg") writes it>'

    def _repr_svg_(self) -> str:
        """What a notebook shows."""
        return self.svg

    def save(self, path: str | Path) -> Path:
        """Write the drawing as an SVG file, and return its path.

        Raises:
            RunError: the name does not end in .svg, or the file cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() != ".svg":
            raise RunError(
                "charts are saved as SVG",
                where=target,
                expected="a name that ends in .svg",
                fix="browsers, Inkscape and LibreOffice turn SVG into other formats",
            )
        write_bytes(target, self.svg.encode())
        return target


def _size(drawing: str) -> tuple[float, float]:
    """Return width and height of an SVG element, from its viewBox."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    assert box is not None
    return float(box[1]), float(box[2])
