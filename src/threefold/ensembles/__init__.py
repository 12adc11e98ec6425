"""Combine the members' probabilities (m, n, k) into one calibrated answer (n, k).

Combiners, cross-fitting, calibration, prediction sets and the rule of the cascade. Ensembles have
scikit-learn's interface: `fit`, `predict_proba`, `predict`; fitted state ends in an underscore.
"""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.ensembles.averaging": [
            "BestEnsemble",
            "GreedyEnsemble",
            "MeanEnsemble",
            "PrunedEnsemble",
            "VoteEnsemble",
            "WeightedEnsemble",
        ],
        "threefold.ensembles.base": ["Ensemble"],
        "threefold.ensembles.calibration": ["Calibration", "choose_calibration", "fit_calibration"],
        "threefold.ensembles.cascade": ["Cascade"],
        "threefold.ensembles.conformal": ["ConformalSets", "UnknownThreshold"],
        "threefold.ensembles.log_linear": ["LogPoolEnsemble", "LogisticEnsemble"],
        "threefold.ensembles.multilabel": ["MultilabelEnsemble", "fit_multilabel_ensemble"],
        "threefold.ensembles.registry": ["make_ensemble"],
        "threefold.ensembles.scaling": ["apply_temperature", "fit_temperature"],
        "threefold.ensembles.stacked": ["ShrunkStackedEnsemble", "StackedEnsemble"],
    },
)
