"""From members' probabilities to scored ensembles and one choice, on arrays only.

Out-of-fold rows fit the ensembles and their temperatures and choose among them; what is fitted is scored on them
cross-fitted. Test rows, where there are any, are looked at once, after everything is fixed. Members and ensembles are
scored as they would be exported: calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from threefold import paired, stats
from threefold.ensemble import ENSEMBLES, Ensemble, apply_temperature, choose, cross_fit, fit_temperature, make_ensemble
from threefold.errors import RecipeError, RunError
from threefold.predictions import Predictions
from threefold.recipe import EnsembleSpec, Recipe
from threefold.selection import build_ensemble

LEVEL = 0.95
AUTO = tuple(name for name in ENSEMBLES if name != "stacked-shrunk")
"""What `auto` scores and chooses from: all but the method that fits the stacked network four times."""
Key = tuple[str, str]
"""Kind (member or ensemble) and name: a member may be called like a method."""


@dataclass
class Evaluation:
    """What a run's predictions say.

    Attributes:
        scores: one entry per member and ensemble and kind of rows (the form of results.json).
        comparisons: paired tests of every ensemble against the best single member.
        chosen, reason: the method that is exported, and why.
        ensemble, temperature: that method fitted on all out-of-fold rows, and its calibration.
        combined: the members that it was given.
        rows: the rows of the headline: test, or oof where there is no test split.
        probs: the chosen ensemble's probabilities on those rows (n, k), calibrated.
        warnings: what weakens the figures, in plain words.
    """

    scores: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    chosen: str
    reason: str
    ensemble: Ensemble
    combined: tuple[str, ...]
    temperature: float
    rows: Predictions
    probs: np.ndarray
    warnings: list[str] = field(default_factory=list)


def evaluate(oof: Predictions | None, test: Predictions | None, spec: EnsembleSpec, seed: int = 0) -> Evaluation:
    """Score members and ensembles, choose one, fit and calibrate it.

    Args:
        oof: out-of-fold predictions; None only where a paper protocol has no folds.
        test: test predictions, or None.
        spec: methods, members to combine, and which method to export.
        seed: seed of the stacked ensemble.

    Without out-of-fold rows the fitted methods can only be fitted on the test rows, as the authors did: their scores are
    then marked "fitted on the scored rows".
    """
    everyone = oof if oof is not None else test
    assert everyone is not None
    combined = spec.members or everyone.members
    fit_rows = everyone.select(combined)
    methods: tuple[str, ...] = spec.methods if spec.export in ("auto", *spec.methods) else (*spec.methods, spec.export)
    make = {name: partial(build_ensemble, name, spec, seed) for name in methods}
    crossed = {name: _crossed(make[name], fit_rows) for name in methods}
    chosen, reason = choose(crossed, fit_rows.labels) if spec.export == "auto" else (spec.export, "named by the recipe")
    fitted = {name: make[name]().fit(fit_rows.probs, fit_rows.labels) for name in methods}
    raw = {**_singles(everyone), **_ensembles(crossed)}
    temperatures = {key: fit_temperature(probs, fit_rows.labels) for key, probs in raw.items()}
    tables = []
    if oof is not None:
        tables.append((oof, {key: _calibrated(probs, oof) for key, probs in raw.items()}, "oof rows, cross-fitted"))
    if test is not None:
        picked = test.select(combined).probs
        answers = _ensembles({name: ensemble.predict_proba(picked) for name, ensemble in fitted.items()})
        warm = {k: apply_temperature(probs, temperatures[k]) for k, probs in {**_singles(test), **answers}.items()}
        tables.append((test, warm, "oof rows" if oof is not None else "the scored rows"))
    scores = [entry for rows, table, fitted_on in tables for entry in _scores(rows, table, fitted, fitted_on)]
    rows, table, _ = tables[-1]
    key = ("ensemble", chosen)
    probs, temperature = table[key].astype(np.float32), temperatures[key]
    comparisons, warnings = _comparisons(rows, table, combined), _warnings(oof, test)
    return Evaluation(scores, comparisons, chosen, reason, fitted[chosen], combined, temperature, rows, probs, warnings)


def _singles(rows: Predictions) -> dict[Key, np.ndarray]:
    """Each member by itself."""
    return {("member", name): probs for name, probs in zip(rows.members, rows.probs, strict=True)}


def _ensembles(table: dict[str, np.ndarray]) -> dict[Key, np.ndarray]:
    return {("ensemble", name): probs for name, probs in table.items()}


def _crossed(make: Callable[[], Ensemble], rows: Predictions) -> np.ndarray:
    """Probabilities of a method where no row was predicted by an ensemble fitted on it."""
    return cross_fit(make, rows.probs, rows.labels, folds=_usable_folds(rows), groups=rows.groups)


class _Temperature:
    """Calibration in the grammar of an ensemble of one member, so that it is cross-fitted by the same function."""

    def fit(self, probs: np.ndarray, labels: np.ndarray) -> _Temperature:
        self.temperature_ = fit_temperature(probs[0], labels)
        return self

    def predict_proba(self, probs: np.ndarray) -> np.ndarray:
        return apply_temperature(probs[0], self.temperature_)


def _calibrated(probs: np.ndarray, rows: Predictions) -> np.ndarray:
    """Out-of-fold probabilities (n, k) at a temperature that was fitted on other rows."""
    return cross_fit(_Temperature, probs[None], rows.labels, folds=_usable_folds(rows), groups=rows.groups)  # type: ignore[arg-type]


def _usable_folds(rows: Predictions) -> np.ndarray | None:
    """The run's own folds where there are at least two of them."""
    return rows.folds if rows.folds is not None and len(np.unique(rows.folds)) > 1 else None


def _scores(
    rows: Predictions, table: dict[Key, np.ndarray], fitted: dict[str, Ensemble], fitted_on: str
) -> list[dict[str, Any]]:
    """The entries of results.json for one kind of rows."""
    entries = []
    for (kind, name), probs in table.items():
        needs_fit = kind == "ensemble" and fitted[name].needs_fit
        entries.append({
            **stats.score_table(probs, rows.labels, level=LEVEL), "name": name, "kind": kind,
            "rows": rows.kind, "protocol": rows.protocol, "fitted_on": fitted_on if needs_fit else "temperature only",
        })  # fmt: skip
    return entries


def _comparisons(rows: Predictions, table: dict[Key, np.ndarray], combined: Sequence[str]) -> list[dict[str, Any]]:
    """What combines members against the best of them on the same rows, exact McNemar with Holm's correction."""
    hits = {name: probs.argmax(1) == rows.labels for name, probs in zip(rows.members, rows.probs, strict=True)}
    best = max(combined, key=lambda name: hits[name].mean())
    contenders = {n: probs for (kind, n), probs in table.items() if kind == "ensemble" or n not in combined}
    found = [paired.mcnemar_exact(probs.argmax(1) == rows.labels, hits[best]) for probs in contenders.values()]
    adjusted = paired.holm([p for _, _, p in found])
    return [
        {"a": name, "b": best, "rows": rows.kind, "only_a": a, "only_b": b, "p": float(p),
         "verdict": paired.verdict(name, best, a, b, float(p))}
        for name, (a, b, _), p in zip(contenders, found, adjusted, strict=True)
    ]  # fmt: skip


def _warnings(oof: Predictions | None, test: Predictions | None) -> list[str]:
    warnings = []
    if (test if test is not None else oof).protocol == "paper":  # type: ignore[union-attr]
        warnings.append(
            "selected on the scored rows: under the paper protocol checkpoints are chosen on the rows that are scored, so the figures are optimistic"
        )
    if oof is None:
        warnings.append("no out-of-fold rows: fitted ensembles and the choice among them have seen the scored rows")
    return warnings


def per_class(rows: Predictions, probs: np.ndarray) -> list[dict[str, Any]]:
    """Recall and precision of each class with intervals, for results.json."""
    return [dict(entry) for entry in stats.per_class(probs, rows.labels, rows.classes, level=LEVEL)]


def saved_predictions(run: Path) -> tuple[Predictions | None, Predictions | None]:
    """A run folder's out-of-fold and test predictions, None where it has none."""
    oof, test = (Predictions.load(p) if (p := run / f"{kind}.npz").exists() else None for kind in ("oof", "test"))
    return oof, test


def check_method(method: str) -> str:
    """The method, if there is one of that name.

    Raises:
        RecipeError: there is none; the message names the nearest.
    """
    make_ensemble(method)
    return method


def evaluate_saved(source: Path, methods: Sequence[str], members: Sequence[str] = (), top: int = 0) -> Evaluation:
    """Combine and score saved predictions.

    Args:
        source: a run folder, or an .npz with probs (m, n, k) and labels (n,).
        methods: names of ENSEMBLES; `auto` = those of AUTO, and a choice among them.
        members: the members to use; empty = all, in a run those that its recipe combines.
        top: combine only that many, the most accurate of the fitting rows; 0 = all.

    Raises:
        DataError: the predictions cannot be used, or a member is unknown.
        RecipeError: a method is unknown, or there are fewer members than `top`.
        RunError: the run folder has no predictions yet.
    """
    auto = "auto" in methods
    names = AUTO if auto else tuple(check_method(m) for m in methods)
    changes: dict[str, Any] = {"methods": names, "export": "auto" if auto or len(names) > 1 else names[0], "top": top}
    if not source.is_dir():
        foreign = _picked(Predictions.load(source), members)
        return evaluate(foreign, None, _checked_top(EnsembleSpec.model_validate(changes), foreign))
    oof, test = saved_predictions(source)
    rows = oof if oof is not None else test
    if rows is None:
        raise RunError("no predictions", where=source, expected="oof.npz or test.npz", fix="give a finished run folder")
    recipe = Recipe.load(source / "recipe.toml")
    if members:
        oof, test = (_picked(part, members) if part is not None else None for part in (oof, test))
    else:
        changes["members"] = recipe.combined
    spec = EnsembleSpec.model_validate(
        {**recipe.ensemble.model_dump(), **changes, **({} if top else {"top": recipe.ensemble.top})}
    )
    return evaluate(oof, test, _checked_top(spec, rows), recipe.seed)


def _checked_top(spec: EnsembleSpec, rows: Predictions) -> EnsembleSpec:
    count = len(spec.members or rows.members)
    if spec.top > count:
        raise RecipeError(
            "more members to select than there are", where="top", expected=f"at most {count}", got=spec.top
        )
    return spec


def _picked(rows: Predictions, members: Sequence[str]) -> Predictions:
    return rows.select(members) if members else rows
