"""The charts of one run, each on its own; the report has the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from threefold.errors import RunError
from threefold.predictions.multilabel_results import MultilabelResults
from threefold.predictions.results_schema import Score
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Job, Recipe
from threefold.report import charts, multilabel_charts
from threefold.report.chart_files import Chart
from threefold.report.multilabel_pages import CURVES, headline_score, lowest_first
from threefold.stats import scores as stats


def plot_scores(folder: RunFolder) -> Chart:
    """Draw accuracy and interval of every ensemble and member.

    Raises:
        RunError: the run has no results.
    """
    folder.check_finished()
    several = folder.any_results
    if isinstance(several, MultilabelResults):
        rows = headline_score(several).rows
        shown = [score for score in several.scores if score.rows == rows]
        shown.sort(key=lambda s: (s.kind, -s.mean_average_precision))
        return Chart.of([("", multilabel_charts.score_dots(shown))])
    rows = chosen_score(folder).rows
    scores = folder.results.scores
    ordered = sorted(scores, key=lambda s: (s.kind, s.rows != rows, -s.accuracy))
    return Chart.of([("", charts.score_dots(ordered))])


def plot_confusion(folder: RunFolder) -> Chart:
    """Draw how often images of each class get each answer of the chosen ensemble.

    Raises:
        RunError: the run has no results, several labels per image, or too many classes for a matrix
            that can be read.
    """
    folder.check_finished()
    if folder.is_multilabel:
        raise RunError(
            "a confusion matrix needs one class for each image",
            where=folder.path,
            got="several labels per image",
            fix="use plot_calibration, or the report, which shows the images with wrong labels",
        )
    classes, chosen = folder.results.classes, folder.chosen
    if len(classes) > charts.MATRIX_CLASSES:
        raise RunError(
            "too many classes for a matrix that can be read",
            where=folder.path,
            expected=f"at most {charts.MATRIX_CLASSES}",
            got=len(classes),
            fix="the report lists the most confused pairs of classes",
        )
    matrix = stats.confusion_matrix(chosen.probs, chosen.labels)
    return Chart.of([("", charts.confusion(matrix, classes))])


def plot_calibration(folder: RunFolder) -> Chart:
    """Draw the share of right answers of the chosen ensemble against its confidence.

    Raises:
        RunError: the run has no results.
    """
    folder.check_finished()
    if folder.is_multilabel:
        return _plot_label_calibration(folder)
    chosen, level = folder.chosen, chosen_score(folder).level
    return Chart.of([("", charts.reliability(chosen.probs, chosen.labels, level))])


def _plot_label_calibration(folder: RunFolder) -> Chart:
    """Draw the share of images with each label against its stated probability."""
    results, chosen = folder.multilabel_results, folder.multilabel_chosen
    level = headline_score(results).level
    drawings = []
    for j in lowest_first(results.per_label)[:CURVES]:
        name = results.classes[j]
        column, truth = chosen.probs[:, j], chosen.targets[:, j]
        drawings.append((name, multilabel_charts.reliability(name, column, truth, level)))
    return Chart.of(drawings)


def plot_learning_curves(folder: RunFolder) -> Chart:
    """Draw the accuracy of each member on the select rows after each epoch.

    Raises:
        RunError: no stage of the run has epochs, as with heads on frozen features alone.
    """
    folder.check_finished()
    metric = "share of right labels" if folder.is_multilabel else "accuracy"
    curves = learning_curves(folder.recipe, folder.histories(), metric)
    if not curves:
        raise RunError(
            "no learning curves",
            where=folder.path,
            expected="a stage with epochs",
            got="heads that are fitted at once",
        )
    return Chart.of(curves)


def learning_curves(
    recipe: Recipe, histories: Mapping[Job, Mapping[str, Any]], metric: str = "accuracy"
) -> list[tuple[str, Markup]]:
    """Draw a chart for each member with a history, all on the same axis of the metric."""
    accuracies = [
        epoch["select_accuracy"] for history in histories.values() for epoch in history["epochs"]
    ]
    if not accuracies:
        return []
    low, high = min(accuracies), max(accuracies)
    margin = 0.05 * (high - low) or 0.01
    curves = []
    for member in recipe.members:
        stages = [
            [
                history
                for job, history in histories.items()
                if (job.member, job.stage) == (member.name, stage.name)
            ]
            for stage in recipe.stages
        ]
        if any(history["epochs"] for folds in stages for history in folds):
            chart = charts.learning_curve(
                member.name, stages, (low - margin, high + margin), metric
            )
            curves.append((member.name, chart))
    return curves


def chosen_score(folder: RunFolder) -> Score:
    """Return the headline: the chosen ensemble's score on the test rows, else out of fold.

    Raises:
        RunError: results.json has no such score, or one on the rows that the ensemble learned from.
    """
    results, path = folder.results, folder.path / "results.json"
    score = results.score(results.chosen, "ensemble", "test") or results.score(
        results.chosen, "ensemble", "oof"
    )
    if score is None:
        raise RunError(
            "results.json has no score",
            where=folder.path,
            expected=f"an ensemble named {results.chosen}",
        )
    if score.rows == "oof" and score.fitted_on == "oof rows":
        raise RunError(
            "the chosen ensemble was fitted on the rows that it is scored on",
            where=path,
            expected="oof rows, cross-fitted",
            got=score.fitted_on,
        )
    return score
