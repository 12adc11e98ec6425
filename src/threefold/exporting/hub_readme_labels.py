"""The parts of a README.md (`hub_readme`) about a model that gives any number of labels."""

from __future__ import annotations

from threefold.exporting.markdown import cell, share
from threefold.predictions.multilabel_results import MultilabelResults, MultilabelScore


def label_headline(results: MultilabelResults) -> MultilabelScore | None:
    """The score of the chosen ensemble, on test rows where there are any."""
    return results.score(results.chosen, "ensemble", "test") or results.score(
        results.chosen, "ensemble", "oof"
    )


def introduce_labels(results: MultilabelResults) -> str:
    """Say what the model is, and how good it is expected to be."""
    count = f"{len(results.members)} networks" if len(results.members) > 1 else "one network"
    text = (
        f"A model that gives images any number of {len(results.classes)} labels, made of {count}."
    )
    expected = results.expected
    if expected is not None:
        low, high = expected.mean_average_precision_interval
        text += (
            f" Expect a mean average precision of **{expected.mean_average_precision:.1%}** on new "
            f"images (95 % interval {low:.1%} to {high:.1%}, from {expected.n:,} {expected.basis})."
        )
    return text


def tabulate_label_scores(results: MultilabelResults) -> str:
    """The section of the scores of members and ensembles."""
    rows = []
    for s in results.scores:
        low, high = s.mean_average_precision_interval
        chosen = " (chosen)" if s.name == results.chosen and s.kind == "ensemble" else ""
        rows.append(
            f"| {cell(s.name)}{chosen} | {s.rows} | {s.n:,} "
            f"| {s.mean_average_precision:.4f} [{low:.4f}, {high:.4f}] | {s.macro_f1:.4f} "
            f"| {s.subset_accuracy:.4f} | {s.log_loss:.4f} |"
        )
    head = [
        "| | rows | n | mean average precision, 95 % interval | macro F1 | all labels right "
        "| log loss |",
        "|---|---|---|---|---|---|---|",
    ]
    text = "\n".join(["## Metrics", "", *head, *rows, ""])
    return (
        f"{text}\nProtocol `{results.protocol}`. oof = out of fold: each training image is "
        "answered by networks that did not learn from it. Each label has a threshold, which "
        "maximizes its F1 out of fold; the figures are of thresholds that other rows chose."
    )


def tabulate_labels(results: MultilabelResults, shown: int) -> str:
    """The section of the labels and their thresholds.

    Args:
        results: of the run.
        shown: the most labels that are listed.
    """
    lines = [
        "## Labels",
        "",
        "| label | images | threshold | average precision | F1 |",
        "|---|---|---|---|---|",
    ]
    for row in results.per_label[:shown]:
        lines.append(
            f"| {cell(row.name)} | {row.n:,} | {share(row.threshold)} "
            f"| {share(row.average_precision)} | {share(row.f1)} |"
        )
    if len(results.per_label) > shown:
        lines.append(f"| and {len(results.per_label) - shown:,} more | | | | |")
    return "\n".join(lines)
