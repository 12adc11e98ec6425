"""Is A better than B: runs, members and saved predictions on the same rows, every pair tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Final

import numpy as np

from threefold.errors import DataError
from threefold.evaluation.scoring import score_probs
from threefold.names import count_of
from threefold.predictions.formats import Classes, read_predictions
from threefold.predictions.join import join_predictions
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import Comparison, PredictionSummary, Score
from threefold.predictions.run_folder import RunFolder
from threefold.scratch import row_blocks, scratch, top_classes
from threefold.stats import crossed_effects, paired_differences, paired_tests

MAX_CONTENDERS: Final = 20
"""Largest number of contenders: 190 pairs are more than anyone reads."""

_FIGURES: Final = (
    "accuracy",
    "log_loss",
    "ece",
    "brier",
    "balanced_accuracy",
    "macro_f1",
    "roc_auc",
    "top5",
)
"""Figures of a score that are averaged over seeds."""

_OF_ONE_SEED: Final = (
    "balanced_accuracy_interval",
    "temperature",
    "calibrated_log_loss",
    "calibrated_ece",
)
"""Figures of a score that several seeds do not have."""

Reader = Callable[[Path], Predictions]
"""Reads a file of predictions."""


@dataclass(frozen=True)
class _Contender:
    """One side of a comparison: a name, and its predictions, one member for each seed."""

    name: str
    rows: Predictions


def compare_saved(
    sources: Sequence[str],
    shared: bool = False,
    *,
    labels: str | Path | None = None,
    classes: Classes | None = None,
) -> tuple[PredictionSummary, Predictions]:
    """Compare every pair of contenders on the same rows.

    A source is `PATH` or `PATH:NAME`. A run folder stands for its chosen ensemble (calibrated, on
    the test rows where there are any), and NAME for one of its members. A file stands for its only
    member, and NAME for one of several. A+B as NAME is the mean of members. A single source stands
    for all of its members. `PATH,PATH,...` are several seeds of one recipe: intervals and p-values
    then account for other seeds and other images alike.

    Args:
        sources: the contenders.
        shared: compare on the rows that all have; otherwise missing rows are an error.
        labels: labels of files without labels, see `formats.read_predictions`.
        classes: class names of files without class names, see `formats.read_predictions`.

    Returns:
        What `threefold compare` prints and shows, and the predictions that were compared.

    Raises:
        DataError: fewer than two contenders or more than MAX_CONTENDERS, a name is ambiguous, or
            the predictions do not belong together.
        RunError: a run folder is not complete.
    """
    read_file = partial(read_predictions, labels=labels, classes=classes)
    if len(sources) == 1:
        contenders = _all_members(Path(sources[0]), read_file)
    else:
        contenders = [_read_contender(source, read_file) for source in sources]
    return _compare(contenders, tuple(sources), shared)


def compare_predictions(
    rows: Predictions, source: Sequence[str]
) -> tuple[PredictionSummary, Predictions]:
    """Compare every pair of members as `compare_saved` does.

    Args:
        rows: the predictions.
        source: where they come from.

    Raises:
        DataError: fewer than two members, or more than MAX_CONTENDERS.
    """
    contenders = [_Contender(name, rows.select([name])) for name in rows.members]
    return _compare(contenders, tuple(source), shared=False)


def _compare(
    contenders: Sequence[_Contender], source: tuple[str, ...], shared: bool
) -> tuple[PredictionSummary, Predictions]:
    names = [contender.name for contender in contenders]
    check_contenders(names)
    rows = _join(contenders, shared)
    ends = np.cumsum([0, *(len(contender.rows.members) for contender in contenders)])
    probs = [rows.probs[start:end] for start, end in pairwise(ends)]
    hits = [top_classes(part) == rows.labels for part in probs]
    summary = PredictionSummary(
        kind="compare",
        source=source,
        n=len(rows),
        classes=rows.classes,
        chosen=None,
        chosen_reason="",
        scores=tuple(_score(rows, name, part) for name, part in zip(names, probs, strict=True)),
        comparisons=_compare_pairs(rows, names, hits),
        warnings=tuple(_warnings(rows, contenders)),
    )
    if len(names) > 2 and all(len(part) == 1 for part in hits):
        test = paired_tests.cochran_q(np.concatenate(hits))
        summary = summary.replace(cochran_q={"q": test.q, "df": test.df, "p": test.p})
    return summary, rows


def compare_members(rows: Predictions) -> tuple[Comparison, ...]:
    """Compare every pair of the members of some predictions, as `compare_saved` does."""
    hits = [(top_classes(probs) == rows.labels)[None] for probs in rows.probs]
    return _compare_pairs(rows, rows.members, hits)


def _all_members(path: Path, read_file: Reader) -> list[_Contender]:
    """Return every member of one source, after a run's chosen ensemble."""
    if path.is_dir():
        folder = RunFolder(path)
        chosen = folder.chosen_predictions()
        contenders = [_Contender(chosen.members[0], chosen)]
        rows = folder.headline_rows()
    else:
        contenders, rows = [], read_file(path)
    return contenders + [_Contender(name, rows.select([name])) for name in rows.members]


def _read_contender(source: str, read_file: Reader) -> _Contender:
    """Read one contender; several paths, separated by commas, are its seeds."""
    parts = [_read_seed(part, read_file) for part in source.split(",") if part]
    if not parts:
        raise DataError("a contender has no path", got=source)
    if len(parts) == 1:
        return parts[0]
    seeds = [replace(p.rows, members=(f"{p.name} seed {i}",)) for i, p in enumerate(parts)]
    return _Contender(f"{parts[0].name} ({len(parts)} seeds)", join_predictions(seeds))


def _read_seed(source: str, read_file: Reader) -> _Contender:
    """Read `PATH` or `PATH:NAME`."""
    path, name = split_source(source)
    if path.is_dir():
        folder = RunFolder(path)
        chosen = folder.chosen_predictions()
        if name:
            return _Contender(f"{path.name}:{name}", _pick(folder.headline_rows(), name))
        return _Contender(path.name, chosen)
    rows = read_file(path)
    if name:
        return _Contender(f"{path.stem}:{name}", _pick(rows, name))
    require_one_member(rows.members, path)
    return _Contender(path.stem, rows)


def split_source(source: str) -> tuple[Path, str]:
    """Return path and member of `PATH` or `PATH:NAME`; without a name the member is empty."""
    path, name = Path(source), ""
    if not path.exists() and ":" in source:
        left, _, name = source.rpartition(":")
        path = Path(left)
    return path, name


def require_one_member(members: Sequence[str], path: Path) -> None:
    """Refuse a file of several members, none of which is named.

    Raises:
        DataError: there are several.
    """
    if len(members) > 1:
        raise DataError(
            "the file has several members",
            where=path,
            expected=f"one, for example {path}:{members[0]}",
            got=", ".join(members[:5]),
        )


def check_contenders(names: Sequence[str]) -> None:
    """Check the number of contenders, and that their names differ.

    Raises:
        DataError: there are fewer than two or more than MAX_CONTENDERS, or a name is repeated.
    """
    if not 2 <= len(names) <= MAX_CONTENDERS:
        raise DataError(
            "cannot compare",
            expected=f"2 to {MAX_CONTENDERS} contenders",
            got=len(names),
            fix="name them: A B, or FILE:MEMBER",
        )
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(
            "two contenders have the same name", got=repeated, fix="rename a file or folder"
        )


def _pick(rows: Predictions, name: str) -> Predictions:
    """Return one member, or the mean of several, A+B."""
    if name in rows.members or "+" not in name:
        return rows.select([name])
    several = rows.select(name.split("+"))
    mean = scratch((1, *several.probs.shape[1:]), np.float32)
    for block in row_blocks(len(several), several.probs[:, 0].size):
        mean[0, block] = several.probs[:, block].mean(0)
    return replace(several, probs=mean, members=(name,))


def _join(contenders: Sequence[_Contender], shared: bool) -> Predictions:
    """Join all contenders on the same rows, their members under distinct names."""
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
            part.rows([i for i, id_ in enumerate(part.ids) if id_ in common]) for part in parts
        ]
    return join_predictions(parts)


def _score(rows: Predictions, name: str, probs: np.ndarray) -> Score:
    """Score a contender; of several seeds, the mean figures, and what they say of other seeds."""
    seeds = [score_probs(rows, p, name=name, kind="contender", fitted_on="") for p in probs]
    first = seeds[0]
    if len(seeds) == 1:
        return first
    over = crossed_effects.seeds_accuracy(
        top_classes(probs) == rows.labels, rows.groups, first.level
    )
    return first.replace(
        **{key: _mean([getattr(score, key) for score in seeds]) for key in _FIGURES},
        **dict.fromkeys(_OF_ONE_SEED),
        interval=(over.low, over.high),
        seeds=tuple(score.accuracy for score in seeds),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _compare_pairs(
    rows: Predictions, names: Sequence[str], hits: Sequence[np.ndarray]
) -> tuple[Comparison, ...]:
    """Test every pair, with p-values under Holm's correction over all pairs.

    Args:
        rows: labels, groups and kind of the rows.
        names: of the contenders.
        hits: for each contender, booleans (seeds, n): which rows are right.
    """
    pairs = [
        _compare_pair(rows, names[i], names[j], hits[i], hits[j])
        for i, j in combinations(range(len(names)), 2)
    ]
    corrected = paired_tests.holm([pair.p for pair in pairs])
    return tuple(
        pair.replace(p=float(p), verdict=_verdict(pair, float(p), rows))
        for pair, p in zip(pairs, corrected, strict=True)
    )


def _compare_pair(
    rows: Predictions, a: str, b: str, hits_a: np.ndarray, hits_b: np.ndarray
) -> Comparison:
    """Test one pair; `p` is not corrected yet, and there is no verdict."""
    if len(hits_a) != len(hits_b):
        raise DataError(
            "seeds are paired",
            where=f"{a} and {b}",
            expected="as many of one as of the other",
            got=f"{len(hits_a)} and {len(hits_b)}",
        )
    if len(hits_a) > 1:
        seeds = paired_tests.seeds_difference(hits_a, hits_b, rows.groups)
        return Comparison(
            a=a,
            b=b,
            rows=rows.kind,
            difference=seeds.estimate,
            interval=(seeds.low, seeds.high),
            p=seeds.p,
            p_alone=seeds.p,
            seeds=tuple(seeds.per_seed),
            test=f"{len(hits_a)} seeds, crossed random effects",
            only_a=None,
            only_b=None,
            verdict="",
        )
    first, second = hits_a[0], hits_b[0]
    test = paired_tests.mcnemar_exact(first, second, rows.groups)
    gap = paired_differences.paired_bootstrap(first, second, rows.groups)
    comparison = Comparison(
        a=a,
        b=b,
        rows=rows.kind,
        difference=gap.estimate,
        interval=(gap.low, gap.high),
        p=test.p,
        p_alone=test.p,
        test="exact McNemar test" if rows.groups is None else "McNemar over whole groups",
        only_a=test.only_a,
        only_b=test.only_b,
        verdict="",
    )
    p_over_folds = _test_over_folds(rows, first, second)
    return comparison if p_over_folds is None else comparison.replace(p_over_folds=p_over_folds)


def _test_over_folds(rows: Predictions, a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the p-value of the corrected t-test over folds (Nadeau and Bengio 2003).

    Unlike the other tests it accounts for other training sets. None without folds.
    """
    folds = rows.folds
    if folds is None or (folds < 0).any() or len(np.unique(folds)) < 2:
        return None
    first, second = ([hits[folds == fold].mean() for fold in np.unique(folds)] for hits in (a, b))
    return paired_tests.corrected_t_test(first, second, n_fit=len(first) - 1, n_score=1).p


def _verdict(pair: Comparison, p: float, rows: Predictions) -> str:
    """Say which of the two is better, if either is, at the corrected p-value."""
    if pair.only_a is not None and pair.only_b is not None and pair.test is not None:
        n = 0 if rows.groups is not None else len(rows)  # not known for groups
        return paired_tests.verdict(
            pair.a, pair.b, pair.only_a, pair.only_b, p, test=pair.test, n=n
        )
    assert pair.interval is not None
    assert pair.difference is not None
    low, high = pair.interval
    figures = (
        f"{100 * pair.difference:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}] "
        f"({pair.test}, p = {p:.2g})"
    )
    if p > 0.05:
        return f"no evidence of a difference: {figures}"
    better, worse = (pair.a, pair.b) if pair.difference > 0 else (pair.b, pair.a)
    return f"{better} is better than {worse}: {figures}"


def _warnings(rows: Predictions, contenders: Sequence[_Contender]) -> list[str]:
    """Return what weakens the comparison, in words."""
    warnings = []
    seeds, unit = len(contenders[0].rows.members), "images" if rows.groups is None else "groups"
    if seeds > 1:
        warnings.append(
            f"all intervals are for other seeds and other {unit}, measured on {seeds} seeds of each"
        )
    if seeds == 2:
        warnings.append("two seeds say little about others: with three or more, intervals shrink")
    protocols = {contender.rows.protocol for contender in contenders}
    if rows.kind == "foreign":
        warnings.append("whether a model was trained or chosen on these rows is not known")
    if "paper" in protocols:
        warnings.append(
            "protocol paper: checkpoints were chosen on rows that are scored, which flatters"
        )
    if "taught" in protocols:
        warnings.append(
            "apparent: the teachers of a student learned from the labels of these rows, "
            "which flatters it"
        )
    dropped = max(len(contender.rows) for contender in contenders) - len(rows)
    if dropped:
        warnings.append(
            f"{count_of(dropped, 'row is', 'rows are')} not in all of them, and left out"
        )
    return warnings
