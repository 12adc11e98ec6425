"""Is A better than B: runs, members and saved predictions side by side on the same rows, every pair tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from threefold import paired, stats
from threefold.errors import DataError
from threefold.files import read_arrays, read_json
from threefold.joining import join_predictions
from threefold.predictions import Predictions
from threefold.saved import Beside, read_file, saved_predictions
from threefold.scoring import LEVEL

MOST: Final = 20
"""Contenders at most: 190 pairs are more than anyone reads."""


@dataclass(frozen=True)
class _Contender:
    """One side of a comparison: a name, and its predictions, one member for each seed."""

    name: str
    rows: Predictions


def compare_saved(
    sources: Sequence[str], shared: bool = False, beside: Beside | None = None
) -> tuple[dict[str, Any], Predictions]:
    """Compare every pair of contenders on the same rows; what `threefold compare` prints and its page shows.

    A source is `PATH` or `PATH:NAME`. A run folder stands for its chosen ensemble (calibrated, on the test rows where there are
    any), with NAME for a member of it; a file of predictions for its only member, with NAME for one of several. A+B as NAME is
    the mean of members. One source alone stands for all its members. `PATH,PATH,...` are several seeds of one recipe: the
    interval and the p-value of its differences then speak of other seeds and other images alike.

    Args:
        sources: the contenders.
        shared: compare on the rows that all have; otherwise missing rows are an error.
        beside: labels and class names of files without.

    Returns:
        The JSON tree (kind, source, n, scores, pairs, cochran_q, warnings), and the predictions that were compared.

    Raises:
        DataError: fewer than two contenders or more than MOST, a name is ambiguous, or the predictions do not belong together.
        RunError: a run folder is not complete.
    """
    contenders = (
        _expand(sources[0], beside) if len(sources) == 1 else [_read(s, beside) for s in sources]
    )
    if not 2 <= len(contenders) <= MOST:
        raise DataError(
            "cannot compare",
            expected=f"2 to {MOST} contenders",
            got=len(contenders),
            fix="name them: A B, or FILE:MEMBER",
        )
    rows = _joined(contenders, shared)
    starts = np.cumsum([0, *(len(c.rows.members) for c in contenders)])
    probs = [rows.probs[a:b] for a, b in pairwise(starts)]
    names = [contender.name for contender in contenders]
    hits = [part.argmax(-1) == rows.labels for part in probs]
    pairs = _pairs(rows, names, hits)
    tree = {
        "kind": "compare",
        "source": list(sources),
        "n": len(rows),
        "classes": list(rows.classes),
        "chosen": None,
        "chosen_reason": "",
        "scores": [_score(rows, name, part) for name, part in zip(names, probs, strict=True)],
        "comparisons": pairs,
        "warnings": _warnings(rows, contenders),
    }
    if len(names) > 2 and all(len(part) == 1 for part in hits):
        test = paired.cochran_q(np.concatenate(hits))
        tree["cochran_q"] = {"q": test.q, "df": test.df, "p": test.p}
    return tree, rows


def _expand(source: str, beside: Beside | None) -> list[_Contender]:
    """Every member of one source, and a run's chosen ensemble."""
    path = Path(source)
    if not path.is_dir():
        rows = read_file(path, beside)
        return [_Contender(name, rows.select([name])) for name in rows.members]
    chosen = _chosen(path)
    rows = _rows_like(path, chosen)
    return [chosen, *(_Contender(name, rows.select([name])) for name in rows.members)]


def _read(source: str, beside: Beside | None) -> _Contender:
    """One contender; several paths, separated by commas, are its seeds."""
    parts = [_read_one(part, beside) for part in source.split(",") if part]
    if not parts:
        raise DataError("a contender has no path", got=source)
    if len(parts) == 1:
        return parts[0]
    named = [replace(p.rows, members=(f"{p.name} seed {i}",)) for i, p in enumerate(parts)]
    return _Contender(f"{parts[0].name} ({len(parts)} seeds)", join_predictions(named))


def _read_one(source: str, beside: Beside | None) -> _Contender:
    path, name = Path(source), ""
    if not path.exists() and ":" in source:
        left, _, name = source.rpartition(":")
        path = Path(left)
    if path.is_dir():
        chosen = _chosen(path)
        if name:
            return _Contender(f"{path.name}:{name}", _picked(_rows_like(path, chosen), name))
        return replace(chosen, name=path.name)
    rows = read_file(path, beside)
    if name:
        return _Contender(f"{path.stem}:{name}", _picked(rows, name))
    if len(rows.members) > 1:
        raise DataError(
            "the file has several members",
            where=path,
            expected=f"one, for example {path}:{rows.members[0]}",
            got=", ".join(rows.members[:5]),
        )
    return _Contender(path.stem, rows)


def _picked(rows: Predictions, name: str) -> Predictions:
    """One member, or the mean of several, A+B."""
    if name in rows.members or "+" not in name:
        return rows.select([name])
    several = rows.select(name.split("+"))
    return replace(several, probs=several.probs.mean(0, keepdims=True), members=(name,))


def _chosen(run: Path) -> _Contender:
    """A run's chosen ensemble on its headline rows.

    Raises:
        RunError: the run is not complete.
    """
    results, arrays = read_json(run / "results.json"), read_arrays(run / "chosen.npz")
    test = (run / "test.npz").exists()
    like = Predictions.load(run / ("test.npz" if test else "oof.npz"))
    name = f"{results['chosen']} (chosen)"
    return _Contender(name, replace(like, probs=arrays["probs"][None], members=(name,)))


def _rows_like(run: Path, chosen: _Contender) -> Predictions:
    """The run's members on the rows of the chosen ensemble."""
    oof, test = saved_predictions(run)
    rows = test if chosen.rows.kind == "test" else oof
    assert rows is not None
    return rows


def _joined(contenders: Sequence[_Contender], shared: bool) -> Predictions:
    """All contenders on the same rows, their members under names that differ."""
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            "two contenders have the same name", got=twice, fix="rename a file or folder"
        )
    parts = [
        replace(c.rows, members=tuple(f"{c.name}/{m}" for m in c.rows.members)) for c in contenders
    ]
    if shared:
        common = set.intersection(*(set(part.ids) for part in parts))
        if not common:
            raise DataError(
                "no row is in all of them",
                expected=f"ids such as {parts[0].ids[0]}",
                got=parts[1].ids[0],
            )
        parts = [
            part.rows([i for i, name in enumerate(part.ids) if name in common]) for part in parts
        ]
    return join_predictions(parts)


def _score(rows: Predictions, name: str, probs: np.ndarray) -> dict[str, Any]:
    """The scores of a contender; of several seeds, the mean of each figure, with the interval of the middle one."""
    tables = [stats.score_table(part, rows.labels, LEVEL, rows.groups) for part in probs]
    order = sorted(range(len(tables)), key=lambda i: tables[i]["accuracy"])
    table = dict(tables[order[len(order) // 2]])
    if len(tables) > 1:
        for key in ("accuracy", "log_loss", "ece", "brier", "balanced_accuracy", "macro_f1"):
            table[key] = float(np.mean([t[key] for t in tables]))
        table["seeds"] = [t["accuracy"] for t in tables]
    return {
        **table,
        "name": name,
        "kind": "contender",
        "rows": rows.kind,
        "protocol": rows.protocol,
        "fitted_on": "",
        "apparent": rows.protocol == "taught",
    }


def _pairs(
    rows: Predictions, names: Sequence[str], hits: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """A line per pair, p-values under Holm's correction over all pairs."""
    lines = [
        _pair(rows, names[i], names[j], hits[i], hits[j])
        for i, j in combinations(range(len(names)), 2)
    ]
    for line, p in zip(lines, paired.holm([line["p_alone"] for line in lines]), strict=True):
        line["p"] = float(p)
        line["verdict"] = _verdict(line, len(rows), rows.groups is not None)
    return lines


def _pair(
    rows: Predictions, a: str, b: str, hits_a: np.ndarray, hits_b: np.ndarray
) -> dict[str, Any]:
    line: dict[str, Any] = {"a": a, "b": b, "rows": rows.kind}
    if len(hits_a) == len(hits_b) > 1:
        seeds = paired.seeds_difference(hits_a, hits_b, rows.groups)
        line |= {
            "difference": seeds.estimate,
            "interval": [seeds.low, seeds.high],
            "p_alone": seeds.p,
            "seeds": list(seeds.per_seed),
        }
        return line | {
            "test": f"{len(hits_a)} seeds, crossed random effects",
            "only_a": None,
            "only_b": None,
        }
    if len(hits_a) != len(hits_b):
        raise DataError(
            "seeds are paired",
            where=f"{a} and {b}",
            expected="as many of one as of the other",
            got=f"{len(hits_a)} and {len(hits_b)}",
        )
    one, other = hits_a[0], hits_b[0]
    test = paired.mcnemar_exact(one, other, rows.groups)
    found = paired.paired_bootstrap(one, other, rows.groups)
    told = "exact McNemar" if rows.groups is None else "McNemar over whole groups"
    line |= {
        "difference": found.estimate,
        "interval": [found.low, found.high],
        "p_alone": test.p,
        "test": told,
    }
    return line | {"only_a": test.only_a, "only_b": test.only_b, **_over_folds(rows, one, other)}


def pair_members(rows: Predictions) -> list[dict[str, Any]]:
    """Every pair of the members of some predictions, as `compare_saved` has them."""
    return _pairs(
        rows, rows.members, [(probs.argmax(-1) == rows.labels)[None] for probs in rows.probs]
    )


def _over_folds(rows: Predictions, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """The corrected t-test over the folds of a cross-validation (Nadeau and Bengio 2003): it also speaks of other training sets."""
    folds = rows.folds
    if folds is None or (folds < 0).any() or len(np.unique(folds)) < 2:
        return {}
    first, second = ([hits[folds == fold].mean() for fold in np.unique(folds)] for hits in (a, b))
    return {
        "p_over_folds": paired.corrected_t_test(first, second, n_fit=len(first) - 1, n_score=1).p
    }


def _verdict(line: dict[str, Any], n: int, grouped: bool) -> str:
    if line["only_a"] is not None:
        return paired.verdict(
            line["a"],
            line["b"],
            line["only_a"],
            line["only_b"],
            line["p"],
            test=line["test"],
            n=0 if grouped else n,
        )
    low, high = line["interval"]
    shown = f"{100 * line['difference']:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}] ({line['test']}, p = {line['p']:.2g})"
    if line["p"] > 0.05:
        return f"no evidence of a difference: {shown}"
    better, worse = (line["a"], line["b"]) if line["difference"] > 0 else (line["b"], line["a"])
    return f"{better} is better than {worse}: {shown}"


def _warnings(rows: Predictions, contenders: Sequence[_Contender]) -> list[str]:
    warnings = []
    if rows.kind == "foreign":
        warnings.append(
            "predictions from elsewhere: that no model was trained or chosen on these rows is not known"
        )
    if any(c.rows.protocol == "paper" for c in contenders):
        warnings.append(
            "protocol paper: checkpoints were chosen on rows that are scored, which flatters"
        )
    if any(c.rows.protocol == "taught" for c in contenders):
        warnings.append(
            "apparent: the teachers of a student learned from the labels of these rows, which flatters it"
        )
    lost = max(len(c.rows) for c in contenders) - len(rows)
    if lost:
        warnings.append(f"{lost:,} rows are not in all of them and were left out")
    return warnings
