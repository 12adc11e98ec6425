"""The program's entry point: runs the command line and turns errors into exit codes."""

from __future__ import annotations

import logging
import sys
import warnings

from threefold.cli.app import app
from threefold.cli.console import make_robust_streams, print_error
from threefold.errors import ThreefoldError, is_out_of_memory, out_of_memory
from threefold.extras import VERB_EXTRAS, missing_extra

_LONGEST = 200
"""Characters of a path in a message."""


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 an error that the user can fix (one line on standard error), 2 wrong
    usage, 130 interrupted.
    """
    _silence_pillow()
    make_robust_streams()
    try:
        app()
    except ModuleNotFoundError as error:
        verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        missing = missing_extra(error, VERB_EXTRAS.get(verb, "all"), f"threefold {verb}".strip())
        if missing is None:
            raise
        print_error(missing)
        sys.exit(1)
    except ThreefoldError as error:
        print_error(error)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if is_out_of_memory(error):
            print_error(out_of_memory(f"threefold {' '.join(sys.argv[1:2])}".strip(), error))
        elif isinstance(error, OSError):  # such as a path that is too long for the file system
            name = str(error.filename or "")
            where = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
            print_error(ThreefoldError("cannot use the file", where=where, got=error))
        else:
            raise
        sys.exit(1)


def _silence_pillow() -> None:
    """Keep Pillow's remarks on odd files off the terminal: unreadable images have their own."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
