"""Render templates to HTML, with one way to write numbers, times and names on every page."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.exceptions import UndefinedError

from threefold.errors import RunError
from threefold.report.charts import short_count

_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
"""English names; those of `calendar` follow the locale."""


def render(template: str, where: str, **context: Any) -> str:
    """Render a template of this package; all text is escaped.

    Args:
        template: file name of the template.
        where: source of the data, for the error.
        context: the variables of the template.

    Raises:
        RunError: the data lack a key.
    """
    try:
        return _environment().get_template(template).render(**context)
    except (UndefinedError, KeyError) as error:
        raise RunError(
            "results.json or a history.json lacks a key", where=where, expected=error
        ) from None


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("threefold.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        number=number,
        duration=duration,
        when=when,
        points=points,
        big=short_count,
        chance=chance,
        rows_name=rows_name,
    )
    return environment


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share as per cent; a dash for None."""
    return "–" if value is None else f"{100 * float(value):.{digits}f}\u00a0%"


def number(value: float | None, digits: int = 0) -> str:
    """Write a number with commas; a dash for None."""
    return "–" if value is None else f"{float(value):,.{digits}f}"


def points(value: float | None, digits: int = 1) -> str:
    """Write a difference of shares in points, with its sign; a dash for None."""
    if value is None:
        return "–"
    text = f"{100 * float(value):+.{digits}f}"
    if float(text) == 0:
        return f"{0:.{digits}f}"
    return text.replace("-", "−")


def rows_name(rows: str) -> str:
    """Write a kind of rows in words; an unknown kind is unchanged."""
    return {"oof": "out-of-fold", "test": "test", "foreign": "given"}.get(rows, rows)


def chance(p: float) -> str:
    """Write a p-value as `verdict` of the paired tests does."""
    if p < 0.001:
        return "< 0.001"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """Write seconds in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def when(text: str) -> str:
    """Write an ISO time as 24 November 2026, 06:15 UTC; any other text is unchanged."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return text
    if time.tzinfo is not None:
        time = time.astimezone(UTC)
    zone = " UTC" if time.tzinfo is not None else ""
    return f"{time.day} {_MONTHS[time.month - 1]} {time.year}, {time:%H:%M}{zone}"
