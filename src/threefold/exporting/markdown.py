"""Cells of tables in Markdown."""

from __future__ import annotations


def share(value: float | None) -> str:
    """A number with three decimals, or a dash for none."""
    return "-" if value is None else f"{value:.3f}"


def cell(text: str) -> str:
    """A text for a cell."""
    return " ".join(text.split()).replace("|", "\\|")
