"""Saved predictions, of runs and of other programs: read, combined and scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from threefold import stats
from threefold.audit import audit_tree, list_suspects
from threefold.crossfit import stratified_parts
from threefold.diversity import diversity, duplicates, size_curve
from threefold.ensembles__registry import ENSEMBLES, make_ensemble
from threefold.errors import DataError, RecipeError, RunError
from threefold.evaluate import Evaluation, evaluate
from threefold.files import read_json
from threefold.formats import read_predictions
from threefold.joining import join_predictions
from threefold.ledger import open_test, when_opened
from threefold.predictions import Predictions
from threefold.recipe import Recipe
from threefold.recipe_schema import EnsembleSpec
from threefold.scaling import apply_temperature, fit_temperature
from threefold.scoring import LEVEL, per_class

AUTO = tuple(name for name in ENSEMBLES if not name.startswith("stacked"))
"""What `auto` scores and chooses from: all that is fitted in seconds; `--method auto,stacked` takes the network, too."""

CURVE: Final = 5000
"""Rows of the accuracy-against-size curve: a stratified part where there are more."""


def saved_predictions(run: Path) -> tuple[Predictions | None, Predictions | None]:
    """A run folder's out-of-fold and test predictions, None where it has none."""
    oof, test = (
        Predictions.load(p) if (p := run / f"{kind}.npz").exists() else None
        for kind in ("oof", "test")
    )
    return oof, test


class Beside(NamedTuple):
    """What a file of probabilities lacks and another has: labels (a table, or "folder"), class names (a text file)."""

    labels: Path | None = None
    classes: Path | None = None


def read_sources(
    sources: Sequence[Path], members: Sequence[str] = (), beside: Beside | None = None
) -> Predictions:
    """Predictions of one file or several, joined by the rows' ids; of a run folder, the out-of-fold rows.

    Args:
        sources: run folders or files, see `formats.read_predictions`.
        members: only these; empty = all.
        beside: labels and class names of files without.

    Raises:
        DataError: a file cannot be used, the files do not belong together, or a member is unknown.
        RunError: a run folder has no out-of-fold rows.
    """
    if not sources:
        raise DataError("no predictions given", expected="a run folder or files of predictions")
    parts = [_out_of_fold(s) if s.is_dir() else read_file(s, beside) for s in sources]
    rows = parts[0] if len(parts) == 1 else join_predictions(parts)
    return rows.select(members) if members else rows


def read_file(path: Path, beside: Beside | None = None) -> Predictions:
    """`formats.read_predictions` with what lies beside the file."""
    told = beside or Beside()
    return read_predictions(path, labels=told.labels, classes=told.classes)


def _out_of_fold(run: Path) -> Predictions:
    rows = saved_predictions(run)[0]
    if rows is None:
        raise RunError(
            "no out-of-fold predictions",
            where=run,
            expected="oof.npz",
            fix="give a finished run folder",
        )
    return rows


def check_method(method: str) -> str:
    """The method, if there is one of that name.

    Raises:
        RecipeError: there is none; the message names the nearest.
    """
    make_ensemble(method)
    return method


def evaluate_saved(
    sources: Sequence[Path] | Path,
    methods: Sequence[str],
    members: Sequence[str] = (),
    top: int = 0,
    reopen: bool = False,
    beside: Beside | None = None,
) -> Evaluation:
    """Combine and score saved predictions.

    A run's test rows were opened once, when it was trained: what was scored then is repeated, and what was not is scored on the
    out-of-fold rows only.

    Args:
        sources: a run folder, or files of predictions, joined by the rows' ids.
        methods: names of ENSEMBLES; `auto` among them adds those of AUTO, and a choice among all.
        members: the members to use; empty = all, in a run those that its recipe combines.
        top: combine only that many, the most accurate of the fitting rows; 0 = all.
        reopen: score on a run's test rows again, and note it in the run folder.
        beside: labels and class names of files without.

    Raises:
        DataError: the predictions cannot be used, or a member is unknown.
        RecipeError: a method is unknown, or there are fewer members than `top`.
        RunError: the run folder has no predictions yet.
    """
    auto = "auto" in methods
    named = [check_method(m) for m in methods if m != "auto"]
    names = tuple(dict.fromkeys([*(AUTO if auto else ()), *named]))
    changes: dict[str, Any] = {
        "methods": names,
        "export": "auto" if auto or len(names) > 1 else names[0],
        "top": top,
    }
    paths = [sources] if isinstance(sources, Path) else list(sources)
    if len(paths) == 1 and paths[0].is_dir():
        return _evaluate_run(paths[0], changes, members, reopen)
    if reopen:
        raise DataError(
            "only a run has test rows to open", where=paths[0], fix="leave out --reopen-test"
        )
    rows = read_sources(paths, members, beside)
    return evaluate(rows, None, _checked_top(EnsembleSpec.model_validate(changes), rows))


def _evaluate_run(
    run: Path, changes: dict[str, Any], members: Sequence[str], reopen: bool
) -> Evaluation:
    oof, test = saved_predictions(run)
    rows = oof if oof is not None else test
    if rows is None:
        raise RunError(
            "no predictions",
            where=run,
            expected="oof.npz or test.npz",
            fix="give a finished run folder",
        )
    recipe = Recipe.load(run / "recipe.toml")
    if members:
        oof, test = (part.select(members) if part is not None else None for part in (oof, test))
    else:
        changes["members"] = recipe.combined
    settings = {
        **recipe.ensemble.model_dump(),
        **changes,
        "top": changes["top"] or (0 if members else recipe.ensemble.top),
    }
    spec = _checked_top(EnsembleSpec.model_validate(settings), rows)
    if oof is None or test is None or reopen:
        if test is not None and oof is not None:
            open_test(run, "ensemble", len(test))
        return evaluate(oof, test, spec, recipe.seed)
    found = evaluate(oof, None, spec, recipe.seed)
    _recall_test(run, found, spec.top == recipe.ensemble.top)
    return found


def _recall_test(run: Path, found: Evaluation, same_top: bool) -> None:
    """Add the test scores that the run has for the same combination, and say that the others were not opened."""
    opened, path = when_opened(run), run / "results.json"
    stored = read_json(path) if path.exists() else {"scores": [], "combined": []}
    same = list(found.combined) == stored["combined"] and same_top
    wanted = {(s["kind"], s["name"]) for s in found.scores if s["kind"] == "member" or same}
    kept = [s for s in stored["scores"] if s["rows"] == "test" and (s["kind"], s["name"]) in wanted]
    found.scores += kept
    missing = [
        s["name"]
        for s in found.scores
        if s["rows"] == "oof"
        and (s["kind"], s["name"]) not in {(k["kind"], k["name"]) for k in kept}
    ]
    if missing:
        when = f"were opened on {opened['at'][:10]} by {opened['by']}" if opened else "are sealed"
        found.warnings.append(
            f"the test rows {when}; not scored on them: {', '.join(missing)} (--reopen-test does, and notes it)"
        )


def _checked_top(spec: EnsembleSpec, rows: Predictions) -> EnsembleSpec:
    count = len(spec.members or rows.members)
    if spec.top > count:
        raise RecipeError(
            "more members to select than there are",
            where="top",
            expected=f"at most {count}",
            got=spec.top,
        )
    return spec


def ensemble_tree(sources: Sequence[Path], found: Evaluation) -> dict[str, Any]:
    """What `threefold ensemble --json` prints and its page shows."""
    rows = found.fit_rows
    return {
        "kind": "ensemble",
        "source": [str(s) for s in sources],
        "n": len(rows),
        "classes": list(rows.classes),
        "scores": found.scores,
        "expected": found.expected,
        "comparisons": found.comparisons,
        "chosen": found.chosen,
        "chosen_reason": found.reason,
        "calibration": found.calibration.state(),
        "combined": list(found.combined),
        "warnings": found.warnings,
        "optimism": found.optimism,
        "ledger": found.ledger,
        "per_class": per_class(found.rows, found.probs),
        **_many(rows),
    }


def score_saved(
    sources: Sequence[Path], members: Sequence[str] = (), beside: Beside | None = None
) -> tuple[dict[str, Any], Predictions]:
    """Score members as they are, nothing fitted, nothing calibrated; what `threefold evaluate` prints and shows.

    Besides the scores: what a temperature would do (fitted on other rows than it is scored on), the classes of the most accurate
    member, how members differ.

    Raises:
        DataError: the predictions cannot be used, or a member is unknown.
        RunError: a run folder has no out-of-fold rows.
    """
    rows = read_sources(sources, members, beside)
    scores = []
    for name, probs in zip(rows.members, rows.probs, strict=True):
        told = {
            "name": name,
            "kind": "member",
            "rows": rows.kind,
            "protocol": rows.protocol,
            "fitted_on": "nothing",
            "apparent": rows.protocol == "taught",
        }
        scores.append(
            {
                **stats.score_table(probs, rows.labels, LEVEL, rows.groups),
                **told,
                **_top(probs, rows),
                **_warmed(probs, rows),
            }
        )
    taught = ["apparent: the teachers of a student learned from the labels of these rows"]
    best = max(range(len(scores)), key=lambda i: scores[i]["accuracy"])
    warnings = (
        []
        if rows.kind != "foreign"
        else ["predictions from elsewhere: what their models have seen is not known"]
    ) + (taught if rows.protocol == "taught" else [])
    return {
        "kind": "evaluate",
        "source": [str(s) for s in sources],
        "n": len(rows),
        "classes": list(rows.classes),
        "scores": scores,
        "chosen": None,
        "chosen_reason": "",
        "comparisons": [],
        "warnings": warnings,
        "per_class": per_class(rows, rows.probs[best]),
        "per_class_of": rows.members[best],
        "audit": audit_tree(*list_suspects(rows)),
        **_many(rows, duplicates(rows.probs) if len(rows.members) > 1 else ()),
    }, rows


def _top(probs: np.ndarray, rows: Predictions) -> dict[str, float]:
    return {"top5": stats.top_k_accuracy(probs, rows.labels, 5)} if len(rows.classes) > 5 else {}


def _warmed(probs: np.ndarray, rows: Predictions) -> dict[str, float]:
    """Log loss and calibration error after temperature scaling, each half at the temperature of the other."""
    half = np.arange(len(rows)) % 2 == 0
    if len(rows) < 4:
        return {}
    warm = np.empty(probs.shape)
    for held in (half, ~half):
        warm[held] = apply_temperature(
            probs[held], fit_temperature(probs[~held], rows.labels[~held])
        )
    return {
        "temperature": fit_temperature(probs, rows.labels),
        "calibrated_log_loss": stats.log_loss(warm, rows.labels),
        "calibrated_ece": stats.ece(warm, rows.labels),
    }


def _many(rows: Predictions, same: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
    """How members differ, which are the same, and what another one brings; nothing where there is one."""
    if len(rows.members) < 2:
        return {}
    names, found = rows.members, diversity(rows.probs, rows.labels)
    some = stratified_parts(rows.labels, parts=-(-len(rows) // CURVE)) == 0
    curve = size_curve(rows.probs[:, some], rows.labels[some])
    return {
        "diversity": {
            "members": list(names),
            "disagreement": found.disagreement.tolist(),
            "means": found.means(),
            "duplicates": [[names[i] for i in group] for group in same],
        },
        "size_curve": {
            "mean": curve.random.tolist(),
            "low": curve.low.tolist(),
            "high": curve.high.tolist(),
            "ordered": curve.ordered.tolist(),
            "order": [names[i] for i in curve.order],
            "n": int(some.sum()),
        },
    }
