"""Fixtures of the tests of the report."""

from __future__ import annotations

import pytest

from threefold.report import charts


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave charts out, which take most of the time, in tests of words and tables."""
    monkeypatch.setattr(charts, "draw_svg", lambda *_: "")
