"""Where the command starts: the command line where its packages are installed, `predict` alone where they are not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from threefold.errors import ThreefoldError
from threefold.extras import VERBS, explained


def main() -> None:
    """Entry point: 0 ok, 1 an error that the user can mend (one line), 2 wrong usage, 130 interrupted."""
    words = sys.argv[1:]
    verb = next((word for word in words if not word.startswith("-")), "")
    try:
        try:
            from threefold.cli import main as run
        except ModuleNotFoundError as error:
            missing = explained(error, VERBS.get(verb, "cli"), f"threefold {verb}".strip())
            if missing is None:
                raise
            if verb != "predict" or words[0] != verb:
                raise missing from None
            _predict(words[1:])
        else:
            run()
    except ModuleNotFoundError as error:
        missing = explained(error, VERBS.get(verb, "all"), f"threefold {verb}")
        if missing is None:
            raise
        _fail(missing)
    except ThreefoldError as error:
        _fail(error)
    except BrokenPipeError:
        sys.exit(0)


def _fail(error: ThreefoldError) -> None:
    print(f"error {error}", file=sys.stderr)
    sys.exit(1)


def _predict(words: Sequence[str]) -> None:
    """The verb predict of `cli.py`, with the standard library: same flags, same answers."""
    from threefold import answers

    parser = argparse.ArgumentParser(
        "threefold predict",
        description="Classify images with an exported file; needs neither torch nor the run.",
        epilog="The other verbs need more packages, e.g. pip install 'threefold[cli]'.",
    )
    parser.add_argument("model", type=Path, help="An exported model file.")
    parser.add_argument(
        "images", nargs="+", help="Files, folders, or - for a list on standard input."
    )
    parser.add_argument("--top", type=int, default=3, help="How many classes to name.")
    parser.add_argument("--json", action="store_true", help="Machine-readable output.")
    parser.add_argument(
        "--csv", action="store_true", help="One row per image with every probability."
    )
    parser.add_argument(
        "--mode",
        default="full",
        help="full: every member; fast: stop where the first members are sure.",
    )
    parser.add_argument(
        "--budget", default="", help="Time of the model for an image, e.g. 15ms; see the cascade."
    )
    given = parser.parse_intermixed_args(words)
    if given.top < 1:
        parser.error("--top is at least 1")
    form = "json" if given.json else "csv" if given.csv else "text"

    def tell(what: object) -> None:
        print(f"error {what}" if isinstance(what, ThreefoldError) else what, file=sys.stderr)

    spent = answers.milliseconds(given.budget, given.mode)
    if answers.write(
        sys.stdout, tell, given.model, given.images, given.top, form, given.mode, spent
    ):
        sys.exit(1)
