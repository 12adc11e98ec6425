"""Do what an error of a damaged run says."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from threefold import api
from threefold.errors import ThreefoldError
from threefold.recipe.recipe import Recipe


def halve(path: Path) -> None:
    """Cut a file in two, and keep the first part."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def advice(action: Callable[[], object]) -> tuple[list[Path], list[str]]:
    """Return what the error of an action says to delete, and the command to run."""
    with pytest.raises(ThreefoldError, match="fix: delete ") as error:
        action()
    text = str(error.value)
    assert "\n" not in text
    found = re.search(r"fix: delete (.+) and run `(.+)`", text)
    assert found, text
    return [Path(path) for path in found[1].split(" and ")], shlex.split(found[2])


def follow(deletions: list[Path], command: list[str]) -> None:
    """Do what the messages say."""
    for path in deletions:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    assert command[:2] == ["threefold", "train"]
    assert command[3] == "--out"
    api.train(Recipe.load(command[2]), command[4])
