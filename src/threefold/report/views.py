"""What the pages show: results turned into tables, sentences and charts.

It reads a summary (the results of a run, or of saved predictions) and never recomputes a score. A
section that a summary lacks gives None, and the template says why or leaves it out. The confusion
matrix, the mistakes and the reliability curve are drawn from probabilities; the interval of a
paired difference that comes without one follows from counts of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from threefold.predictions.results_schema import (
    Audit,
    Comparison,
    DiversityRecord,
    Optimism,
    Results,
    Score,
    SizeCurveRecord,
    Summary,
)
from threefold.report import charts
from threefold.report.images import Thumbs, data_uri
from threefold.stats import scores as stats

PAIRS = 10
"""Largest number of confused pairs."""
PAIR_PICTURES = 6
"""Largest number of pictures of a confused pair."""
SUSPECTS = 24
"""Largest number of pictured suspects."""
COPIES = 20
"""Largest number of listed pairs of copies."""
BARS = 40
"""Largest number of differences that are drawn."""
COMPARED = 300
"""Largest number of listed comparisons."""
MEMBERS = 12
"""Largest number of members whose disagreement is written out in numbers."""
EVIDENCE = 0.05
"""The largest p-value that counts as evidence of a difference."""

CHOICES = {
    "checkpoint": "best epoch",
    "trial": "best trial",
    "stage": "stages kept",
    "views": "number of views",
    "member": "best single member",
    "method": "ensemble method",
}
"""Names of the choices in `optimism`; others are names of fitted methods."""

_Array = np.ndarray[Any, Any]
_Rows = list[dict[str, Any]]


def shared_view(
    summary: Summary,
    score: Score | None,
    probs: _Array | None,
    labels: _Array | None,
    thumbs: Thumbs,
) -> dict[str, Any]:
    """The sections that the report of a run and the page of saved predictions have in common.

    Args:
        summary: the results of a run, or a summary of saved predictions.
        score: the score of the headline, or None.
        probs: (n, k) of the headline, or None.
        labels: (n,), or None.
        thumbs: pictures.
    """
    score = expected_score(summary, score)
    rows = score.rows if score else main_rows(summary.scores)
    level = score.level if score else summary.scores[0].level
    most = max((s.n for s in summary.scores if s.rows == rows), default=0)
    classes = summary.classes or tuple(c.name for c in summary.per_class)
    results = summary if isinstance(summary, Results) else None
    export = results.export if results is not None else None
    confusion = curve = None
    if probs is not None and labels is not None:
        confusion, curve = (
            confusion_view(probs, labels, classes, thumbs),
            charts.reliability(probs, labels, level),
        )
    return {
        "score": score,
        "rows": rows,
        "level": level,
        "digits": 1 if most <= 2000 else 2,  # one image in a thousand is 0.1 %
        "natural": natural_frequency(score) if score else None,
        "groups": score_groups(summary.scores, rows),
        "dots": charts.score_dots(
            sorted(summary.scores, key=lambda s: (s.kind, s.rows != rows, -s.accuracy))
        ),
        "cost": cost_view(summary.scores, rows, summary.chosen, level),
        "comparisons": paired_rows(summary.comparisons, summary.scores, level),
        "per_class": sorted(summary.per_class, key=lambda c: 2.0 if c.recall is None else c.recall),
        "confusion": confusion,
        "reliability": curve,
        "calibration": summary.calibration,
        "temperature": results.temperature if results is not None else None,
        "conformal": summary.conformal,
        "cascade": results.cascade if results is not None else None,
        "latency": export.latency if export is not None else None,
        "optimism": optimism_view(summary.optimism),
        "audit": audit_view(summary.audit, thumbs),
        "ledger": summary.ledger,
        "opened": results.test_opened if results is not None else None,
        "diversity": diversity_view(summary.diversity),
        "size_curve": size_view(summary.size_curve),
    }


def expected_score(summary: Summary, score: Score | None) -> Score | None:
    """Return the headline's score with the accuracy to expect on new images.

    Without test rows that accuracy pays for the choice of the method.
    """
    expected = summary.expected
    if score is None or expected is None or expected.rows != score.rows:
        return score
    return score.replace(accuracy=expected.accuracy, interval=expected.interval)


def main_rows(scores: Sequence[Score]) -> str:
    """The rows that the page speaks of: test where there are any, else those of the first score."""
    return "test" if any(s.rows == "test" for s in scores) else scores[0].rows


def natural_frequency(score: Score) -> dict[str, Any]:
    """Express an accuracy as a number of 100 images, or of more where 100 hide the interval."""
    for of in (100, 1000, 10_000):
        low, right, high = (
            round(of * share) for share in (score.interval[0], score.accuracy, score.interval[1])
        )
        if (low < right < high < of) or of == 10_000:
            break
    grid = charts.frequency_grid(right, low, high, of) if of <= 1000 else None
    return {"of": of, "right": right, "low": low, "high": high, "grid": grid}


def score_groups(scores: Sequence[Score], rows: str) -> _Rows:
    """Group scores by rows and kind: the rows of the page first, the most accurate first."""
    keys = sorted({(s.rows != rows, s.rows, s.kind) for s in scores})
    groups: _Rows = []
    for _, part, kind in keys:
        entries = sorted(
            (s for s in scores if (s.rows, s.kind) == (part, kind)), key=lambda s: -s.accuracy
        )
        groups.append({"rows": part, "kind": kind, "n": entries[0].n, "scores": entries})
    return groups


def cost_view(
    scores: Sequence[Score], rows: str, chosen: str | None, level: float
) -> dict[str, Any] | None:
    """Relate accuracy to multiply-adds: points, front, and the chosen ensemble's extra cost."""
    known = [(s.macs, s) for s in scores if s.rows == rows and s.macs]
    if len(known) < 2:
        return None
    known.sort(key=lambda pair: (pair[0], -pair[1].accuracy))
    best, points, number = -1.0, list[dict[str, Any]](), 0
    for macs, score in known:
        front = score.accuracy > best
        mine = score.kind == "ensemble" and score.name == chosen
        best = max(best, score.accuracy)
        numbered = front or mine or score.kind == "ensemble" or len(known) <= 30
        number += numbered
        points.append(
            {
                "name": score.name,
                "kind": score.kind,
                "macs": macs,
                "accuracy": score.accuracy,
                "interval": score.interval,
                "parameters": score.parameters,
                "front": front,
                "chosen": mine,
                "number": number if numbered else None,
            }
        )
    members = [p for p in points if p["kind"] == "member"]
    single = max(members, key=lambda p: p["accuracy"]) if members else None
    picked = next((p for p in points if p["chosen"]), None)
    ratio = None
    if picked and single:
        ratio = {
            "times": picked["macs"] / single["macs"],
            "gain": picked["accuracy"] - single["accuracy"],
            "single": single["name"],
        }
    return {
        "points": points,
        "chart": charts.pareto(points, level),
        "ratio": ratio,
        "unnumbered": len(points) - number,
    }


def paired_rows(
    comparisons: Sequence[Comparison], scores: Sequence[Score], level: float
) -> dict[str, Any] | None:
    """Show paired tests as a table and a chart, those with the strongest evidence first.

    A difference, interval or accuracy that is missing follows from counts and scores.
    """
    if not comparisons:
        return None
    lines = [_complete(comparison, scores, level) for comparison in comparisons]
    if len(lines) > BARS:
        lines.sort(key=lambda line: line["p"])
    bars = [line for line in lines if line["difference"] is not None][:BARS]
    return {
        "rows": lines[:COMPARED],
        "all": len(lines),
        "sure": sum(line["sure"] for line in lines),
        "bars": len(bars),
        "chart": charts.differences(bars) if bars else None,
    }


def _complete(c: Comparison, scores: Sequence[Score], level: float) -> dict[str, Any]:
    """Complete a comparison with accuracies, difference and interval, from its counts."""
    a = _score_of(scores, c.a, c.rows, "ensemble")
    b = _score_of(scores, c.b, c.rows, "member")
    n = c.n or (a.n if a else None) or (b.n if b else None)
    difference, interval = c.difference, c.interval
    if n and c.only_a is not None and c.only_b is not None:
        if difference is None:
            difference = (c.only_a - c.only_b) / n
        if interval is None:
            interval = stats.paired_interval(c.only_a, c.only_b, n, level)
    accuracy_a, accuracy_b = c.accuracy_a, c.accuracy_b
    if accuracy_a is None and a is not None:
        accuracy_a = a.accuracy
    if accuracy_b is None and b is not None:
        accuracy_b = b.accuracy
    return {
        **dict(c),
        "n": n,
        "accuracy_a": accuracy_a,
        "accuracy_b": accuracy_b,
        "difference": difference,
        "interval": interval,
        "sure": c.p <= EVIDENCE,
    }


def _score_of(scores: Sequence[Score], name: str, rows: str, kind: str) -> Score | None:
    """Return the score of that name on those rows; the kind decides between namesakes."""
    named = [s for s in scores if s.name == name and s.rows == rows]
    return min(named, key=lambda s: s.kind != kind) if named else None


def optimism_view(entries: Sequence[Optimism]) -> dict[str, Any] | None:
    """Return how optimistic every choice was, with a verdict; None where it was not measured."""
    if not entries:
        return None
    rows = []
    for entry in entries:
        if entry.interval is None:
            verdict = "unknown"
        elif entry.interval[0] > 0:
            verdict = "optimistic"
        elif entry.interval[1] < 0:
            verdict = "pessimistic"
        else:
            verdict = "chance"
        name = CHOICES.get(entry.choice, f"fit of {entry.choice}")
        rows.append({**dict(entry), "name": name, "verdict": verdict})
    return {"rows": rows, "chart": charts.optimism(rows)}


def confusion_view(
    probs: _Array, labels: _Array, classes: Sequence[str], thumbs: Thumbs
) -> dict[str, Any]:
    """The matrix where it can be read, and the most confused pairs with their pictures.

    Args:
        probs: (n, k).
        labels: (n,).
        classes: k names; numbers take their place where there are none.
        thumbs: pictures of some mistakes.
    """
    names = list(classes) or [f"class {number}" for number in range(probs.shape[1])]
    found = stats.confusions(probs, labels)
    shares = found.counts / np.bincount(labels, minlength=len(names))[found.labels]
    matrix = stats.confusion_matrix(probs, labels) if len(names) <= charts.MATRIX_CLASSES else None
    return {
        "classes": names,
        "matrix": matrix,
        "shares": None if matrix is None else matrix / np.maximum(matrix.sum(1, keepdims=True), 1),
        "worst_share": float(shares.max(initial=0)),
        "pairs": _confused_pairs(found, shares, names, thumbs),
        "wrong": int(found.counts.sum()),
    }


def _confused_pairs(
    found: stats.Confusions, shares: _Array, classes: Sequence[str], thumbs: Thumbs
) -> _Rows:
    """Return the most frequent (true, answer) pairs with counts, shares and pictures."""
    cells = list(zip(found.labels.tolist(), found.answers.tolist(), strict=True))
    counts = dict(zip(cells, found.counts.tolist(), strict=True))
    return [
        {
            "true": classes[i],
            "answer": classes[j],
            "count": counts[i, j],
            "share": float(share),
            "back": counts.get((j, i), 0),
            "pictures": [
                (name, data_uri(image))
                for name, image in thumbs.pairs.get((i, j), [])[:PAIR_PICTURES]
            ],
        }
        for (i, j), share in zip(cells[:PAIRS], shares, strict=False)
    ]


def audit_view(audit: Audit | None, thumbs: Thumbs) -> dict[str, Any] | None:
    """Return suspect labels with pictures, and pairs of copies, the harmful ones first."""
    if audit is None:
        return None
    images = thumbs.suspects
    suspects = [
        {**dict(s), "image": data_uri(images[s.id]) if s.id in images else None}
        for s in audit.suspects[:SUSPECTS]
    ]
    copies = None
    if audit.duplicates is not None:
        pairs = sorted(
            audit.duplicates.pairs,
            key=lambda p: (p.same_part is not False, p.same_label is not False, p.distance),
        )
        copies = {"total": audit.duplicates.total, "pairs": pairs[:COPIES]}
    return {
        "missing": audit.missing,
        "suspects": suspects,
        "n_suspects": audit.n_suspects,
        "file": audit.file,
        "copies": copies,
        "warnings": audit.warnings,
    }


def diversity_view(diversity: DiversityRecord | None) -> dict[str, Any] | None:
    """Return how often members disagree: the matrix, nearest and farthest pair, duplicates."""
    if diversity is None or len(diversity.members) < 2:
        return None
    members, matrix = diversity.members, np.asarray(diversity.disagreement, np.float64)
    upper = np.triu_indices(len(members), 1)
    values = matrix[upper]

    def pair(place: int) -> dict[str, Any]:
        return {
            "a": members[upper[0][place]],
            "b": members[upper[1][place]],
            "share": float(values[place]),
        }

    return {
        "members": members,
        "matrix": matrix,
        "most": float(values.max()),
        "mean": float(values.mean()),
        "near": pair(int(values.argmin())),
        "far": pair(int(values.argmax())),
        "written": len(members) <= MEMBERS,
        "duplicates": diversity.duplicates,
    }


def size_view(curve: SizeCurveRecord | None) -> dict[str, Any] | None:
    """Relate accuracy to the number of members; None for fewer than two members."""
    if curve is None or len(curve.mean) < 2:
        return None
    first, last = curve.mean[0], curve.mean[-1]
    enough = next(
        i
        for i, share in enumerate(curve.mean, 1)
        if last - share <= 0.1 * max(last - first, 0) + 1e-12
    )
    return {
        "chart": charts.size_curve(curve),
        "first": first,
        "last": last,
        "all": len(curve.mean),
        "enough": enough,
        "order": curve.order,
    }
