"""Scores, intervals and paired tests on arrays.

Knows no ensemble, recipe or run.
"""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.stats.bootstrap": ["percentile_interval"],
        "threefold.stats.crossed_effects": ["seeds_accuracy"],
        "threefold.stats.multilabel": [
            "average_precision",
            "mean_average_precision",
            "micro_f1",
            "subset_accuracy",
        ],
        "threefold.stats.one_standard_error": ["simplest"],
        "threefold.stats.paired_differences": ["paired_bootstrap", "score_difference"],
        "threefold.stats.paired_tests": [
            "cochran_q",
            "corrected_t_test",
            "holm",
            "mcnemar_exact",
            "seeds_difference",
            "verdict",
        ],
        "threefold.stats.sample_size": ["required_rows"],
        "threefold.stats.scores": [
            "accuracy",
            "balanced_accuracy",
            "brier",
            "confusion_matrix",
            "ece",
            "log_loss",
            "macro_f1",
            "reliability_curve",
            "roc_auc",
            "score_table",
            "top_k_accuracy",
            "wilson_interval",
        ],
    },
)
