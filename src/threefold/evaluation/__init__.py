"""The honest protocol on arrays: fit, choose, score cross-fitted, compare.

Also measures the optimism of every choice, suspect labels, prediction sets and the savings of a
cascade.
"""

from threefold.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "threefold.evaluation.cascade_savings": ["fit_savings"],
        "threefold.evaluation.compare": ["compare_members", "compare_saved"],
        "threefold.evaluation.evaluate": ["Evaluation"],
        "threefold.evaluation.label_errors": ["find_suspects", "write_suspects"],
        "threefold.evaluation.optimism": ["optimism_entry"],
        "threefold.evaluation.saved": ["evaluate_saved", "read_sources", "score_saved"],
        "threefold.evaluation.uncertainty": ["fit_uncertainty"],
    },
)
