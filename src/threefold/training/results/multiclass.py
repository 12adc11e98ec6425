"""What a finished run says: results.json, the chosen ensemble's arrays, and the pictures."""

from __future__ import annotations

from datetime import UTC, datetime

from threefold.ensembles.base import Ensemble, LinearEnsemble
from threefold.ensembles.cascade import stages_by_cost
from threefold.ensembles.registry import SelectedEnsemble
from threefold.evaluation.cascade_savings import fit_savings
from threefold.evaluation.evaluate import Evaluation, evaluate
from threefold.evaluation.scoring import per_class
from threefold.evaluation.uncertainty import fit_uncertainty
from threefold.models.heads import describe
from threefold.models.member import describe_joint
from threefold.predictions.records import VERSION
from threefold.predictions.results_schema import (
    CalibrationState,
    CascadeResult,
    Conformal,
    MemberRow,
    Results,
    Score,
)
from threefold.recipe.schema import MemberSpec
from threefold.training.distillation import Distillation, distillation_results
from threefold.training.left_out import left_out_notes
from threefold.training.pseudo_labels import pseudo_label_counts, pseudo_label_ledger
from threefold.training.results.costs import RunCosts
from threefold.training.results.diagnostics import DataDiagnostics, audit_run, make_thumbnails
from threefold.training.results.out_of_fold import choices_optimism
from threefold.training.run import Run
from threefold.training.stages.recovery import recovery_notes
from threefold.training.steps.memory import memory_notes


def evaluate_run(run: Run, *, test_stays_sealed: bool = False) -> Evaluation:
    """Score and choose ensembles on a run's predictions.

    Args:
        run: a run whose jobs are done.
        test_stays_sealed: score on out-of-fold rows only; otherwise this opens the test rows.
    """
    spec = run.recipe.ensemble.model_copy(update={"members": run.recipe.combined})
    test = None if test_stays_sealed else run.folder.all_test
    if test is not None:
        run.folder.open_test("train", len(test))
        distillation = Distillation.from_run(run)
        if distillation is not None:
            distillation.teacher.folder.open_test("distill", len(test))
    return evaluate(run.folder.oof, test, spec, run.recipe.seed, run.recipe.train.metric)


def write_results(
    run: Run,
    evaluation: Evaluation,
    diagnostics: DataDiagnostics,
    seconds: dict[str, float],
    pending: tuple[str, ...] = (),
) -> None:
    """Write results.json, ensemble.npz, chosen.npz, suspects.csv and thumbs.npz.

    Args:
        run: a run whose jobs are done.
        evaluation: what `evaluate_run` returned.
        diagnostics: what `train_members` returned.
        seconds: duration of the steps so far.
        pending: members of the recipe that are still to be trained.
    """
    info, ensemble = run.folder.info, evaluation.ensemble
    seen = {} if ensemble.seen_ is None else {"seen": ensemble.seen_.keys}
    run.folder.write_arrays("ensemble.npz", **ensemble.state(), **seen)
    run.folder.write_chosen(evaluation.rows, evaluation.probs)
    audit, suspects = audit_run(
        run, run.folder.oof, evaluation.calibration.probs, diagnostics.copies
    )
    thumbs = make_thumbnails(run, evaluation, suspects)
    run.folder.write_arrays("thumbs.npz", preview=diagnostics.augmented, **thumbs)
    costs = RunCosts(run)
    scores = _add_costs(evaluation, costs)
    distillation = distillation_results(run, scores)
    comparisons = tuple(evaluation.comparisons)
    if distillation is not None:
        comparisons = distillation.tables[0].comparisons
    results = Results(
        version=VERSION,
        name=run.recipe.name,
        protocol=run.recipe.protocol,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=info.classes,
        commit=info.commit,
        hardware=info.hardware,
        threads=info.threads,
        digest=info.digest,
        seconds=seconds,
        expected=evaluation.expected,
        scores=scores,
        comparisons=comparisons,
        chosen=evaluation.chosen,
        combined=evaluation.combined,
        chosen_reason=evaluation.reason,
        temperature=evaluation.calibration.temperature,
        calibration=CalibrationState(**evaluation.calibration.state()),
        conformal=_conformal(run, evaluation),
        cascade=_cascade(run, evaluation, costs),
        per_class=per_class(evaluation.rows, evaluation.probs),
        members=tuple(member_row(spec, costs) for spec in run.recipe.members),
        optimism=(*choices_optimism(run), *evaluation.optimism),
        ledger=(*evaluation.ledger, *pseudo_label_ledger(run)),
        pseudo_labels=pseudo_label_counts(run),
        test_opened=run.folder.test_opened(),
        pending=pending,
        audit=audit,
        notes=(
            *left_out_notes(info.left_out),
            *evaluation.warnings,
            *audit.warnings,
            *recovery_notes(run.folder.histories()),
            *memory_notes(run.folder.histories()),
            *info.notes,
        ),
    )
    if distillation is not None:
        results = results.replace(distill=distillation)
    run.folder.write_results(results)
    run.watcher.scored(results)


def _conformal(run: Run, evaluation: Evaluation) -> Conformal:
    """Measure prediction sets and the unknown threshold, on test rows where there are any."""
    rows, spec = evaluation.fit_rows, run.recipe.ensemble
    fitted = fit_uncertainty(
        evaluation.calibration.probs,
        rows.labels,
        alpha=spec.alpha,
        reject=spec.reject,
        groups=rows.groups,
        folds=rows.parts,
    )
    scored = evaluation.rows
    if scored.kind == "test":
        fitted = fitted.measure(evaluation.probs, scored.labels, "test", scored.groups)
    return Conformal(**fitted.as_dict())


def _cascade(run: Run, evaluation: Evaluation, costs: RunCosts) -> CascadeResult:
    """Measure the cascade of the chosen ensemble, or say why there is none.

    The figures are cross-fitted, and of test rows where there are any.
    """
    scored = evaluation.rows
    names = members_in_file(evaluation.ensemble, evaluation.combined)
    used = used_members(evaluation.ensemble, evaluation.combined)
    disagreement = run.recipe.ensemble.disagreement
    backbones = {costs.group(name) for name in used}
    reasons = {
        "the recipe wants none (ensemble.disagreement = 0)": not disagreement,
        "the chosen ensemble looks at one member only": len(used) < 2,
        "the members share one frozen backbone, which is nearly all of the cost": len(backbones)
        < 2,
        "members are not in every fold": any(spec.folds for spec in run.recipe.members),
        "there are no out-of-fold rows to choose its thresholds on": run.folder.oof is None,
    }
    for reason, holds in reasons.items():
        if holds:
            return CascadeResult(missing=reason)
    macs = [float(cost.macs) for cost in costs.each(names)]
    groups = [costs.group(name) for name in names]
    stages = stages_by_cost(macs, [names.index(name) for name in used], groups)
    rows = evaluation.fit_rows
    savings = fit_savings(
        rows.select(names).probs,
        rows.labels,
        evaluation.calibration.probs,
        stages,
        costs=macs,
        members=names,
        disagreement=disagreement,
        groups=rows.groups,
    )
    if scored.kind == "test":
        probs = scored.select(names).probs
        savings = savings.measure(probs, scored.labels, evaluation.probs, "test", scored.groups)
    return CascadeResult(**savings.as_dict())


def member_row(spec: MemberSpec, costs: RunCosts) -> MemberRow:
    """Describe a member and the cost of one of its networks."""
    network = costs.networks[spec.name]
    return MemberRow(
        name=spec.name,
        backbone=spec.backbone or " + ".join(spec.joins),
        img_size=spec.img_size,
        weights=spec.weights,
        head=describe_joint(spec.head, spec.joins) if spec.joins else describe(spec.head),
        parameters=network.parameters,
        macs=network.macs,
        bytes=network.bytes,
    )


def _add_costs(evaluation: Evaluation, costs: RunCosts) -> tuple[Score, ...]:
    """Add to each score what an answer to a new image costs, over all networks and views."""
    scores = []
    for score in evaluation.scores:
        names = [score.name]
        if score.kind == "ensemble":
            names = used_members(evaluation.fitted[score.name], evaluation.combined)
        cost = costs.answer(names)
        scores.append(score.replace(macs=cost.macs, parameters=cost.parameters))
    return tuple(scores)


def used_members(ensemble: Ensemble, names: tuple[str, ...]) -> list[str]:
    """Return the members that a fitted ensemble uses: those with a weight, or those selected."""
    if isinstance(ensemble, SelectedEnsemble):
        return used_members(ensemble.inner, tuple(names[i] for i in ensemble.chosen_))
    if isinstance(ensemble, LinearEnsemble):
        return [name for name, weight in zip(names, ensemble.weights_, strict=True) if weight > 0]
    return list(names)


def members_in_file(ensemble: Ensemble, names: tuple[str, ...]) -> list[str]:
    """Return the members whose networks an exported file holds: all, or those selected."""
    if isinstance(ensemble, SelectedEnsemble):
        return [names[i] for i in ensemble.chosen_]
    return list(names)
