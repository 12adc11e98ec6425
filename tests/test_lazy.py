"""Large imports pause Python's garbage collector, and leave it as it was."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from threefold.lazy import importing_for_good, without_collecting


def test_the_collector_pauses_and_goes_on() -> None:
    with without_collecting():
        during = gc.isenabled()

    assert not during
    assert gc.isenabled()


def test_the_collector_goes_on_after_an_import_that_fails() -> None:
    with pytest.raises(ModuleNotFoundError), without_collecting():
        __import__("no_such_module")

    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with importing_for_good():
            pass

        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_imported_is_not_looked_at_again_until_the_end() -> None:
    program = """
import atexit, gc
before = gc.get_freeze_count()  # Python 3.12 freezes some objects by itself
atexit.register(lambda: print(gc.get_freeze_count() < first - 1000))  # runs last
from threefold.lazy import importing_for_good
with importing_for_good():
    import json
first = gc.get_freeze_count()
with importing_for_good():
    import decimal
print(first > before + 1000, gc.get_freeze_count() == first, gc.isenabled())
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout.split("\n") == ["True True True", "True", ""], done.stderr
