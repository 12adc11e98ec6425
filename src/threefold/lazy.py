"""Lazy re-exports: a package names its public objects and imports each on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
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
            return getattr(importlib.import_module(homes[name]), name)
        except ModuleNotFoundError as error:
            extra = PACKAGE_EXTRAS.get(homes[name].split(".")[1], "all")
            explained = missing_extra(error, extra, f"{package}.{name}")
            raise explained or error from None

    return get_attribute, lambda: public, public
