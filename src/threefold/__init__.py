"""threefold: cross-validated ensembles of fine-tuned ConvNets, with honest scores, in one file.

Public names are imported when first used, so that `import threefold` is instant and `threefold.load` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "DataError": "errors",
    "ExportError": "errors",
    "RecipeError": "errors",
    "RunError": "errors",
    "ThreefoldError": "errors",
    "Recipe": "recipe",
    "Predictions": "predictions.predictions",
    "MeanEnsemble": "ensembles.averaging",
    "PrunedEnsemble": "ensembles.averaging",
    "VoteEnsemble": "ensembles.averaging",
    "WeightedEnsemble": "ensembles.averaging",
    "GreedyEnsemble": "ensembles.averaging",
    "StackedEnsemble": "ensembles.stacked",
    "Run": "training.run",
    "distill": "api",
    "export": "exporting.export",
    "fit": "api",
    "write_report": "report.pages",
    "train": "api",
    "load": "runtime.model",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'threefold' has no attribute {name!r}")
    home = _HOME[name]
    try:
        return getattr(importlib.import_module(f"threefold.{home}"), name)
    except ModuleNotFoundError as error:
        from threefold.extras import NAME_EXTRAS, missing_extra

        missing = missing_extra(error, NAME_EXTRAS.get(name, "all"), f"threefold.{name}")
        raise missing or error from None


def __dir__() -> list[str]:
    return __all__
