"""From members' probabilities of several labels per image to scored answers and one choice.

The way to combine, the calibration and the thresholds are fitted on out-of-fold rows and scored on
them cross-fitted. Test rows, if there are any, are used once, after everything is fixed. A ledger
records every fit and refuses rows on both sides of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from threefold.ensembles.cross_fit import side_by_side
from threefold.ensembles.multilabel import (
    METHODS,
    ChosenWeights,
    CrossFitted,
    Method,
    Metric,
    MultilabelEnsemble,
    Rows,
    choose_weights,
    cross_fit,
    cross_fit_thresholds,
    fit_chosen,
    fit_method,
    fit_weighted,
    method_weights,
    rows_of,
)
from threefold.errors import RecipeError, shorten
from threefold.predictions.ledger import Ledger
from threefold.predictions.multilabel import MultilabelPredictions
from threefold.predictions.multilabel_results import (
    EnsembleState,
    LabelScore,
    MultilabelComparison,
    MultilabelExpected,
    MultilabelOptimism,
    MultilabelScore,
)
from threefold.predictions.results_schema import LedgerLine
from threefold.stats.multilabel import macro_f1, mean_average_precision
from threefold.stats.multilabel_tables import (
    Draws,
    difference_interval,
    draw_scores,
    label_table,
    score_table,
)

CROSS_FITTED: Final = "oof, cross-fitted"
"""Name of out-of-fold rows, each answered by what was fitted on the other parts' rows."""


class Answer(NamedTuple):
    """One answer to some rows: probs (n, k), the labels (n, k) that it gives, and its draws."""

    probs: np.ndarray
    decided: np.ndarray
    draws: Draws


@dataclass(frozen=True, eq=False)
class MultilabelEvaluation:
    """Everything that `evaluate_multilabel` measures.

    Attributes:
        ensemble: of the chosen method, fitted on all out-of-fold rows.
        combined: names of the members that it combines.
        rows: the headline's rows: test where there are any, else out-of-fold.
        probs: (n, k) the chosen ensemble's calibrated answers on them, cross-fitted out of fold.
        decided: (n, k) uint8, the labels that these give.
    """

    scores: list[MultilabelScore]
    per_label: list[LabelScore]
    comparisons: list[MultilabelComparison]
    chosen: Method
    reason: str
    ensemble: MultilabelEnsemble
    combined: tuple[str, ...]
    rows: MultilabelPredictions
    probs: np.ndarray
    decided: np.ndarray
    expected: MultilabelExpected
    optimism: list[MultilabelOptimism]
    ledger: list[LedgerLine]
    warnings: list[str]

    @property
    def state(self) -> EnsembleState:
        """The fitted ensemble as it is written to results.json."""
        return EnsembleState.model_validate({"members": self.combined, **self.ensemble.as_json()})


def evaluate_multilabel(
    oof: MultilabelPredictions | None,
    test: MultilabelPredictions | None,
    *,
    members: Sequence[str] = (),
    method: Method | None = None,
    metric: Metric = "mean_average_precision",
) -> MultilabelEvaluation:
    """Score members and ensembles, choose how to combine, calibrate, and choose thresholds.

    Args:
        oof: out-of-fold predictions, or those of another program; None only if a paper protocol
            has no folds. Everything is then fitted on the test rows, and scored cross-fitted.
        test: test predictions, or None.
        members: the members to combine; empty = all.
        method: the way to combine; None = chosen.
        metric: what it is chosen by.

    Raises:
        DataError: predictions are not usable, a member is unknown, a row is in both, or there are
            too few rows to cross-fit.
    """
    everyone = oof if oof is not None else test
    assert everyone is not None
    combined = everyone.select(members or everyone.members)
    ledger = everyone.ledger()
    fits = _Fits(combined, metric, ledger)
    choice = fits.choose(method)
    ensemble = fit_weighted(fits.rows, choice.weights)
    names = _names(everyone, combined)
    crossed = fits.cross_fit_all(everyone, names)
    nested = fits.nested(method)
    tables = [(everyone, crossed, CROSS_FITTED if oof is not None else "cross-fitted")]
    if test is not None and oof is not None:
        ledger.declare_other_table(
            "way to combine, calibration, thresholds", oof.ids, test.ids, "test"
        )
        tables.append((test, fits.answer_all(test, everyone, names), "oof rows"))
    rows, answers, _ = tables[-1]
    drawn = {key: draw(rows, answer) for key, answer in answers.items()}
    scores = [
        score
        for part, given, fitted_on in tables
        for score in _score_all(part, given, fitted_on, drawn if part is rows else {})
    ]
    chosen = drawn["ensemble", choice.name]
    headline = chosen if rows is test and oof is not None else draw(rows, nested)
    return MultilabelEvaluation(
        scores=scores,
        per_label=score_labels(rows, chosen, ensemble),
        comparisons=_compare_chosen(rows, drawn, choice.name, combined.members),
        chosen=choice.name,
        reason=choice.reason,
        ensemble=ensemble,
        combined=combined.members,
        rows=rows,
        probs=chosen.probs.astype(np.float32),
        decided=chosen.decided,
        expected=_expected(rows, headline, is_nested=headline is not chosen and method is None),
        optimism=fits.optimism(ensemble, crossed["ensemble", choice.name], nested),
        ledger=ledger.table(),
        warnings=warnings_about(rows),
    )


Key = tuple[str, str]
"""Kind (member or ensemble) and name."""


def _names(everyone: MultilabelPredictions, combined: MultilabelPredictions) -> list[Key]:
    methods = METHODS if len(combined.members) > 1 else ("best",)
    return [("member", name) for name in everyone.members] + [("ensemble", m) for m in methods]


class _Fits:
    """Fits on one table of rows, each of them in the ledger."""

    def __init__(self, combined: MultilabelPredictions, metric: Metric, ledger: Ledger) -> None:
        self.combined = combined
        self.rows = rows_of(combined)
        self.metric = metric
        self.ledger = ledger

    def choose(self, method: Method | None) -> ChosenWeights:
        """Choose the way to combine, or take the one that is named."""
        if method is None or len(self.combined.members) == 1:
            return choose_weights(self.rows, self.metric)
        weights = method_weights(self.rows, method, self.metric)
        return ChosenWeights(method, weights, "named, not chosen")

    def cross_fit_all(
        self, everyone: MultilabelPredictions, keys: Sequence[Key]
    ) -> dict[Key, CrossFitted]:
        """Answer every row by members and ensembles that were fitted on other parts' rows."""
        answers = {}
        for kind, name in keys:
            if kind == "member":
                rows = self._member_rows(everyone, name)
                answers[kind, name] = self._cross_fit(rows, "calibration and thresholds", _fit_one)
            else:
                fit = partial(fit_method, method=_method(name), metric=self.metric)
                step = f"{name}: weights, calibration, thresholds"
                answers[kind, name] = self._cross_fit(self.rows, step, fit)
        return answers

    def answer_all(
        self, test: MultilabelPredictions, everyone: MultilabelPredictions, keys: Sequence[Key]
    ) -> dict[Key, CrossFitted]:
        """Answer test rows by members and ensembles that were fitted on all rows."""
        answers = {}
        for kind, name in keys:
            if kind == "member":
                ensemble = _fit_one(self._member_rows(everyone, name))
                probs = ensemble(test.select([name]).probs)
            else:
                ensemble = fit_method(self.rows, _method(name), self.metric)
                probs = ensemble(test.select(self.combined.members).probs)
            answers[kind, name] = CrossFitted(probs, ensemble.decide(probs))
        return answers

    def nested(self, method: Method | None) -> CrossFitted:
        """Answer every row by an ensemble that other parts' rows chose and fitted."""
        fit: Callable[[Rows], MultilabelEnsemble]
        if method is None:
            fit = partial(fit_chosen, metric=self.metric)
        else:
            fit = partial(fit_method, method=method, metric=self.metric)
        return self._cross_fit(self.rows, "choice of the way to combine", fit)

    def optimism(
        self, ensemble: MultilabelEnsemble, answer: CrossFitted, nested: CrossFitted
    ) -> list[MultilabelOptimism]:
        """Compare scores on the rows of a choice with those on other rows.

        Args:
            ensemble: the chosen one, fitted on all rows.
            answer: of the chosen way to combine, cross-fitted.
            nested: the answer with the choice cross-fitted, too.
        """
        targets = self.rows.targets
        own = ensemble.decide(ensemble(self.rows.probs))
        entries = [
            MultilabelOptimism(
                choice="thresholds",
                description=f"the thresholds of {targets.shape[1]} labels",
                metric="macro_f1",
                apparent=macro_f1(own, targets),
                honest=macro_f1(answer.decided, targets),
            )
        ]
        if len(self.combined.members) > 1:
            entries.append(
                MultilabelOptimism(
                    choice="method",
                    description="the way to combine",
                    metric="mean_average_precision",
                    apparent=mean_average_precision(answer.probs, targets),
                    honest=mean_average_precision(nested.probs, targets),
                )
            )
        return entries

    def _member_rows(self, everyone: MultilabelPredictions, name: str) -> Rows:
        return self.rows._replace(probs=everyone.select([name]).probs)

    def _cross_fit(
        self, rows: Rows, step: str, fit: Callable[[Rows], MultilabelEnsemble]
    ) -> CrossFitted:
        return cross_fit(rows, fit, partial(self.ledger.declare, step))


def _fit_one(rows: Rows) -> MultilabelEnsemble:
    return fit_weighted(rows, np.ones(1))


def _method(name: str) -> Method:
    return "mean" if name == "mean" else "best"


def draw(rows: MultilabelPredictions, answer: CrossFitted) -> Answer:
    """Draw the scores of an answer; draws of answers to the same rows are paired."""
    return Answer(
        answer.probs,
        answer.decided,
        draw_scores(answer.probs, answer.decided, rows.targets, rows.groups),
    )


def score_answer(
    rows: MultilabelPredictions, answer: Answer, *, name: str, kind: str, fitted_on: str
) -> MultilabelScore:
    """Score one answer.

    Args:
        rows: targets, groups, kind and protocol.
        answer: to the rows.
        name, kind: of what gave the answer.
        fitted_on: name of the rows that calibration and thresholds were fitted on.
    """
    table = score_table(answer.probs, answer.decided, rows.targets, rows.groups, draws=answer.draws)
    return MultilabelScore.model_validate(
        {
            **table,
            "name": name,
            "kind": kind,
            "rows": rows.kind,
            "protocol": rows.protocol,
            "fitted_on": fitted_on,
        }
    )


def _score_all(
    rows: MultilabelPredictions,
    answers: dict[Key, CrossFitted],
    fitted_on: str,
    drawn: dict[Key, Answer],
) -> list[MultilabelScore]:
    """Score every answer to one kind of rows; some have their draws already."""

    def score(key: Key) -> MultilabelScore:
        answer = drawn[key] if key in drawn else draw(rows, answers[key])
        return score_answer(rows, answer, kind=key[0], name=key[1], fitted_on=fitted_on)

    return side_by_side(score, answers)


def score_labels(
    rows: MultilabelPredictions, answer: Answer, ensemble: MultilabelEnsemble | None = None
) -> list[LabelScore]:
    """Score each label of one answer, with the ensemble's thresholds and calibration."""
    table = label_table(
        answer.probs,
        answer.decided,
        rows.targets,
        rows.classes,
        rows.groups,
        draws=answer.draws,
    )
    if ensemble is not None:
        for j, entry in enumerate(table):
            entry["threshold"] = float(ensemble.thresholds[j])
            entry["slope"] = float(ensemble.slope[j])
            entry["intercept"] = float(ensemble.intercept[j])
    return [LabelScore.model_validate(entry) for entry in table]


def compare_answers(
    rows: MultilabelPredictions, a: str, b: str, first: Answer, second: Answer
) -> MultilabelComparison:
    """Compare two answers by a paired bootstrap; `p` is not corrected, and there is no verdict."""
    ranked = [mean_average_precision(answer.probs, rows.targets) for answer in (first, second)]
    marks = [macro_f1(answer.decided, rows.targets) for answer in (first, second)]
    gap = first.draws.mean_average_precision - second.draws.mean_average_precision
    interval, p = difference_interval(ranked[0] - ranked[1], gap)
    f1_gap = first.draws.macro_f1 - second.draws.macro_f1
    f1_interval, f1_p = difference_interval(marks[0] - marks[1], f1_gap)
    return MultilabelComparison(
        a=a,
        b=b,
        rows=rows.kind,
        n=len(rows),
        mean_average_precision_a=ranked[0],
        mean_average_precision_b=ranked[1],
        difference=ranked[0] - ranked[1],
        interval=(interval.low, interval.high),
        p=p,
        p_alone=p,
        macro_f1_a=marks[0],
        macro_f1_b=marks[1],
        f1_difference=marks[0] - marks[1],
        f1_interval=(f1_interval.low, f1_interval.high),
        f1_p=f1_p,
        verdict="",
    )


def with_verdict(pair: MultilabelComparison, p: float) -> MultilabelComparison:
    """Return a comparison with its corrected p-value, and which of the two is better, if any."""
    low, high = pair.interval
    figures = (
        f"mean average precision {pair.difference:+.4f} [{low:+.4f}, {high:+.4f}] "
        f"(paired bootstrap, p = {p:.2g})"
    )
    if p > 0.05:
        verdict = f"no evidence of a difference: {figures}"
    else:
        better, worse = (pair.a, pair.b) if pair.difference > 0 else (pair.b, pair.a)
        verdict = f"{better} is better than {worse}: {figures}"
    return pair.replace(p=p, verdict=verdict)


def _compare_chosen(
    rows: MultilabelPredictions,
    drawn: dict[Key, Answer],
    chosen: Method,
    combined: Sequence[str],
) -> list[MultilabelComparison]:
    """Compare the chosen ensemble with the best of the members that it combines."""
    if len(combined) < 2:
        return []
    merits = {
        name: mean_average_precision(drawn["member", name].probs, rows.targets) for name in combined
    }
    best = max(combined, key=lambda name: merits[name])
    first, second = drawn["ensemble", chosen], drawn["member", best]
    pair = compare_answers(rows, chosen, best, first, second)
    return [with_verdict(pair, pair.p).replace(primary=True)]


def _expected(
    rows: MultilabelPredictions, answer: Answer, *, is_nested: bool
) -> MultilabelExpected:
    table = score_table(answer.probs, answer.decided, rows.targets, rows.groups, draws=answer.draws)
    basis = {"oof": "out-of-fold", "foreign": "given"}.get(rows.kind, rows.kind) + " images"
    if rows.kind != "test":
        found = "thresholds, a calibration and a way to combine that were found"
        if not is_nested:
            found = "thresholds and a calibration that were found"
        basis += f", each answered with {found} without it"
    names = ("mean_average_precision", "macro_f1", "subset_accuracy")
    figures = {key: table[key] for name in names for key in (name, f"{name}_interval")}
    return MultilabelExpected(**figures, n=len(rows), rows=rows.kind, basis=basis)


def as_they_are(rows: MultilabelPredictions, probs: np.ndarray) -> CrossFitted:
    """Take answers (n, k) as they are, with labels at cross-fitted thresholds.

    With too few rows to cross-fit, the thresholds are 0.5.
    """
    if len(rows) < 4:
        return CrossFitted(probs, (probs >= 0.5).astype(np.uint8))
    part = rows_of(rows).part
    return CrossFitted(probs, cross_fit_thresholds(probs, rows.targets, part))


def check_methods(methods: Sequence[str]) -> Method | None:
    """Return the one way to combine that is named; None = choose.

    Raises:
        RecipeError: a method has no meaning for several labels per image.
    """
    named = [method for method in methods if method != "auto"]
    unknown = [method for method in named if method not in METHODS]
    if unknown:
        raise RecipeError(
            "this way to combine is for one label per image",
            where=unknown[0],
            expected=f"auto, {' or '.join(METHODS)} for several labels per image",
        )
    if len(named) != 1 or "auto" in methods:
        return None
    return _method(named[0])


def warnings_about(rows: MultilabelPredictions) -> list[str]:
    """Return what weakens scores of these rows, in words."""
    warnings = []
    if rows.protocol == "paper":
        warnings.append(
            "selected on the scored rows: under the paper protocol checkpoints are chosen on the "
            "rows that are scored, so the figures are optimistic"
        )
    if rows.kind == "foreign":
        warnings.append("whether the models have seen these rows is not known")
    missing = [
        name for name, column in zip(rows.classes, rows.targets.T, strict=True) if not column.any()
    ]
    if missing:
        names = shorten(missing)
        warnings.append(f"no {rows.kind} image has the label {names}: left out of means")
    return warnings
