"""Tell whoever follows how far a long count is: images listed, downloaded or verified.

What counts does not know who shows it. A bar on a terminal listens with `listening`; without a
listener a report costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, TypeVar

Listener = Callable[[str, int, int], object]
"""Called with what is counted, how many are done, and of how many (0 = unknown)."""

T = TypeVar("T")

_PAUSE: Final = 0.1
"""Seconds between two reports of a loop: enough for a bar, too few to slow the loop down."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send the reports of this context to a listener."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report(what: str, done: int, total: int = 0) -> None:
    """Tell the listener, if there is one, how far a count is."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)


def counted(items: Iterable[T], what: str, total: int = 0, done: int = 0) -> Iterator[T]:
    """Yield the items of a loop and report how many there have been, ten times a second at most.

    Args:
        items: to go through.
        what: they are, for people.
        total: how many there will be; 0 = unknown.
        done: how many came before the first item.
    """
    reported = 0.0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - reported >= _PAUSE:
            reported = now
            report(what, done, total)
    report(what, done, total or done)
