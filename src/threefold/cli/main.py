"""The program's entry point: runs the command line and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TextIO

# Everything else is imported once signals are caught.
from threefold.cli.signals import Signals, catch_signals

if TYPE_CHECKING:
    from threefold.errors import ThreefoldError

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
        _check_streams()
        from threefold.cli import app, console

        _silence_pillow()
        console.make_robust_streams()
        try:
            app.app()
        except SystemExit:
            sys.stdout.flush()  # what was printed has arrived, or that is an error
            raise
    except BaseException as error:
        if signals.have_ended(error):
            # What was half made when the signal came complains as it is thrown away.
            sys.unraisablehook = lambda _: None
            _tell_stopped(signals)
            raise SystemExit(signals.exit_code) from None
        if not isinstance(error, Exception):
            raise
        _explain(error)


def _check_streams() -> None:
    """Refuse a closed standard output at once, and replace other closed streams by nothing.

    A file that is opened later would take the place of a closed stream, and what a library prints
    would go into it.

    Raises:
        ThreefoldError: standard output is closed.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # 0, 1 and 2 are the streams
        pass
    is_closed = sys.stdout is None
    nothing = os.fdopen(descriptor, "r+", encoding="utf-8")
    sys.stdin = sys.stdin or nothing
    sys.stdout = sys.stdout or nothing
    sys.stderr = sys.stderr or nothing
    if is_closed:
        from threefold.errors import ThreefoldError

        raise ThreefoldError(
            "cannot write",
            where="standard output",
            got="it is closed",
            fix="leave it open, or send it to /dev/null",
        )


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
        _give_up(sys.stdout)
        sys.exit(0)
    elif isinstance(error, ModuleNotFoundError):
        verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        message = missing_extra(error, VERB_EXTRAS.get(verb, "all"), f"threefold {verb}".strip())
    elif is_out_of_memory(error):
        message = out_of_memory(f"threefold {' '.join(sys.argv[1:2])}".strip(), error)
    elif isinstance(error, OSError):
        message = _describe(error)
    if message is None:
        raise error
    _give_up(sys.stdout)
    with suppress(OSError):  # a full disk, to which standard error goes
        print_error(message)
    _give_up(sys.stderr)
    sys.exit(1)


def _describe(error: OSError) -> ThreefoldError:
    """Say what an error of the system is about, such as a path that is too long."""
    from threefold.errors import ThreefoldError, is_disk_error

    if error.filename is None and is_disk_error(error):  # only openings name their file
        where = "standard output" if _give_up(sys.stdout) or _is_of_console(error) else ""
        return ThreefoldError("cannot write", where=where, got=error)
    name = str(error.filename or "")
    where = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
    return ThreefoldError("cannot use the file", where=where, got=error)


def _is_of_console(error: OSError) -> bool:
    """Whether something could not be printed, which may be lost by then."""
    import traceback

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    printers = ("rich.console", "threefold.cli.console")
    return bool(frames) and frames[-1].f_globals.get("__name__") in printers


def _give_up(stream: TextIO) -> bool:
    """Let go of what cannot be printed, or Python would say so at its end, with code 120.

    Returns:
        Whether there was such output.
    """
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _silence_pillow() -> None:
    """Keep Pillow's remarks on odd files off the terminal: unreadable images have their own."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
