"""Score a trained run, whatever its task, and say its score in a line."""

from __future__ import annotations

import time

from threefold.predictions.multilabel_results import MultilabelResults
from threefold.training.results.diagnostics import DataDiagnostics
from threefold.training.results.multiclass import evaluate_run, write_results
from threefold.training.results.multilabel import (
    evaluate_multilabel_run,
    write_multilabel_results,
)
from threefold.training.run import Run


def score_run(run: Run, diagnostics: DataDiagnostics, pending: tuple[str, ...]) -> None:
    """Score the ensembles of a trained run and write the results.

    Args:
        run: a run whose jobs are done.
        diagnostics: what `train_members` returned.
        pending: members that follow later; until then the test rows stay sealed.
    """
    start = time.monotonic()
    seconds = {"train": sum(run.folder.job_record(job).seconds for job in run.jobs)}
    sealed = bool(pending)
    if run.recipe.data.task == "multilabel":
        answers = evaluate_multilabel_run(run, test_stays_sealed=sealed)
        write_multilabel_results(run, answers, diagnostics, seconds, pending)
    else:
        evaluation = evaluate_run(run, test_stays_sealed=sealed)
        write_results(run, evaluation, diagnostics, seconds, pending)
    # With what is counted and drawn beside the ensembles: costs, copies, suspect labels, pictures.
    run.folder.add_results("ensemble", time.monotonic() - start)


def headline(run: Run) -> str:
    """Return the out-of-fold score of the chosen ensemble in words."""
    results, count = run.folder.any_results, len(run.recipe.combined)
    if isinstance(results, MultilabelResults):
        several = results.score(results.chosen, "ensemble", "oof")
        assert several is not None
        value = f"mean average precision {several.mean_average_precision:.4f}"
    else:
        score = results.score(results.chosen, "ensemble", "oof")
        assert score is not None
        value = f"{score.accuracy:.4f}"
    return f"{results.chosen} of {count}, {value} out of fold"
