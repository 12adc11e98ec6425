"""The ensemble of a run with any number of labels per image, as the end of an exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from threefold.ensembles.multilabel import MultilabelEnsemble
from threefold.ensembles.multilabel_module import multilabel_module
from threefold.evaluation.multilabel import check_methods, evaluate_multilabel
from threefold.exporting.ensemble import ExportedEnsemble
from threefold.models.pipeline import Combiner
from threefold.predictions.multilabel_results import EnsembleState, MultilabelScore
from threefold.training.run import Run


def chosen_multilabel(run: Run) -> ExportedEnsemble:
    """Restore a run's chosen ensemble as it was fitted and scored."""
    results = run.folder.multilabel_results
    exported = _exported(results.ensemble, results.chosen, results.scores)
    expected = results.expected
    if expected is not None:  # which pays for the choice of the way to combine, too
        exported.card["score"] |= {
            "value": expected.mean_average_precision,
            "interval": list(expected.mean_average_precision_interval),
            **expected.model_dump(include={"macro_f1", "n", "rows"}),
        }
    return exported


def fit_other_multilabel(run: Run, method: str, members: Sequence[str]) -> ExportedEnsemble:
    """Fit and score another way to combine, or the way on other members.

    Raises:
        DataError: a member is unknown.
        RecipeError: the way to combine has no meaning for any number of labels per image.
    """
    evaluation = evaluate_multilabel(
        run.folder.multilabel_oof,
        None,
        members=members or run.recipe.combined,
        method=check_methods([method]),
    )
    return _exported(evaluation.state, evaluation.chosen, evaluation.scores)


def _exported(
    state: EnsembleState, method: str, scores: Sequence[MultilabelScore]
) -> ExportedEnsemble:
    everyone = MultilabelEnsemble.from_json(state.as_json())
    used = np.flatnonzero(everyone.weights)  # a member without weight would be run for nothing
    ensemble = replace(everyone, weights=everyone.weights[used])
    members = [state.members[i] for i in used]
    combiner = Combiner(multilabel_module(ensemble))
    card = {
        "task": "multilabel",
        "method": method,
        "thresholds": ensemble.thresholds.tolist(),
        "calibration": {
            "method": "logistic",
            "slope": ensemble.slope.tolist(),
            "intercept": ensemble.intercept.tolist(),
        },
        "weights": ensemble.weights.tolist(),
        "score": _card_score(method, scores),
    }
    return ExportedEnsemble(combiner, members, card, ensemble.thresholds)


def _card_score(method: str, scores: Sequence[MultilabelScore]) -> dict[str, Any]:
    """Return the score of the exported ensemble, on test rows where there are any."""
    score = next(s for s in reversed(scores) if s.name == method and s.kind == "ensemble")
    return {
        "metric": "mean_average_precision",
        "value": score.mean_average_precision,
        "interval": list(score.mean_average_precision_interval),
        "macro_f1": score.macro_f1,
        "micro_f1": score.micro_f1,
        **score.model_dump(include={"level", "rows", "n", "protocol", "fitted_on"}),
    }
