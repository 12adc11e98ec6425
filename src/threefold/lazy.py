"""Imports that cost little: lazy re-exports, and large libraries without collecting garbage."""

from __future__ import annotations

import atexit
import gc
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from threefold.extras import PACKAGE_EXTRAS, missing_extra


def lazy_exports(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package (PEP 562).

    Importing the package stays quick, and each object needs only the packages that it uses.

    Args:
        package: full name of the package.
        modules: the public names of each module, by the module's full name.
    """
    homes = {name: module for module, names in modules.items() for name in names}
    public = sorted(homes)

    def get_attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            with without_collecting():
                return getattr(importlib.import_module(homes[name]), name)
        except ModuleNotFoundError as error:
            extra = PACKAGE_EXTRAS.get(homes[name].split(".")[1], "all")
            explained = missing_extra(error, extra, f"{package}.{name}")
            raise explained or error from None

    return get_attribute, lambda: public, public


@contextmanager
def without_collecting() -> Iterator[None]:
    """Import modules without collecting garbage meanwhile.

    torch and timm make half a million objects, none of them garbage. Python's collector looks at
    all of them again whenever their number has grown by a quarter, which takes a quarter to a half
    of the time of the import (measured, docs/LOG.md).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def importing_for_good() -> Iterator[None]:
    """Import what the process needs to its end: no later collection looks at it again."""
    with without_collecting():
        yield
        _freeze_once()


@cache
def _freeze_once() -> None:
    """Freeze what there is, the first time; later, what is garbage by then would stay, too."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries complain of what is left at the end
