"""threefold: cross-validated ensembles of fine-tuned ConvNets, with honest scores, in one file.

Public names are imported on first use: `import threefold` is instant, and `threefold.load` needs
no torch.
"""

from typing import TYPE_CHECKING

from threefold.lazy import lazy_exports

if TYPE_CHECKING:
    from threefold.api import distill as distill
    from threefold.api import fit as fit
    from threefold.api import train as train
    from threefold.classifier import Classifier as Classifier
    from threefold.ensembles.averaging import GreedyEnsemble as GreedyEnsemble
    from threefold.ensembles.averaging import MeanEnsemble as MeanEnsemble
    from threefold.ensembles.averaging import PrunedEnsemble as PrunedEnsemble
    from threefold.ensembles.averaging import VoteEnsemble as VoteEnsemble
    from threefold.ensembles.averaging import WeightedEnsemble as WeightedEnsemble
    from threefold.ensembles.stacked import StackedEnsemble as StackedEnsemble
    from threefold.errors import DataError as DataError
    from threefold.errors import ExportError as ExportError
    from threefold.errors import RecipeError as RecipeError
    from threefold.errors import RunError as RunError
    from threefold.errors import ThreefoldError as ThreefoldError
    from threefold.exporting.export import export as export
    from threefold.predictions.predictions import Predictions as Predictions
    from threefold.recipe.recipe import Recipe as Recipe
    from threefold.report.pages import write_report as write_report
    from threefold.runtime.model import load as load
    from threefold.saved_run import SavedRun as SavedRun
    from threefold.saved_run import open as open
    from threefold.training.planning.lr_finder import find_learning_rate as find_learning_rate
    from threefold.training.run import Run as Run

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.api": ["distill", "fit", "train"],
        "threefold.classifier": ["Classifier"],
        "threefold.ensembles.averaging": [
            "GreedyEnsemble",
            "MeanEnsemble",
            "PrunedEnsemble",
            "VoteEnsemble",
            "WeightedEnsemble",
        ],
        "threefold.ensembles.stacked": ["StackedEnsemble"],
        "threefold.errors": [
            "DataError",
            "ExportError",
            "RecipeError",
            "RunError",
            "ThreefoldError",
        ],
        "threefold.exporting.export": ["export"],
        "threefold.predictions.predictions": ["Predictions"],
        "threefold.recipe.recipe": ["Recipe"],
        "threefold.report.pages": ["write_report"],
        "threefold.runtime.model": ["load"],
        "threefold.saved_run": ["SavedRun", "open"],
        "threefold.training.planning.lr_finder": ["find_learning_rate"],
        "threefold.training.run": ["Run"],
    },
)
