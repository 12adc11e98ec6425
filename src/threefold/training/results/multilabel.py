"""What a finished run of images with any number of labels says: results.json and the ensemble."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from threefold.evaluation.multilabel import (
    MultilabelEvaluation,
    check_methods,
    evaluate_multilabel,
)
from threefold.predictions.multilabel_results import MultilabelResults, MultilabelScore
from threefold.predictions.records import VERSION
from threefold.training.left_out import left_out_notes
from threefold.training.results.costs import RunCosts
from threefold.training.results.diagnostics import (
    DataDiagnostics,
    data_warnings,
    make_label_thumbnails,
)
from threefold.training.results.multiclass import member_row
from threefold.training.run import Run
from threefold.training.stages.recovery import recovery_notes
from threefold.training.steps.memory import memory_notes


def evaluate_multilabel_run(run: Run, *, test_stays_sealed: bool = False) -> MultilabelEvaluation:
    """Score members and ensembles of a run, and choose how to combine, calibrate and decide.

    Args:
        run: a run whose jobs are done.
        test_stays_sealed: score on out-of-fold rows only; otherwise this opens the test rows.
    """
    recipe = run.recipe
    test = None if test_stays_sealed else run.folder.all_multilabel_test
    if test is not None:
        run.folder.open_test("train", len(test))
    return evaluate_multilabel(
        run.folder.multilabel_oof,
        test,
        members=recipe.combined,
        method=check_methods([recipe.ensemble.export]),
        metric="log_loss" if recipe.train.metric == "log_loss" else "mean_average_precision",
    )


def write_multilabel_results(
    run: Run,
    evaluation: MultilabelEvaluation,
    diagnostics: DataDiagnostics,
    seconds: dict[str, float],
    pending: tuple[str, ...] = (),
) -> None:
    """Write results.json, ensemble.npz, chosen.npz and thumbs.npz.

    Args:
        run: a run whose jobs are done.
        evaluation: what `evaluate_multilabel_run` returned.
        diagnostics: what `train_members` returned.
        seconds: duration of the steps so far.
        pending: members of the recipe that are still to be trained.
    """
    info, costs = run.folder.info, RunCosts(run)
    run.folder.write_arrays("ensemble.npz", **_arrays(evaluation))
    thumbs = make_label_thumbnails(run, evaluation)
    run.folder.write_arrays("thumbs.npz", preview=diagnostics.augmented, **thumbs)
    run.folder.write_multilabel_chosen(evaluation.rows, evaluation.probs, evaluation.decided)
    results = MultilabelResults(
        version=VERSION,
        name=run.recipe.name,
        protocol=run.recipe.protocol,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=info.classes,
        commit=info.commit,
        hardware=info.hardware,
        threads=info.threads,
        digest=info.digest,
        seconds=seconds,
        scores=tuple(_with_cost(score, evaluation, costs) for score in evaluation.scores),
        per_label=tuple(evaluation.per_label),
        chosen=evaluation.chosen,
        chosen_reason=evaluation.reason,
        combined=evaluation.combined,
        ensemble=evaluation.state,
        expected=evaluation.expected,
        comparisons=tuple(evaluation.comparisons),
        optimism=tuple(evaluation.optimism),
        ledger=tuple(evaluation.ledger),
        members=tuple(member_row(spec, costs) for spec in run.recipe.members),
        notes=(
            *left_out_notes(info.left_out),
            *evaluation.warnings,
            *data_warnings(run, diagnostics.copies),
            *recovery_notes(run.folder.histories()),
            *memory_notes(run.folder.histories()),
            *info.notes,
        ),
        test_opened=run.folder.test_opened(),
        pending=pending,
    )
    run.folder.write_results(results)
    run.watcher.scored(results)


def _arrays(evaluation: MultilabelEvaluation) -> dict[str, np.ndarray]:
    """The fitted ensemble as arrays, for ensemble.npz."""
    return {name: np.asarray(values) for name, values in evaluation.ensemble.as_json().items()}


def _with_cost(
    score: MultilabelScore, evaluation: MultilabelEvaluation, costs: RunCosts
) -> MultilabelScore:
    """Add what an answer costs, of a member, the mean, or the chosen ensemble."""
    names = [score.name]
    if score.kind == "ensemble":
        names = list(evaluation.combined)
        if score.name == evaluation.chosen:
            pairs = zip(names, evaluation.ensemble.weights, strict=True)
            names = [name for name, weight in pairs if weight > 0]
        elif score.name != "mean":  # which member is the best was not kept
            return score
    cost = costs.answer(names)
    return score.replace(macs=cost.macs, parameters=cost.parameters)
