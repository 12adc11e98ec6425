"""The program's entry point: runs the command line and turns errors into exit codes."""

from __future__ import annotations

import sys

from threefold.cli.app import app
from threefold.cli.console import print_error
from threefold.errors import ThreefoldError
from threefold.extras import VERB_EXTRAS, missing_extra


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 an error that the user can fix (one line on standard error), 2 wrong
    usage, 130 interrupted.
    """
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
