"""Parsing of time budgets."""

from __future__ import annotations

import pytest

from threefold.errors import DataError
from threefold.runtime.predict import parse_budget


@pytest.mark.parametrize(
    ("text", "milliseconds"), [("15ms", 15.0), ("0.5s", 500.0), (" 2.5 ms ", 2.5)]
)
def test_a_budget_is_parsed_to_milliseconds(text: str, milliseconds: float) -> None:
    assert parse_budget(text) == milliseconds


@pytest.mark.parametrize(
    "text", ["15", "ms", "-3ms", "0ms", "1m", "1e3ms", "nan ms", "", "9" * 400 + "ms"]
)
def test_a_budget_that_is_not_a_time_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not a time for an image; expected a number with ms or s"):
        parse_budget(text)
