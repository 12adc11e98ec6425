"""The program's entry point: runs the command line and turns errors into exit codes."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Final

# Everything else is imported once signals are caught.
from threefold.cli.signals import Signals, catch_signals

_LONGEST: Final = 200
"""Characters of a path in a message."""


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 an error that the user can fix (one line on standard error), 2 wrong
    usage, 128 + n ended by signal n.
    """
    with catch_signals() as signals:
        try:
            run(signals)
        finally:
            signals.let_go()


def run(signals: Signals) -> None:
    """Run the command line, where signals are caught already.

    Raises:
        SystemExit: with the exit code.
    """
    try:
        from threefold.cli import app, console

        _silence_pillow()
        console.make_robust_streams()
        app.app()
    except BaseException as error:
        if signals.have_ended(error):
            _tell_stopped(signals)
            raise SystemExit(signals.exit_code) from None
        if not isinstance(error, Exception):
            raise
        _explain(error)


def _tell_stopped(signals: Signals) -> None:
    """Say that a signal has ended the program, unless the verb has said so."""
    from threefold.cli.console import err

    if not signals.is_told:
        with suppress(OSError):  # after SIGHUP the terminal is gone
            err.print("[yellow]stopped[/]; run the same command again")


def _explain(error: Exception) -> None:
    """Print errors that the user can mend in one line, and raise others again."""
    from threefold.cli.console import print_error
    from threefold.errors import ThreefoldError, is_out_of_memory, out_of_memory
    from threefold.extras import VERB_EXTRAS, missing_extra

    message: ThreefoldError | None = None
    if isinstance(error, ThreefoldError):
        message = error
    elif isinstance(error, BrokenPipeError):
        sys.exit(0)
    elif isinstance(error, ModuleNotFoundError):
        verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        message = missing_extra(error, VERB_EXTRAS.get(verb, "all"), f"threefold {verb}".strip())
    elif is_out_of_memory(error):
        message = out_of_memory(f"threefold {' '.join(sys.argv[1:2])}".strip(), error)
    elif isinstance(error, OSError):  # such as a path that is too long for the file system
        name = str(error.filename or "")
        where = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
        message = ThreefoldError("cannot use the file", where=where, got=error)
    if message is None:
        raise error
    print_error(message)
    sys.exit(1)


def _silence_pillow() -> None:
    """Keep Pillow's remarks on odd files off the terminal: unreadable images have their own."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
