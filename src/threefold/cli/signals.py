"""Signals that end the program: work is saved within a grace time, and the exit code is 128 + n.

The handlers are installed before anything heavy is imported, so that there is no moment at which a
signal ends with a traceback, with another exit code, or not at all.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from threefold.errors import ThreefoldError

if TYPE_CHECKING:
    from threefold.training.progress.watcher import Watcher

NAMES: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Ctrl-C, a request to end, a closed terminal, and what schedulers send as a warning (Slurm:
SIGUSR1; Grid Engine and LSF: both). Without a handler, each would end the program unsaved."""

GRACE_SECONDS = 5.0
"""How long a stop waits for training to save its state. Docker kills after ten seconds."""

LAST_SECONDS: Final = 3.0
"""How long the program then has to clean up before it is ended where it stands."""

SAVING_SECONDS: Final = 60.0
"""The same for a state that is being written, which may be large."""

SAME_SECONDS: Final = 0.3
"""A second SIGINT within this time is the same one: some launchers pass on what the terminal has
sent to the whole process group."""

_SHOW_CURSOR: Final = b"\x1b[?25h"
"""What a terminal needs if a progress bar is cut off."""


class Terminated(KeyboardInterrupt):
    """The user or the system has told the program to end, by a signal.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Signals:
    """Handlers that end the program in order.

    Attributes:
        watcher: of the training that may defer a stop until it has saved its state.
        number: of the first signal that came; 0 = none.
        is_told: whether the user has been told what to do next.
    """

    def __init__(self) -> None:
        self.watcher: Watcher | None = None
        self.number = 0
        self.is_told = False
        self._since = 0.0
        self._is_late = self._is_raised = False
        self._over = threading.Event()
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + n after signal n; that of Ctrl-C where Python itself has raised its exception."""
        return 128 + (self.number or signal.SIGINT)

    def install(self) -> None:
        """Take the place of the default handlers; a signal that is ignored stays ignored."""
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is None:  # Windows has the first two
                continue
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = handler
                signal.signal(number, self._receive)

    def restore(self) -> None:
        """Put the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            self._over.set()

    def let_go(self) -> None:
        """Let a signal end the process, which has nothing more to do, without a word.

        Python would print a traceback for an exception while it waits for its threads. A stop that
        waits for them too long is still ended.
        """
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)
        self._before = {}
        if not self.number:
            self._over.set()

    def have_ended(self, error: BaseException) -> bool:
        """Whether an exception is there because of a signal.

        Libraries turn `Terminated` into other exceptions, such as an ImportError while they are
        imported. What a user has to know, such as a full disk while the state was saved, is not.
        """
        if not self.number:
            return isinstance(error, KeyboardInterrupt)
        if isinstance(error, SystemExit) and error.code in (0, None):
            return False
        if isinstance(error, SystemExit | ThreefoldError):
            codes = (128 + signal.SIGINT, 128 + self.number)  # the first is Typer's
            is_code = isinstance(error, SystemExit) and error.code in codes
            # A library in another language may have made an error of its own of what was raised.
            is_consequence = isinstance(error, ThreefoldError) and self._is_raised
            return is_code or is_consequence or _comes_from_stop(error)
        return True

    def _receive(self, number: int, _: object) -> None:
        """End the work, or let training save its state first; a second Ctrl-C ends at once."""
        if self.number and not self._is_late:
            is_new = time.monotonic() - self._since > SAME_SECONDS
            if number == signal.SIGINT and is_new:
                _end(number)
            return
        if not self.number:
            self.number, self._since = number, time.monotonic()
            threading.Thread(target=self._insist, daemon=True).start()
            watcher = self.watcher
            if watcher is not None and watcher.defers_stop and watcher.stop is None:
                watcher.stop = Terminated(number)
                return
        self._is_late, self._is_raised = False, True
        raise Terminated(self.number)

    def _insist(self) -> None:
        """See to it that the process ends: what was raised may be swallowed, or never arrive."""
        if self._over.wait(GRACE_SECONDS):
            return
        seconds = SAVING_SECONDS
        if self._is_raised or (self.watcher is not None and self.watcher.defers_stop):
            seconds = LAST_SECONDS
            self._is_late = True
            if hasattr(signal, "pthread_kill"):  # which also wakes the main thread where it waits
                signal.pthread_kill(threading.main_thread().ident or 0, self.number)
            else:
                signal.raise_signal(self.number)
        if not self._over.wait(seconds):
            _end(self.number)


def _comes_from_stop(error: BaseException | None) -> bool:
    """Whether an exception was raised because of `Terminated`, or while that was handled."""
    while error is not None:
        if isinstance(error, Terminated):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end(number: int) -> None:
    """End the process where it stands, as SIGKILL would; files are written atomically."""
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)
    os._exit(128 + number)


_active: Signals | None = None
"""The handlers of this process, if they are installed."""


@contextmanager
def catch_signals(watcher: Watcher | None = None) -> Iterator[Signals]:
    """Raise `Terminated` at Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2.

    While training defers a stop, it has `GRACE_SECONDS` to end its step and save its state. A
    second Ctrl-C does not wait. Signals that are ignored, as under nohup, stay ignored. Other
    threads than the main one cannot have handlers, and have none.

    Args:
        watcher: of a training; within the handlers of the whole program, it joins them.

    Yields:
        The handlers, which know what came.
    """
    global _active
    is_main = threading.current_thread() is threading.main_thread()
    if _active is not None and is_main:
        outer, before = _active, _active.watcher
        outer.watcher = watcher or before
        try:
            yield outer
        finally:
            outer.watcher = before
        return
    signals = Signals()
    signals.watcher = watcher
    if not is_main:
        yield signals
        return
    _active = signals
    signals.install()
    try:
        yield signals
    finally:
        _active = None
        signals.restore()
