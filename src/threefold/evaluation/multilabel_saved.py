"""Saved predictions of several labels per image: read, scored, combined and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from threefold.ensembles.multilabel import CrossFitted, Metric
from threefold.errors import DataError
from threefold.evaluation.compare import check_contenders, require_one_member, split_source
from threefold.evaluation.multilabel import (
    MultilabelEvaluation,
    as_they_are,
    check_methods,
    compare_answers,
    draw,
    evaluate_multilabel,
    score_answer,
    score_labels,
    warnings_about,
    with_verdict,
)
from threefold.evaluation.saved import left_out, without_oof_rows
from threefold.names import count_of
from threefold.predictions.multilabel import MultilabelPredictions, is_multilabel_file
from threefold.predictions.multilabel_results import MultilabelPredictionSummary
from threefold.predictions.run_folder import RunFolder
from threefold.stats import paired_tests

_MEAN_PRECISION: Final[Metric] = "mean_average_precision"


class ScoredAnswers(NamedTuple):
    """A summary, and the answers that its page draws: of the best member, or of the ensemble."""

    summary: MultilabelPredictionSummary
    rows: MultilabelPredictions
    answer: CrossFitted


def are_multilabel(sources: Sequence[str | Path]) -> bool:
    """Whether run folders or files of predictions have several labels per image.

    Args:
        sources: paths; `PATH:NAME` names a member, `PATH,PATH` are seeds of one recipe.

    Raises:
        DataError: some have several labels per image, and others one.
    """
    paths = []
    for source in map(str, sources):
        paths += [source] if Path(source).exists() else source.split(",")
    kinds = [_is_multilabel(split_source(path)[0]) for path in paths]
    if any(kinds) and not all(kinds):
        raise DataError(
            "predictions of several labels per image and of one do not go together",
            got=f"{paths[kinds.index(True)]} and {paths[kinds.index(False)]}",
        )
    return bool(kinds) and all(kinds)


def _is_multilabel(path: Path) -> bool:
    if path.is_dir():
        recipe = path / "recipe.toml"
        return recipe.is_file() and RunFolder(path).is_multilabel
    return path.is_file() and path.suffix.lower() == ".npz" and is_multilabel_file(path)


def refuse_options(**options: object) -> None:
    """Refuse options that have no meaning for several labels per image.

    Raises:
        DataError: one is given.
    """
    given = [name for name, value in options.items() if value]
    if given:
        raise DataError(
            "an option for predictions of one label per image",
            got=", ".join(f"--{name.replace('_', '-')}" for name in given),
            fix="leave it out; an .npz of several labels per image has its targets and classes",
        )


def read_multilabel(sources: Sequence[Path], members: Sequence[str] = ()) -> MultilabelPredictions:
    """Read predictions from one source or several, joined by the rows' ids.

    Args:
        sources: run folders, of which the out-of-fold rows are read, or .npz files.
        members: the members to keep; empty = all.

    Raises:
        DataError: a file cannot be used, the files do not belong together, or a member is unknown.
        RunError: a run folder has no out-of-fold rows.
    """
    parts = []
    for source in sources:
        if not source.is_dir():
            parts.append(MultilabelPredictions.load(source))
            continue
        folder = RunFolder(source)
        folder.check_results_kept()
        rows = folder.multilabel_oof
        if rows is None:
            raise without_oof_rows(folder)
        parts.append(rows)
    joined = join_multilabel(parts)
    return joined.select(members) if members else joined


def join_multilabel(
    parts: Sequence[MultilabelPredictions], shared: bool = False
) -> MultilabelPredictions:
    """Put the members of several predictions of the same images together, by the rows' ids.

    Args:
        parts: predictions whose members have distinct names.
        shared: keep the rows that all have; otherwise missing rows are an error.

    Raises:
        DataError: labels, targets or rows differ, or a member's name is repeated.
    """
    first = parts[0]
    kept = first.ids
    if shared:
        common = set.intersection(*(set(part.ids) for part in parts))
        kept = tuple(name for name in first.ids if name in common)
    if not kept:
        raise DataError(
            "no row is in all of them",
            expected=f"ids such as {first.ids[0]}",
            got=parts[1].ids[0],
        )
    aligned = []
    for part in parts:
        if part.classes != first.classes:
            raise DataError(
                "the predictions have different labels",
                expected=", ".join(first.classes[:5]),
                got=", ".join(part.classes[:5]),
            )
        place = {name: row for row, name in enumerate(part.ids)}
        missing = next((name for name in kept if name not in place), None)
        if missing is not None or (not shared and len(part) != len(first)):
            raise DataError(
                "the predictions are of different images",
                expected=f"{len(first):,} rows with the ids of the first",
                got=f"{len(part):,} rows" + (f", without {missing}" if missing else ""),
                fix="compare with --shared, or give predictions of the same images",
            )
        aligned.append(part.rows([place[name] for name in kept]))
    head = aligned[0]
    if len(parts) == 1:
        return head
    for part in aligned[1:]:
        if not np.array_equal(part.targets, head.targets):
            row = int((part.targets != head.targets).any(1).argmax())
            raise DataError("the predictions have different targets", where=head.ids[row])
    same_folds = head.folds is not None and all(
        part.folds is not None and (part.folds == head.folds).all() for part in aligned
    )
    kinds = {part.kind for part in aligned}
    return MultilabelPredictions(
        probs=np.concatenate([part.probs for part in aligned]),
        targets=head.targets,
        ids=head.ids,
        classes=head.classes,
        members=tuple(name for part in aligned for name in part.members),
        groups=next((part.groups for part in aligned if part.groups is not None), None),
        protocol="paper" if any(part.protocol == "paper" for part in aligned) else head.protocol,
        kind=head.kind if len(kinds) == 1 else "foreign",
        folds=head.folds if same_folds else None,
    )


def score_multilabel(sources: Sequence[Path], members: Sequence[str] = ()) -> ScoredAnswers:
    """Score members as they are: nothing is combined or calibrated; thresholds are cross-fitted.

    Args:
        sources: run folders or files, see `read_multilabel`.
        members: the members to score; empty = all.

    Raises:
        DataError: the predictions cannot be used, or a member is unknown.
        RunError: a run folder has no out-of-fold rows.
    """
    rows = read_multilabel(sources, members)
    scored = score_multilabel_rows(rows, tuple(map(str, sources)))
    warnings = (*left_out(sources), *scored.summary.warnings)
    return scored._replace(summary=scored.summary.replace(warnings=warnings))


def score_multilabel_rows(
    rows: MultilabelPredictions,
    source: Sequence[str],
    decided: Sequence[np.ndarray] | None = None,
) -> ScoredAnswers:
    """Score members as `score_multilabel` does.

    Args:
        rows: the predictions.
        source: where they come from.
        decided: the labels uint8 (n, k) that each member gives, such as at thresholds of its own;
            None = at cross-fitted thresholds.

    Raises:
        DataError: no image has a label.
    """
    answers = {}
    for number, (name, probs) in enumerate(zip(rows.members, rows.probs, strict=True)):
        own = None if decided is None else CrossFitted(probs, decided[number])
        answers[name] = draw(rows, own or as_they_are(rows, probs))
    fitted_on = "thresholds only, cross-fitted" if decided is None else "nothing on these rows"
    scores = [
        score_answer(rows, answer, name=name, kind="member", fitted_on=fitted_on)
        for name, answer in answers.items()
    ]
    best = max(scores, key=lambda score: score.mean_average_precision).name
    summary = MultilabelPredictionSummary(
        task="multilabel",
        kind="evaluate",
        source=tuple(source),
        n=len(rows),
        classes=rows.classes,
        scores=tuple(scores),
        per_label=tuple(score_labels(rows, answers[best])),
        per_label_of=best,
        warnings=tuple(warnings_about(rows)),
    )
    return ScoredAnswers(summary, rows, CrossFitted(*answers[best][:2]))


def combine_multilabel(
    sources: Sequence[Path], methods: Sequence[str], members: Sequence[str] = ()
) -> ScoredAnswers:
    """Choose how to combine saved predictions, calibrate, choose thresholds, and score.

    Args:
        sources: run folders, of which the out-of-fold rows are read, or files.
        methods: mean, best, or auto = chosen.
        members: the members to combine; empty = all, or those that a run's recipe combines.

    Raises:
        DataError: the predictions cannot be used.
        RecipeError: a method has no meaning for several labels per image.
    """
    method, metric = check_methods(methods), _MEAN_PRECISION
    if len(sources) == 1 and sources[0].is_dir():
        recipe = RunFolder.open(sources[0]).recipe
        members = members or recipe.combined
        metric = "log_loss" if recipe.train.metric == "log_loss" else metric
    rows = read_multilabel(sources, members)
    evaluation = evaluate_multilabel(rows, None, method=method, metric=metric)
    summary = summarize_multilabel(sources, evaluation)
    summary = summary.replace(warnings=(*left_out(sources), *summary.warnings))
    return ScoredAnswers(summary, rows, CrossFitted(evaluation.probs, evaluation.decided))


def summarize_multilabel(
    sources: Sequence[Path], evaluation: MultilabelEvaluation
) -> MultilabelPredictionSummary:
    """Return what `threefold ensemble --json` prints and its page shows."""
    return MultilabelPredictionSummary(
        task="multilabel",
        kind="ensemble",
        source=tuple(map(str, sources)),
        n=len(evaluation.rows),
        classes=evaluation.rows.classes,
        scores=tuple(evaluation.scores),
        per_label=tuple(evaluation.per_label),
        per_label_of=evaluation.chosen,
        chosen=evaluation.chosen,
        chosen_reason=evaluation.reason,
        combined=evaluation.combined,
        ensemble=evaluation.state,
        expected=evaluation.expected,
        comparisons=tuple(evaluation.comparisons),
        optimism=tuple(evaluation.optimism),
        ledger=tuple(evaluation.ledger),
        warnings=tuple(evaluation.warnings),
    )


class _Contender(NamedTuple):
    """One side of a comparison.

    A run or a model file has labels (n, k) of its own, others those of new thresholds.
    """

    name: str
    rows: MultilabelPredictions
    run: RunFolder | None = None
    decided: np.ndarray | None = None


def compare_multilabel(sources: Sequence[str], shared: bool = False) -> ScoredAnswers:
    """Compare every pair of contenders on the same images by a paired bootstrap.

    Args:
        sources: `PATH` or `PATH:NAME`, as for `compare.compare_saved`. A run stands for its chosen
            ensemble, a file for its only member. A single source stands for all of its members.
        shared: compare on the rows that all have.

    Raises:
        DataError: fewer than two contenders or more than MAX_CONTENDERS, or the predictions do not
            belong together.
    """
    if len(sources) == 1:
        contenders = _all_members(Path(sources[0]))
    else:
        contenders = [_read_contender(source) for source in sources]
    return _compare(contenders, tuple(sources), shared)


def compare_multilabel_rows(
    rows: MultilabelPredictions, decided: Sequence[np.ndarray], source: tuple[str, ...]
) -> ScoredAnswers:
    """Compare every pair of members, which give labels of their own.

    Args:
        rows: the predictions.
        decided: the labels uint8 (n, k) that each member gives.
        source: where they come from.

    Raises:
        DataError: fewer than two members, or more than MAX_CONTENDERS.
    """
    contenders = [
        _Contender(name, rows.member(name), decided=own)
        for name, own in zip(rows.members, decided, strict=True)
    ]
    return _compare(contenders, source, shared=False)


def _all_members(path: Path) -> list[_Contender]:
    contenders = []
    if path.is_dir():
        folder = RunFolder(path)
        chosen = folder.multilabel_chosen_rows()
        contenders.append(_Contender(chosen.members[0], chosen, folder))
        rows = folder.multilabel_headline()
    else:
        rows = MultilabelPredictions.load(path)
    return contenders + [_Contender(name, rows.member(name)) for name in rows.members]


def _read_contender(source: str) -> _Contender:
    path, name = split_source(source)
    if "," in source and not path.exists():
        raise DataError(
            "several seeds as one contender need one label per image",
            got=source,
            fix="compare them one by one",
        )
    if path.is_dir():
        folder = RunFolder(path)
        if name:
            return _Contender(f"{path.name}:{name}", folder.multilabel_headline().member(name))
        return _Contender(path.name, folder.multilabel_chosen_rows(), folder)
    rows = MultilabelPredictions.load(path)
    if name:
        return _Contender(f"{path.stem}:{name}", rows.member(name))
    require_one_member(rows.members, path)
    return _Contender(path.stem, rows)


def _compare(
    contenders: Sequence[_Contender], source: tuple[str, ...], shared: bool
) -> ScoredAnswers:
    names = [contender.name for contender in contenders]
    check_contenders(names)
    parts = [replace(c.rows, members=(c.name,)) for c in contenders]
    rows = join_multilabel(parts, shared)
    answers = {}
    for contender, probs in zip(contenders, rows.probs, strict=True):
        answers[contender.name] = draw(rows, _decide(contender, rows, probs))
    pairs = [compare_answers(rows, a, b, answers[a], answers[b]) for a, b in combinations(names, 2)]
    corrected = paired_tests.holm([pair.p for pair in pairs])
    warnings = warnings_about(rows)
    dropped = max(len(part) for part in parts) - len(rows)
    if dropped:
        warnings.append(
            f"{count_of(dropped, 'row is', 'rows are')} not in all of them, and left out"
        )
    scores = [
        score_answer(rows, answer, name=name, kind="contender", fitted_on="")
        for name, answer in answers.items()
    ]
    best = max(scores, key=lambda score: score.mean_average_precision).name
    summary = MultilabelPredictionSummary(
        task="multilabel",
        kind="compare",
        source=source,
        n=len(rows),
        classes=rows.classes,
        scores=tuple(scores),
        comparisons=tuple(
            with_verdict(pair, float(p)) for pair, p in zip(pairs, corrected, strict=True)
        ),
        per_label=tuple(score_labels(rows, answers[best])),
        per_label_of=best,
        warnings=tuple(warnings),
    )
    return ScoredAnswers(summary, rows, CrossFitted(*answers[best][:2]))


def _decide(contender: _Contender, rows: MultilabelPredictions, probs: np.ndarray) -> CrossFitted:
    """Return a run's own labels, or those of cross-fitted thresholds."""
    array = probs
    if contender.decided is not None:
        return CrossFitted(array, contender.decided)
    if contender.run is None:
        return as_they_are(rows, array)
    chosen = contender.run.multilabel_chosen
    place = {name: row for row, name in enumerate(chosen.ids)}
    return CrossFitted(array, chosen.decided[[place[name] for name in rows.ids]])
