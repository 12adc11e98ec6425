"""What the pages show: the tree of results turned into tables, sentences and charts.

It reads a tree with the keys of results.json (docs/concepts.md) and never recomputes a score. Keys that a tree lacks give None, and
the template then says why or leaves the section out. Drawn from probabilities are only the confusion matrix, the
mistakes and the reliability curve; from counts of images only the interval of a paired difference that comes without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from threefold import charts, stats
from threefold.pictures import Thumbs, data_uri

MATRIX_CLASSES = 30
"""A larger matrix cannot be read; the list of confused pairs can."""
PAIRS, PAIR_PICTURES, SUSPECTS, COPIES, BARS, COMPARED, MEMBERS = 10, 6, 24, 20, 40, 300, 12
"""The most confused pairs, pictures of each, pictured suspects, listed pairs of copies, bars of differences, listed comparisons,
and members whose disagreement is written out in numbers."""
EVIDENCE = 0.05
"""The largest p-value that counts as evidence of a difference."""

CHOICES = {
    "checkpoint": "best epoch",
    "stage": "stages kept",
    "views": "number of views",
    "member": "best single member",
    "method": "ensemble method",
}
"""Names of the choices in `optimism`; others are names of fitted methods."""

_Array = np.ndarray[Any, Any]
_Tree = Mapping[str, Any]
_Rows = list[dict[str, Any]]


def shared_view(
    tree: _Tree, score: _Tree | None, probs: _Array | None, labels: _Array | None, thumbs: Thumbs
) -> dict[str, Any]:
    """The sections that the report of a run and the page of saved predictions have in common.

    Args:
        tree: as results.json.
        score: the entry of its scores that is the headline, or None.
        probs: (n, k) of the headline, or None.
        labels: (n,), or None.
        thumbs: pictures.
    """
    score = expected_score(tree, score)
    rows = score["rows"] if score else main_rows(tree["scores"])
    level = score["level"] if score else tree["scores"][0]["level"]
    most = max((s["n"] for s in tree["scores"] if s["rows"] == rows), default=0)
    classes = tree.get("classes") or [c["class"] for c in tree.get("per_class") or ()]
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
        "groups": score_groups(tree["scores"], rows),
        "dots": charts.score_dots(
            sorted(tree["scores"], key=lambda s: (s["kind"], s["rows"] != rows, -s["accuracy"]))
        ),
        "cost": cost_view(tree["scores"], rows, tree.get("chosen"), level),
        "comparisons": paired_rows(tree.get("comparisons") or (), tree["scores"], level),
        "per_class": sorted(
            tree.get("per_class") or (), key=lambda c: 2.0 if c["recall"] is None else c["recall"]
        ),
        "confusion": confusion,
        "reliability": curve,
        "calibration": tree.get("calibration"),
        "temperature": tree.get("temperature"),
        "conformal": tree.get("conformal"),
        "cascade": tree.get("cascade"),
        "latency": (tree.get("export") or {}).get("latency"),
        "optimism": optimism_view(tree.get("optimism")),
        "audit": audit_view(tree.get("audit"), thumbs),
        "ledger": tree.get("ledger"),
        "opened": tree.get("test_opened"),
        "diversity": diversity_view(tree.get("diversity")),
        "size_curve": size_view(tree.get("size_curve")),
    }


def expected_score(tree: _Tree, score: _Tree | None) -> _Tree | None:
    """The headline's score with what to expect of new images: without test rows the choice of the method is paid for."""
    expected = tree.get("expected")
    if score is None or not expected or expected["rows"] != score["rows"]:
        return score
    return {**score, "accuracy": expected["accuracy"], "interval": expected["interval"]}


def main_rows(scores: Sequence[_Tree]) -> str:
    """The rows that the page speaks of: test where there are any, else those of the first score."""
    return "test" if any(s["rows"] == "test" for s in scores) else str(scores[0]["rows"])


def natural_frequency(score: _Tree) -> dict[str, Any]:
    """An accuracy as "so many of so many": of 100 where that shows the interval, else of 1,000 or 10,000; with its picture."""
    for of in (100, 1000, 10_000):
        low, right, high = (
            round(of * share)
            for share in (score["interval"][0], score["accuracy"], score["interval"][1])
        )
        if (low < right < high < of) or of == 10_000:
            break
    grid = charts.frequency_grid(right, low, high, of) if of <= 1000 else None
    return {"of": of, "right": right, "low": low, "high": high, "grid": grid}


def score_groups(scores: Sequence[_Tree], rows: str) -> _Rows:
    """Scores in groups of one kind on the same rows, those of the page first, the most accurate first in each."""
    keys = sorted({(s["rows"] != rows, s["rows"], s["kind"]) for s in scores})
    found = []
    for _, part, kind in keys:
        entries = sorted(
            (s for s in scores if (s["rows"], s["kind"]) == (part, kind)),
            key=lambda s: -s["accuracy"],
        )
        found.append({"rows": part, "kind": kind, "n": entries[0]["n"], "scores": entries})
    return found


def cost_view(
    scores: Sequence[_Tree], rows: str, chosen: str | None, level: float
) -> dict[str, Any] | None:
    """Accuracy against multiply-adds: points, the front, and what the chosen ensemble costs beside the best member."""
    known = [s for s in scores if s["rows"] == rows and (s.get("macs") or 0) > 0]
    if len(known) < 2:
        return None
    known.sort(key=lambda s: (s["macs"], -s["accuracy"]))
    best, points, number = -1.0, [], 0
    for score in known:
        front, mine = (
            score["accuracy"] > best,
            score["kind"] == "ensemble" and score["name"] == chosen,
        )
        best = max(best, score["accuracy"])
        numbered = front or mine or score["kind"] == "ensemble" or len(known) <= 30
        number += numbered
        keys = ("name", "kind", "macs", "accuracy", "interval")
        points.append(
            {
                **{k: score[k] for k in keys},
                "parameters": score.get("parameters"),
                "front": front,
                "chosen": mine,
                "number": number if numbered else None,
            }
        )
    members = [p for p in points if p["kind"] == "member"]
    single = max(members, key=lambda p: p["accuracy"]) if members else None
    picked = next((p for p in points if p["chosen"]), None)
    told = None
    if picked and single:
        told = {
            "times": picked["macs"] / single["macs"],
            "gain": picked["accuracy"] - single["accuracy"],
            "single": single["name"],
        }
    return {
        "points": points,
        "chart": charts.pareto(points, level),
        "told": told,
        "unnumbered": len(points) - number,
    }


def paired_rows(
    comparisons: Sequence[_Tree], scores: Sequence[_Tree], level: float
) -> dict[str, Any] | None:
    """Paired tests as a table and a chart: accuracy of both, difference and interval beside the counts, evidence first.

    An entry may bring `difference`, `interval`, `n` and both accuracies; else they follow from its counts and the scores.
    """
    if not comparisons:
        return None
    found: _Rows = []
    for c in comparisons:
        a, b = (
            _named(scores, c["a"], c["rows"], "ensemble"),
            _named(scores, c["b"], c["rows"], "member"),
        )
        n = c.get("n") or (a["n"] if a else None) or (b["n"] if b else None)
        difference, interval = c.get("difference"), c.get("interval")
        if n:
            difference = (c["only_a"] - c["only_b"]) / n if difference is None else difference
            interval = (
                stats.paired_interval(c["only_a"], c["only_b"], n, level)
                if interval is None
                else interval
            )
        found.append(
            {
                **c,
                "n": n,
                "accuracy_a": c.get("accuracy_a", a and a["accuracy"]),
                "accuracy_b": c.get("accuracy_b", b and b["accuracy"]),
                "difference": difference,
                "interval": interval,
                "sure": c["p"] <= EVIDENCE,
            }
        )
    if len(found) > BARS:
        found.sort(key=lambda c: c["p"])
    bars = [c for c in found if c["difference"] is not None][:BARS]
    return {
        "rows": found[:COMPARED],
        "all": len(found),
        "sure": sum(c["sure"] for c in found),
        "bars": len(bars),
        "chart": charts.differences(bars) if bars else None,
    }


def _named(scores: Sequence[_Tree], name: str, rows: str, first: str) -> _Tree | None:
    """The score of that name on those rows; of a member and an ensemble of one name, the kind that is wanted first."""
    mine = [s for s in scores if s["name"] == name and s["rows"] == rows]
    return min(mine, key=lambda s: s["kind"] != first) if mine else None


def optimism_view(entries: Sequence[_Tree] | None) -> dict[str, Any] | None:
    """What every choice has flattered, with the words for it; None where it was not measured."""
    if not entries:
        return None
    rows = []
    for entry in entries:
        low, high = entry.get("interval") or (None, None)
        verdict = "unsure"
        if low is not None and high is not None:
            verdict = "flatters" if low > 0 else "modest" if high < 0 else "luck"
        rows.append(
            {
                **entry,
                "name": CHOICES.get(entry["choice"], f"fit of {entry['choice']}"),
                "verdict": verdict,
            }
        )
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
    matrix = stats.confusion_matrix(probs, labels)
    shares = np.asarray(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))
    wrong = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
    return {
        "classes": names,
        "matrix": matrix if len(matrix) <= MATRIX_CLASSES else None,
        "shares": shares,
        "worst_share": float(np.where(wrong > 0, shares, 0).max()),
        "pairs": _confused_pairs(wrong, shares, names, thumbs),
        "wrong": int(wrong.sum()),
    }


def _confused_pairs(wrong: _Array, shares: _Array, classes: Sequence[str], thumbs: Thumbs) -> _Rows:
    """The most frequent (true, answer) pairs: count, share of the true class, count the other way round, pictures."""
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    cells = [divmod(int(cell), len(wrong)) for cell in order]
    return [
        {
            "true": classes[i],
            "answer": classes[j],
            "count": int(wrong[i, j]),
            "share": float(shares[i, j]),
            "back": int(wrong[j, i]),
            "pictures": [
                (name, data_uri(image))
                for name, image in thumbs.pairs.get((i, j), [])[:PAIR_PICTURES]
            ],
        }
        for i, j in cells
        if wrong[i, j] > 0
    ]


def audit_view(audit: _Tree | None, thumbs: Thumbs) -> dict[str, Any] | None:
    """Suspect labels with pictures, and pairs of copies, those that are in two parts or have two labels first."""
    if audit is None:
        return None
    listed = [
        {**s, "image": data_uri(thumbs.suspects[s["id"]]) if s["id"] in thumbs.suspects else None}
        for s in (audit.get("suspects") or ())[:SUSPECTS]
    ]
    copies = audit.get("duplicates")
    pairs = sorted(copies["pairs"], key=_harmless)[:COPIES] if copies else []
    return {
        "missing": audit.get("missing") or "",
        "suspects": listed,
        "n_suspects": audit.get("n_suspects", len(listed)),
        "file": audit.get("file"),
        "copies": copies and {"found": copies["found"], "pairs": pairs},
        "warnings": audit.get("warnings") or [],
    }


def _harmless(pair: _Tree) -> tuple[bool, bool, float]:
    return pair["same_part"] is not False, pair["same_label"] is not False, pair["distance"]


def diversity_view(found: _Tree | None) -> dict[str, Any] | None:
    """How often members disagree: the matrix, the nearest and the farthest pair, and members that are the same."""
    if found is None or len(found["members"]) < 2:
        return None
    members, matrix = found["members"], np.asarray(found["disagreement"], np.float64)
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
        "duplicates": found.get("duplicates") or [],
    }


def size_view(curve: _Tree | None) -> dict[str, Any] | None:
    """Accuracy against the number of members, and how many get most of what all together bring; None below two members."""
    if curve is None or len(curve["mean"]) < 2:
        return None
    first, last = curve["mean"][0], curve["mean"][-1]
    enough = next(
        i
        for i, share in enumerate(curve["mean"], 1)
        if last - share <= 0.1 * max(last - first, 0) + 1e-12
    )
    return {
        "chart": charts.size_curve(curve),
        "first": first,
        "last": last,
        "all": len(curve["mean"]),
        "enough": enough,
        "order": list(curve.get("order") or ()),
    }
