"""A browser for the tests of the pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from support.browser import chromium

    with chromium() as driver:
        yield driver
