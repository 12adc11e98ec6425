"""From members' probabilities to scored ensembles and one choice, on arrays only.

The ensembles and their calibration are fitted on out-of-fold rows, and the method is chosen on
them; whatever is fitted is scored on them cross-fitted. Test rows, if there are any, are used once,
after everything is fixed. Members and ensembles are scored as they would be exported: calibrated. A
ledger records every fit and refuses rows on both sides of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from threefold.ensembles.base import Ensemble
from threefold.ensembles.calibration import Calibration, fit_calibration
from threefold.ensembles.cross_fit import cross_fit, side_by_side, stratified_parts
from threefold.ensembles.diversity import TOLERANCE, duplicates
from threefold.ensembles.registry import ChosenMethod, build_ensemble, choose
from threefold.evaluation.optimism import Counts, nested_choice, optimism_entry
from threefold.evaluation.scoring import Key, comparisons, score_entry
from threefold.names import count_of
from threefold.predictions.ledger import Ledger
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import (
    Comparison,
    Expected,
    LedgerLine,
    MetricScore,
    Optimism,
    Score,
)
from threefold.recipe.ensemble import EnsembleSpec
from threefold.scratch import converted
from threefold.stats.scores import bootstrap_interval, correct, share_interval
from threefold.stats.weighted_scores import COUNTED, score_value


@dataclass
class Evaluation:
    """The results of `evaluate`.

    Attributes:
        scores: one entry per member, ensemble and kind of rows.
        comparisons: paired tests against the best single member, the chosen ensemble's first.
        chosen, reason: the exported method, and why.
        ensemble, calibration: that method fitted on all out-of-fold rows, and its calibration.
        combined: names of the members it combines, without duplicates.
        rows: the rows of the headline: test, or oof if there is no test split.
        probs: (n, k) calibrated probabilities of the chosen ensemble on those rows.
        fit_rows: the rows that everything was fitted on.
        expected: the accuracy to expect on new images, net of the choice of the method.
        fitted: every method, fitted on those rows.
        optimism: one entry per choice, see `optimism.optimism_entry`.
        ledger: one line per fit, see `Ledger.table`.
        warnings: sentences about what weakens the figures.
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


class _Table(NamedTuple):
    """One kind of rows that members and ensembles are scored on.

    `fitted_on` names the rows that the ensembles were fitted on; `combined` has the same rows with
    only the members that the ensembles combine, or is None where the answers are cross-fitted.
    """

    rows: Predictions
    fitted_on: str
    combined: Predictions | None = None


class _Entry(NamedTuple):
    """A member or an ensemble: its calibration, and a score and hits (n,) for each table.

    `probs` are the calibrated probabilities (n, k) on the last table's rows, of the chosen ensemble
    only: all of them together would take many times the memory of the predictions.
    """

    calibration: Calibration
    scores: list[Score]
    hits: list[np.ndarray]
    probs: np.ndarray | None


def evaluate(
    oof: Predictions | None,
    test: Predictions | None,
    spec: EnsembleSpec,
    seed: int = 0,
    metric: str = "accuracy",
) -> Evaluation:
    """Score members and ensembles, and choose, fit and calibrate one method.

    Without out-of-fold rows the methods can only be fitted on the test rows, as the authors did;
    their scores are then marked "fitted on the scored rows".

    Args:
        oof: out-of-fold predictions; None only if a paper protocol has no folds.
        test: test predictions, or None.
        spec: methods, members to combine, calibration, and which method to export.
        seed: seed of the stacked ensemble.
        metric: what members and the method are chosen by (`train.metric`); the headline has it,
            with an interval.

    Raises:
        DataError: predictions are not usable, a row is in both, or a score would be on rows of its
            own fit.
    """
    everyone = oof if oof is not None else test
    assert everyone is not None
    fit_rows, duplicate_warnings = _without_duplicates(
        everyone.select(spec.members or everyone.members)
    )
    fits = _Fits(fit_rows, everyone.ledger(), metric)
    fits.fit_methods(spec, seed)
    choice = fits.choose(spec.export)
    tables = []
    if oof is not None:
        tables.append(_Table(oof, "oof rows, cross-fitted"))
    if test is not None:
        fitted_on = "oof rows" if oof is not None else "the scored rows"
        tables.append(_Table(test, fitted_on, test.select(fit_rows.members)))
        if oof is not None:
            fits.ledger.declare_other_table(
                "ensembles, calibration, choice of the method", oof.ids, test.ids, "test"
            )
    score = partial(fits.score, everyone, tables, spec.calibration, choice.name)
    keys: list[Key] = [("member", name) for name in everyone.members]
    keys += [("ensemble", name) for name in fits.crossed]
    entries = dict(zip(keys, side_by_side(score, keys), strict=True))
    optimism, nested = [], None
    if oof is not None:
        optimism = fits.optimism()
        if spec.export == "auto" and len(fits.crossed) > 1:
            nested = fits.nested_choice()
            optimism.append(fits.optimism_of_choice(choice.name, nested))
    headline, chosen = tables[-1].rows, entries["ensemble", choice.name]
    probs = chosen.probs
    assert probs is not None
    hits = {key: entry.hits[-1] for key, entry in entries.items()}
    return Evaluation(
        scores=[entry.scores[i] for i in range(len(tables)) for entry in entries.values()],
        comparisons=comparisons(headline, hits, fit_rows.members, choice.name),
        chosen=choice.name,
        reason=choice.reason,
        ensemble=fits.ensembles[choice.name],
        combined=fit_rows.members,
        calibration=chosen.calibration,
        rows=headline,
        probs=converted(probs, np.float32),
        fit_rows=fit_rows,
        expected=_expected(headline, probs, nested if test is None else None, metric),
        fitted=fits.ensembles,
        optimism=optimism,
        ledger=fits.ledger.table(),
        warnings=[*duplicate_warnings, *_warnings(oof, test)],
    )


class _CrossFit(NamedTuple):
    """A method's cross-fitted probabilities (n, k), and the rows each fit saw and answered."""

    probs: np.ndarray
    fits: list[tuple[np.ndarray, np.ndarray]]


class _Fits:
    """Methods fitted on the rows and cross-fitted on them, with every fit in the ledger.

    Attributes:
        ensembles: each method, fitted on all rows.
        crossed: the methods' cross-fitted probabilities (n, k).
    """

    def __init__(self, rows: Predictions, ledger: Ledger, metric: str) -> None:
        self.rows = rows
        self.metric = metric
        self.ledger = ledger
        self.ensembles: dict[str, Ensemble] = {}
        self.crossed: dict[str, np.ndarray] = {}

    @cached_property
    def parts(self) -> np.ndarray:
        """The parts of every cross-fit: the run's folds, or stratified parts."""
        rows = self.rows
        return rows.parts if rows.parts is not None else stratified_parts(rows.labels, rows.groups)

    def fit_methods(self, spec: EnsembleSpec, seed: int) -> None:
        """Fit the recipe's methods."""
        names: tuple[str, ...] = spec.methods
        if spec.export not in ("auto", *names):
            names = (*names, spec.export)
        self.fit({name: partial(build_ensemble, name, spec, seed, self.metric) for name in names})

    def fit(self, methods: Mapping[str, Callable[[], Ensemble]]) -> None:
        """Fit methods on all rows, and cross-fit them."""
        fits = side_by_side(self._fit, methods.values())
        for name, (ensemble, crossed) in zip(methods, fits, strict=True):
            for fitted_on, answered in crossed.fits:
                self.ledger.declare(f"ensemble {name}", fitted_on, answered)
            self.ensembles[name], self.crossed[name] = ensemble, crossed.probs

    def _fit(self, make: Callable[[], Ensemble]) -> tuple[Ensemble, _CrossFit]:
        rows = self.rows
        fits: list[tuple[np.ndarray, np.ndarray]] = []

        def record(fitted_on: np.ndarray, answered: np.ndarray) -> None:
            fits.append((fitted_on, answered))

        def fit_all() -> None:
            ensemble.fit(rows.probs, rows.labels, rows.ids)

        def fit_parts() -> np.ndarray:
            return cross_fit(make, rows.probs, rows.labels, self.parts, rows.groups, record)

        ensemble = make()
        tasks: tuple[Callable[[], np.ndarray | None], ...] = (fit_parts, fit_all)
        crossed, _ = side_by_side(lambda task: task(), tasks)
        assert crossed is not None
        return ensemble, _CrossFit(crossed, fits)

    def choose(self, export: str) -> ChosenMethod:
        """Choose a method by cross-fitted probabilities, unless the recipe names one."""
        if export != "auto":
            return ChosenMethod(export, "named by the recipe")
        return choose(self.crossed, self.rows.labels, self.metric)

    def nested_choice(self) -> np.ndarray:
        """Return the probabilities (n, k) of a choice that is cross-fitted, too."""
        rows = self.rows
        return nested_choice(self.crossed, rows.labels, self.parts, rows.groups, self.metric).probs

    def score(
        self,
        everyone: Predictions,
        tables: Sequence[_Table],
        calibration: str,
        chosen: str,
        key: Key,
    ) -> _Entry:
        """Calibrate a member or an ensemble, and score it on every table.

        Args:
            everyone: the fitting rows with all members.
            tables: the rows to score on.
            calibration: the calibration by name.
            chosen: the method whose probabilities are kept.
            key: what to score.
        """
        kind, name = key
        raw = self.crossed[name] if kind == "ensemble" else everyone.probs[_place(everyone, name)]
        fitted = fit_calibration(calibration, raw, self.rows.labels, self.parts, self.rows.groups)
        scores, hits = [], []
        for rows, fitted_on, combined in tables:
            if combined is None:
                probs = fitted.probs
            elif kind == "ensemble":
                probs = fitted.apply(self.ensembles[name].predict_proba(combined.probs))
            else:
                probs = fitted.apply(rows.probs[_place(rows, name)])
            scores.append(score_entry(rows, key, probs, self.ensembles, fitted_on))
            hits.append(correct(probs, rows.labels))
        if key == ("ensemble", chosen):
            return _Entry(fitted, scores, hits, probs)
        return _Entry(fitted._replace(probs=probs[:0].copy()), scores, hits, None)

    def optimism(self) -> list[Optimism]:
        """Measure the optimism of the best member and of every method that learns."""
        entries = []
        if len(self.rows.members) > 1:
            if "best" not in self.ensembles:
                best = _Fits(self.rows, self.ledger, self.metric)
                best.fit(
                    {"best": partial(build_ensemble, "best", EnsembleSpec(), metric=self.metric)}
                )
            else:
                best = self
            entries.append(
                best._optimism_of_fit(
                    "best", "member", f"the best of {count_of(len(self.rows.members), 'member')}"
                )
            )
        learned = [
            name
            for name, ensemble in self.ensembles.items()
            if ensemble.needs_fit and name != "best"
        ]
        entries += side_by_side(
            lambda name: self._optimism_of_fit(name, name, f"what {name} learns"), learned
        )
        return entries

    def optimism_of_choice(self, chosen: str, nested: np.ndarray) -> Optimism:
        """Measure the optimism of the choice of the method against a nested choice (n, k)."""
        return self._optimism(
            "method",
            f"the method, {chosen} of {len(self.crossed)}",
            (self.crossed[chosen], "cross-fitted, chosen on"),
            (nested, "cross-fitted, choice included"),
        )

    def _optimism_of_fit(self, name: str, choice: str, description: str) -> Optimism:
        return self._optimism(
            choice,
            description,
            (self.ensembles[name].predict_proba(self.rows.probs), "of the fit"),
            (self.crossed[name], "cross-fitted"),
        )

    def _optimism(
        self,
        choice: str,
        description: str,
        apparent: tuple[np.ndarray, str],
        honest: tuple[np.ndarray, str],
    ) -> Optimism:
        """Compare apparent and honest probabilities, each with the name of its rows."""
        rows = self.rows
        return optimism_entry(
            choice,
            description,
            Counts.from_hits(correct(apparent[0], rows.labels)),
            Counts.from_hits(correct(honest[0], rows.labels)),
            rows.groups,
            rows=(f"{rows.kind} rows, {apparent[1]}", f"{rows.kind} rows, {honest[1]}"),
        )


def _without_duplicates(rows: Predictions) -> tuple[Predictions, list[str]]:
    """Return the rows with duplicate members counted once, and a warning for each duplicate."""
    # A run's own members are duplicates only if they are equal: small networks that are unsure of
    # everything are close to each other anyway.
    tolerance = TOLERANCE if rows.kind == "foreign" else 1e-6
    groups = duplicates(rows.probs, tolerance) if len(rows.members) > 1 else []
    first_of = {i: group[0] for group in groups for i in group[1:]}
    names = [name for i, name in enumerate(rows.members) if i not in first_of]
    warnings = [
        f"{rows.members[i]} answers as {rows.members[first]} does; the two count once"
        for i, first in first_of.items()
    ]
    return rows.select(names), warnings


def _place(rows: Predictions, member: str) -> int:
    """Return the number of a member."""
    return rows.members.index(member)


def _expected(
    rows: Predictions, probs: np.ndarray, nested: np.ndarray | None, metric: str
) -> Expected:
    """Return the accuracy to expect on new images, from a nested choice if there is one.

    Another metric comes with it, if it is defined on the rows.
    """
    answers = probs if nested is None else nested
    hits = correct(answers, rows.labels)
    basis = {"oof": "out-of-fold", "foreign": "given"}.get(rows.kind, rows.kind) + " images"
    if nested is not None:
        basis += ", each answered by a method that was chosen without it"
    return Expected(
        accuracy=float(hits.mean()),
        interval=share_interval(hits, rows.groups),
        n=len(hits),
        rows=rows.kind,
        basis=basis,
        **_metric_score(rows, answers, metric),
    )


def _metric_score(rows: Predictions, probs: np.ndarray, metric: str) -> dict[str, MetricScore]:
    """The entry `metric` of `Expected`, unless it is the accuracy or not defined.

    Where no row is wrong, every bootstrap draw is perfect; the interval of the accuracy then takes
    the place of one without width.
    """
    if metric == "accuracy":
        return {}
    value = score_value(metric, converted(probs, np.float64), rows.labels)
    if np.isnan(value):
        return {}
    hits = correct(probs, rows.labels)
    if metric in COUNTED and hits.all():
        interval = share_interval(hits, rows.groups)
    else:
        interval = bootstrap_interval(metric, probs, rows.labels, rows.groups)
    return {"metric": MetricScore(name=metric, value=value, interval=interval)}


def _warnings(oof: Predictions | None, test: Predictions | None) -> list[str]:
    warnings = []
    scored = test if test is not None else oof
    if scored is not None and scored.protocol == "paper":
        warnings.append(
            "selected on the scored rows: under the paper protocol checkpoints are chosen on the "
            "rows that are scored, so the figures are optimistic"
        )
    if oof is not None and oof.protocol == "taught":
        warnings.append(
            "out-of-fold scores are apparent: the student's teachers learned from the labels of "
            "these rows; only test rows count"
        )
    if oof is None:
        warnings.append(
            "no out-of-fold rows: fitted ensembles and the choice among them have seen the scored "
            "rows"
        )
    return warnings
