"""The command line: verbs, flags, and tables on the terminal."""

import time
from typing import Final

STARTED: Final = time.monotonic()
"""When the program was started; a time budget counts from here."""
