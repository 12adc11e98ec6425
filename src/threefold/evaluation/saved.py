"""Saved predictions, of runs and of other programs: read, combined and scored."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from threefold.ensembles.cross_fit import stratified_parts
from threefold.ensembles.diversity import diversity, duplicates, size_curve
from threefold.ensembles.registry import ENSEMBLES, make_ensemble
from threefold.ensembles.scaling import apply_temperature, fit_temperature
from threefold.errors import DataError, RecipeError, RunError
from threefold.evaluation.evaluate import Evaluation, evaluate
from threefold.evaluation.label_errors import list_suspects, summarize_audit
from threefold.evaluation.scoring import per_class, score_probs
from threefold.names import count_of
from threefold.predictions.formats import Classes, read_predictions
from threefold.predictions.join import join_predictions
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import (
    CalibrationState,
    DiversityRecord,
    PredictionSummary,
    Score,
    SizeCurveRecord,
)
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.ensemble import EnsembleSpec
from threefold.scratch import row_blocks, take_rows
from threefold.stats import scores as stats
from threefold.stats.weighted_scores import log_losses

AUTO = tuple(name for name in ENSEMBLES if not name.startswith("stacked"))
"""The methods that `auto` chooses from, fitted in seconds. Add others by name: `auto,stacked`."""

CURVE_ROWS: Final = 5000
"""Largest number of rows for the curve of accuracy against size; of more, a stratified part."""


def read_sources(
    sources: Sequence[str | Path],
    members: Sequence[str] = (),
    labels: str | Path | None = None,
    classes: Classes | None = None,
) -> Predictions:
    """Read predictions from one source or several, joined by the rows' ids.

    Args:
        sources: run folders, of which the out-of-fold rows are read, or files of predictions.
        members: the members to keep; empty = all.
        labels: labels of files without labels, see `formats.read_predictions`.
        classes: class names of files without class names, see `formats.read_predictions`.

    Raises:
        DataError: a file cannot be used, the files do not belong together, or a member is unknown.
        RunError: a run folder has no out-of-fold rows.
    """
    if not sources:
        raise DataError("no predictions given", expected="a run folder or files of predictions")
    parts = []
    for source in map(Path, sources):
        if not source.is_dir():
            parts.append(read_predictions(source, labels=labels, classes=classes))
            continue
        folder = RunFolder(source)
        rows = folder.oof
        if rows is None:
            raise without_oof_rows(folder)
        parts.append(rows)
    joined = parts[0] if len(parts) == 1 else join_predictions(parts)
    return joined.select(members) if members else joined


def without_oof_rows(folder: RunFolder) -> RunError:
    """Return the error for a folder without oof.npz, with the step that its own state asks for."""
    what = "no out-of-fold predictions"
    if not folder.has("recipe.toml"):
        fix = "give a finished run folder"
    elif folder.is_finished and not any(c.score for c in folder.info.roles.values()):
        what = "the folds of this run score no row, so there are no out-of-fold predictions"
        fix = "set folds.k to 2 or more and train again"
        if folder.info.n_test:
            fix = f"for its test rows: {shlex.join(['threefold', 'ensemble', str(folder.path)])}"
    else:  # interrupted before the members were scored, or the file was deleted
        fix = f"run `{folder.train_command()}`"
    return RunError(what, where=folder.path, expected="oof.npz", fix=fix)


def evaluate_saved(
    sources: Sequence[str | Path] | str | Path,
    methods: Sequence[str],
    members: Sequence[str] = (),
    top: int = 0,
    reopen: bool = False,
    *,
    labels: str | Path | None = None,
    classes: Classes | None = None,
) -> Evaluation:
    """Combine and score saved predictions.

    Training opened a run's test rows once. The scores of that time are repeated; anything else is
    scored on the out-of-fold rows only, unless `reopen` is set.

    Args:
        sources: a run folder, or files of predictions, joined by the rows' ids.
        methods: names of ENSEMBLES; `auto` adds those of AUTO and chooses among all.
        members: the members to use; empty = all, or those that a run's recipe combines.
        top: number of members to combine, the most accurate on the fitting rows; 0 = all.
        reopen: score on a run's test rows again, and note it in the run folder.
        labels: labels of files without labels, see `formats.read_predictions`.
        classes: class names of files without class names, see `formats.read_predictions`.

    Raises:
        DataError: the predictions cannot be used, or a member is unknown.
        RecipeError: a method is unknown, or there are fewer members than `top`.
        RunError: the run folder has no predictions yet, or its recipe was edited.
    """
    auto = "auto" in methods
    named = [method for method in methods if method != "auto"]
    for method in named:
        make_ensemble(method)  # raises RecipeError for an unknown name
    names = tuple(dict.fromkeys([*AUTO, *named] if auto else named))
    changes: dict[str, Any] = {
        "methods": names,
        "export": "auto" if auto or len(names) > 1 else names[0],
        "top": top,
    }
    given = [sources] if isinstance(sources, str | Path) else sources
    paths = [Path(source) for source in given]
    if len(paths) == 1 and paths[0].is_dir():
        return _evaluate_run(RunFolder.open(paths[0]), changes, members, reopen)
    if reopen:
        raise DataError(
            "only a run has test rows to open", where=paths[0], fix="leave out --reopen-test"
        )
    rows = read_sources(paths, members, labels, classes)
    spec = EnsembleSpec.model_validate(changes)
    _check_top(spec, rows)
    return evaluate(rows, None, spec)


def _evaluate_run(
    folder: RunFolder, changes: dict[str, Any], members: Sequence[str], reopen: bool
) -> Evaluation:
    """Evaluate a run's predictions with changes to the `ensemble` table of its recipe."""
    folder.check_recipe()
    folder.check_results_kept()
    oof, test, recipe = folder.oof, folder.test, folder.recipe
    rows = oof if oof is not None else test
    if rows is None:
        raise RunError(
            "no predictions",
            where=folder.path,
            expected="oof.npz or test.npz",
            fix=f"run `{folder.train_command()}`",
        )
    if reopen and folder.is_sealed:
        raise RunError(
            "the test rows are sealed until all members are trained",
            where=folder.path,
            got=f"to be trained: {', '.join(folder.results.pending)}",
            fix=folder.train_command(),
        )
    settings = {**recipe.ensemble.model_dump(), **changes}
    if members:
        oof = oof.select(members) if oof is not None else None
        test = test.select(members) if test is not None else None
    else:
        settings["members"] = recipe.combined
        settings["top"] = changes["top"] or recipe.ensemble.top
    spec = EnsembleSpec.model_validate(settings)
    _check_top(spec, rows)
    if folder.is_sealed:
        evaluation = evaluate(oof, None, spec, recipe.seed, recipe.train.metric)
        pending = ", ".join(folder.results.pending)
        evaluation.warnings.append(f"a first answer: still to be trained: {pending}")
        return evaluation
    if oof is None or test is None or reopen:
        if test is not None and oof is not None:
            folder.open_test("ensemble", len(test))
        return evaluate(oof, test, spec, recipe.seed, recipe.train.metric)
    evaluation = evaluate(oof, None, spec, recipe.seed, recipe.train.metric)
    _add_stored_test_scores(folder, evaluation, is_same_top=spec.top == recipe.ensemble.top)
    return evaluation


def _add_stored_test_scores(folder: RunFolder, evaluation: Evaluation, is_same_top: bool) -> None:
    """Add the run's test scores of the same combinations, and warn of those that it lacks."""
    stored = folder.results.scores if folder.is_finished else ()
    is_same = is_same_top and folder.is_finished and evaluation.combined == folder.results.combined
    scored = {(s.kind, s.name) for s in evaluation.scores if s.kind == "member" or is_same}
    repeated = [s for s in stored if s.rows == "test" and (s.kind, s.name) in scored]
    known = {(s.kind, s.name) for s in repeated}
    missing = [
        s.name for s in evaluation.scores if s.rows == "oof" and (s.kind, s.name) not in known
    ]
    evaluation.scores += repeated
    if missing:
        opened = folder.test_opened()
        when = f"were opened on {opened.at[:10]} by {opened.by}" if opened else "are sealed"
        evaluation.warnings.append(
            f"the test rows {when}; not scored on them: {', '.join(missing)} "
            "(--reopen-test does, and notes it)"
        )


def _check_top(spec: EnsembleSpec, rows: Predictions) -> None:
    count = len(spec.members or rows.members)
    if spec.top > count:
        raise RecipeError(
            "more members to select than there are",
            where="top",
            expected=f"at most {count}",
            got=spec.top,
        )


def summarize_evaluation(sources: Sequence[Path], evaluation: Evaluation) -> PredictionSummary:
    """Return what `threefold ensemble --json` prints and its page shows."""
    rows = evaluation.fit_rows
    return PredictionSummary(
        kind="ensemble",
        source=tuple(map(str, sources)),
        n=len(rows),
        classes=rows.classes,
        scores=tuple(evaluation.scores),
        expected=evaluation.expected,
        comparisons=tuple(evaluation.comparisons),
        chosen=evaluation.chosen,
        chosen_reason=evaluation.reason,
        calibration=CalibrationState(**evaluation.calibration.state()),
        combined=evaluation.combined,
        warnings=tuple(evaluation.warnings),
        optimism=tuple(evaluation.optimism),
        ledger=tuple(evaluation.ledger),
        per_class=per_class(evaluation.rows, evaluation.probs),
        **_diversity_sections(rows),
    )


def score_saved(
    sources: Sequence[str | Path],
    members: Sequence[str] = (),
    *,
    labels: str | Path | None = None,
    classes: Classes | None = None,
) -> tuple[PredictionSummary, Predictions]:
    """Score members as they are: nothing is fitted, nothing calibrated.

    Besides the scores: the effect of a temperature (fitted on other rows than it is scored on), the
    classes of the most accurate member, and how members differ.

    Args:
        sources: run folders or files, see `read_sources`.
        members: the members to score; empty = all.
        labels: labels of files without labels, see `formats.read_predictions`.
        classes: class names of files without class names, see `formats.read_predictions`.

    Returns:
        What `threefold evaluate` prints and shows, and the predictions.

    Raises:
        DataError: the predictions cannot be used, or a member is unknown.
        RunError: a run folder has no out-of-fold rows.
    """
    rows = read_sources(sources, members, labels, classes)
    summary = score_predictions(rows, tuple(map(str, sources)))
    return summary.replace(warnings=(*left_out(sources), *summary.warnings)), rows


def left_out(sources: Sequence[str | Path]) -> list[str]:
    """Say which images of runs are not among their out-of-fold rows, a line for each run."""
    notes = []
    for path in map(Path, sources):
        folder = RunFolder(path)
        if not path.is_dir() or not folder.has("run.json"):
            continue
        info = folder.info
        unscored = info.n_train - sum(counts.score for counts in info.roles.values())
        parts = []
        if unscored > 0:
            parts.append(f"{count_of(unscored, 'training image')} that no fold scores")
        if info.n_test:
            parts.append(f"{count_of(info.n_test, 'test image')}, whose scores are in the report")
        if parts:
            notes.append(f"{path.name}: out-of-fold rows; left out: {' and '.join(parts)}")
    return notes


def score_predictions(rows: Predictions, source: Sequence[str]) -> PredictionSummary:
    """Score members as `score_saved` does.

    Args:
        rows: the predictions.
        source: where they come from.
    """
    scores = [
        _score_member(rows, name, probs)
        for name, probs in zip(rows.members, rows.probs, strict=True)
    ]
    best = max(range(len(scores)), key=lambda i: scores[i].accuracy)
    warnings = []
    if rows.kind == "foreign":
        warnings.append("whether the models have seen these rows is not known")
    if rows.protocol == "taught":
        warnings.append("apparent: the teachers of a student learned from the labels of these rows")
    copies = duplicates(rows.probs) if len(rows.members) > 1 else ()
    return PredictionSummary(
        kind="evaluate",
        source=tuple(source),
        n=len(rows),
        classes=rows.classes,
        scores=tuple(scores),
        chosen=None,
        chosen_reason="",
        comparisons=(),
        warnings=tuple(warnings),
        per_class=per_class(rows, rows.probs[best]),
        per_class_of=rows.members[best],
        audit=summarize_audit(*list_suspects(rows)),
        **_diversity_sections(rows, copies),
    )


def _score_member(rows: Predictions, name: str, probs: np.ndarray) -> Score:
    """Score one member's probabilities (n, k) as they are."""
    more: dict[str, Any] = {}
    if len(rows.classes) > 5:
        more["top5"] = stats.top_k_accuracy(probs, rows.labels, 5)
    if len(rows) >= 4:
        more |= _temperature_effect(probs, rows.labels)
    return score_probs(rows, probs, name=name, kind="member", fitted_on="nothing", **more)


def _temperature_effect(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Log loss and calibration error when each half is scaled with the other half's temperature."""
    n, k = probs.shape
    losses, confidence, hit = np.empty(n), np.empty(n), np.empty(n, bool)
    for half in (0, 1):
        rows = np.arange(half, n, 2)
        temperature = fit_temperature(probs[1 - half :: 2], labels[1 - half :: 2])
        for some in (rows[block] for block in row_blocks(len(rows), k)):
            scaled = apply_temperature(probs[some], temperature)
            losses[some] = log_losses(scaled, labels[some])
            confidence[some] = scaled.max(-1)
            hit[some] = scaled.argmax(-1) == labels[some]
    return {
        "temperature": fit_temperature(probs, labels),
        "calibrated_log_loss": float(losses.mean()),
        "calibrated_ece": stats.calibration_error(confidence, hit),
    }


def _diversity_sections(rows: Predictions, copies: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
    """The sections `diversity` and `size_curve` of a summary; neither for a single member."""
    if len(rows.members) < 2:
        return {}
    names, measured = rows.members, diversity(rows.probs, rows.labels)
    part = stratified_parts(rows.labels, parts=-(-len(rows) // CURVE_ROWS)) == 0
    curve = size_curve(take_rows(rows.probs, part), rows.labels[part])
    return {
        "diversity": DiversityRecord(
            members=names,
            disagreement=measured.disagreement.tolist(),
            means=measured.means(),
            duplicates=tuple(tuple(names[i] for i in group) for group in copies),
        ),
        "size_curve": SizeCurveRecord(
            mean=curve.random.tolist(),
            low=curve.low.tolist(),
            high=curve.high.tolist(),
            ordered=curve.ordered.tolist(),
            order=tuple(names[i] for i in curve.order),
            n=int(part.sum()),
        ),
    }
