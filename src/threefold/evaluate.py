"""From members' probabilities to scored ensembles and one choice, on arrays only.

Out-of-fold rows fit the ensembles and their calibration and choose among them; what is fitted is scored on them
cross-fitted. Test rows, where there are any, are looked at once, after everything is fixed. Members and ensembles are
scored as they would be exported: calibrated. A ledger notes every fit, and refuses rows on both sides of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import cast

import numpy as np

from threefold.calibration import Calibration, fit_calibration
from threefold.combiners import Ensemble
from threefold.crossfit import cross_fit, side_by_side, stratified_parts
from threefold.diversity import TOLERANCE, duplicates
from threefold.ensembles__averaging import BestEnsemble
from threefold.ensembles__registry import build_ensemble, choose
from threefold.ledger import Ledger
from threefold.optimism import Counts, nested_choice, optimism_entry
from threefold.predictions import Predictions
from threefold.predictions__results_schema import (
    Comparison,
    Expected,
    LedgerLine,
    Optimism,
    Score,
)
from threefold.recipe_schema import EnsembleSpec
from threefold.scoring import Key, comparisons, score_entries
from threefold.stats import correct, share_interval


@dataclass
class Evaluation:
    """What a run's predictions say.

    Attributes:
        scores: one entry per member and ensemble and kind of rows (the form of results.json).
        comparisons: paired tests against the best single member, that of the chosen ensemble first.
        chosen, reason: the method that is exported, and why.
        ensemble, calibration: that method fitted on all out-of-fold rows, and its calibration.
        combined: the members that it was given: those of the recipe, duplicates once.
        rows: the rows of the headline: test, or oof where there is no test split.
        probs: the chosen ensemble's probabilities on those rows (n, k), calibrated.
        fit_rows: the rows that everything was fitted on.
        fitted: every method, fitted on them.
        optimism: a line per choice, see `optimism.optimism_entry`.
        ledger: a line per fitted thing, see `Ledger.table`.
        expected: the accuracy to expect on new images, the choice of the method paid for.
        warnings: what weakens the figures, in plain words.
    """

    scores: list[Score]
    comparisons: list[Comparison]
    chosen: str
    reason: str
    ensemble: Ensemble
    combined: tuple[str, ...]
    calibration: Calibration
    rows: Predictions
    probs: np.ndarray
    fit_rows: Predictions
    expected: Expected
    fitted: dict[str, Ensemble] = field(default_factory=dict)
    optimism: list[Optimism] = field(default_factory=list)
    ledger: list[LedgerLine] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def evaluate(
    oof: Predictions | None, test: Predictions | None, spec: EnsembleSpec, seed: int = 0
) -> Evaluation:
    """Score members and ensembles, choose one, fit and calibrate it.

    Args:
        oof: out-of-fold predictions; None only where a paper protocol has no folds.
        test: test predictions, or None.
        spec: methods, members to combine, calibration, and which method to export.
        seed: seed of the stacked ensemble.

    Without out-of-fold rows the fitted methods can only be fitted on the test rows, as the authors did: their scores are
    then marked "fitted on the scored rows".

    Raises:
        DataError: predictions cannot be used, a row is in both, or a score would be on rows of its own fit.
    """
    everyone = oof if oof is not None else test
    assert everyone is not None
    fit_rows, copies = _distinct(everyone.select(spec.members or everyone.members))
    work = _Work(fit_rows, everyone.ledger(), {})
    methods: tuple[str, ...] = (
        spec.methods if spec.export in ("auto", *spec.methods) else (*spec.methods, spec.export)
    )
    work.cross({name: partial(build_ensemble, name, spec, seed) for name in methods})
    crossed = {name: table for name, (_, table) in work.fitted.items()}
    chosen, reason = (
        choose(crossed, fit_rows.labels)
        if spec.export == "auto"
        else (spec.export, "named by the recipe")
    )
    raw = {**_singles(everyone), **_ensembles(crossed)}
    warm = dict(
        zip(raw, side_by_side(partial(work.calibrate, spec.calibration), raw.values()), strict=True)
    )
    fitted = {name: ensemble for name, (ensemble, _) in work.fitted.items()}
    tables = []
    if oof is not None:
        tables.append((oof, {key: c.probs for key, c in warm.items()}, "oof rows, cross-fitted"))
    if test is not None:
        answers = _ensembles(
            {n: e.predict_proba(test.select(fit_rows.members).probs) for n, e in fitted.items()}
        )
        both = {**_singles(test), **answers}
        sealed = {key: warm[key].apply(probs) for key, probs in both.items()}
        tables.append((test, sealed, "oof rows" if oof is not None else "the scored rows"))
        if oof is not None:
            work.ledger.declare_other_table(
                "ensembles, calibration, choice of the method", oof.ids, test.ids, "test"
            )
    rows, table, _ = tables[-1]
    key: Key = ("ensemble", chosen)
    optimism = work.optimism(crossed, chosen, spec.export == "auto") if oof is not None else []
    scores = [
        score
        for part, scored, fitted_on in tables
        for score in score_entries(part, scored, fitted, fitted_on)
    ]
    return Evaluation(
        scores=scores,
        comparisons=comparisons(rows, table, fit_rows.members, chosen),
        chosen=chosen,
        reason=reason,
        ensemble=fitted[chosen],
        combined=fit_rows.members,
        calibration=warm[key],
        rows=rows,
        probs=table[key].astype(np.float32),
        fit_rows=fit_rows,
        expected=_expected(rows, table[key], work.nested if test is None else None),
        fitted=fitted,
        optimism=optimism,
        ledger=work.ledger.table(),
        warnings=[*copies, *_warnings(oof, test)],
    )


@dataclass
class _Work:
    """What is being fitted on the rows, noted in the ledger.

    `fitted` holds for each method the ensemble fitted on all rows and its cross-fitted probabilities; `nested` those (n, k) of
    the choice among the methods, made on other rows than it answers.
    """

    rows: Predictions
    ledger: Ledger
    fitted: dict[str, tuple[Ensemble, np.ndarray]]
    nested: np.ndarray | None = None

    @cached_property
    def parts(self) -> np.ndarray:
        """The parts of every cross-fit: the run's folds, or stratified ones, made once for all members."""
        rows = self.rows
        return rows.parts if rows.parts is not None else stratified_parts(rows.labels, rows.groups)

    def cross(self, methods: dict[str, Callable[[], Ensemble]]) -> None:
        """Fit methods on all rows, and cross-fit them, where they learn anything."""
        fitted = side_by_side(self._crossed, methods.values())
        for name, (ensemble, table, fits) in zip(methods, fitted, strict=True):
            self.declare(name, fits)
            self.fitted[name] = ensemble, table

    def _crossed(
        self, make: Callable[[], Ensemble]
    ) -> tuple[Ensemble, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """A method fitted on all rows, its cross-fitted probabilities, and the rows that each of its fits saw and answers."""
        rows, fits = self.rows, list[tuple[np.ndarray, np.ndarray]]()
        whole = partial(make().fit, rows.probs, rows.labels, rows.ids)
        apart = partial(
            cross_fit,
            make,
            rows.probs,
            rows.labels,
            self.parts,
            rows.groups,
            lambda *fit: fits.append(fit),
        )
        tasks: tuple[Callable[[], Ensemble | np.ndarray], ...] = whole, apart
        ensemble, table = side_by_side(lambda task: task(), tasks)
        return cast(Ensemble, ensemble), cast(np.ndarray, table), fits

    def declare(self, name: str, fits: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Note a method's fits in the ledger."""
        for saw, answers in fits:
            self.ledger.declare(f"ensemble {name}", saw, answers)

    def calibrate(self, name: str, probs: np.ndarray) -> Calibration:
        """A calibration of that name, with cross-fitted probabilities."""
        return fit_calibration(name, probs, self.rows.labels, self.parts, self.rows.groups)

    def optimism(self, crossed: dict[str, np.ndarray], chosen: str, chose: bool) -> list[Optimism]:
        """The meter's lines for what was chosen or fitted on these rows."""
        rows, lines = self.rows, []
        if len(rows.members) > 1:
            if "best" in self.fitted:
                ensemble, honest = self.fitted["best"]
            else:
                ensemble, honest, fits = self._crossed(BestEnsemble)
                self.declare("best", fits)
            told = f"the best of {len(rows.members)} members"
            lines.append(self._line("member", told, ensemble.predict_proba(rows.probs), honest))
        learned = [
            name
            for name, (ensemble, _) in self.fitted.items()
            if ensemble.needs_fit and name != "best"
        ]
        lines += side_by_side(self._learned_line, learned)
        if chose and len(crossed) > 1:
            self.nested, _ = nested_choice(crossed, rows.labels, self.parts, rows.groups)
            told = f"the method, {chosen} of {len(crossed)}"
            names = "cross-fitted, chosen on", "cross-fitted, choice included"
            lines.append(self._line("method", told, crossed[chosen], self.nested, names))
        return lines

    def _learned_line(self, name: str) -> Optimism:
        ensemble, table = self.fitted[name]
        return self._line(
            name, f"what {name} learns", ensemble.predict_proba(self.rows.probs), table
        )

    def _line(
        self,
        choice: str,
        told: str,
        apparent: np.ndarray,
        honest: np.ndarray,
        rows_names: tuple[str, str] = ("of the fit", "cross-fitted"),
    ) -> Optimism:
        rows = self.rows
        a, b = (Counts.of(correct(probs, rows.labels)) for probs in (apparent, honest))
        names = f"{rows.kind} rows, {rows_names[0]}", f"{rows.kind} rows, {rows_names[1]}"
        return optimism_entry(choice, told, a, b, rows.groups, rows=names)


def _distinct(rows: Predictions) -> tuple[Predictions, list[str]]:
    """The members with duplicates counted once, and a sentence for each that was left out."""
    # Of a run's own members only equal ones are copies: small networks that are unsure of everything are alike all the same.
    found = (
        duplicates(rows.probs, TOLERANCE if rows.kind == "foreign" else 1e-6)
        if len(rows.members) > 1
        else []
    )
    extra = {i: group[0] for group in found for i in group[1:]}
    names = [name for i, name in enumerate(rows.members) if i not in extra]
    told = [
        f"{rows.members[i]} answers as {rows.members[first]} does; the two count once"
        for i, first in extra.items()
    ]
    return rows.select(names), told


def _singles(rows: Predictions) -> dict[Key, np.ndarray]:
    """Each member by itself."""
    return {("member", name): probs for name, probs in zip(rows.members, rows.probs, strict=True)}


def _ensembles(table: dict[str, np.ndarray]) -> dict[Key, np.ndarray]:
    return {("ensemble", name): probs for name, probs in table.items()}


def _expected(rows: Predictions, probs: np.ndarray, nested: np.ndarray | None) -> Expected:
    """What to expect of new images; without test rows, the choice of the method is cross-fitted too."""
    hits = correct(probs if nested is None else nested, rows.labels)
    basis = f"{rows.kind} rows"
    if nested is not None:
        basis += ", the choice of the method cross-fitted too"
    return Expected(
        accuracy=float(hits.mean()),
        interval=share_interval(hits, rows.groups),
        n=len(hits),
        rows=rows.kind,
        basis=basis,
    )


def _warnings(oof: Predictions | None, test: Predictions | None) -> list[str]:
    warnings = []
    if (test if test is not None else oof).protocol == "paper":  # type: ignore[union-attr]
        warnings.append(
            "selected on the scored rows: under the paper protocol checkpoints are chosen on the rows that are scored, so the figures are optimistic"
        )
    if oof is not None and oof.protocol == "taught":
        warnings.append(
            "out-of-fold scores are apparent: the student's teachers learned from the labels of these rows; only test rows count"
        )
    if oof is None:
        warnings.append(
            "no out-of-fold rows: fitted ensembles and the choice among them have seen the scored rows"
        )
    return warnings
