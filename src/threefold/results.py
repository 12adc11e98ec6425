"""What a finished run says: results.json, the chosen ensemble's arrays, the pictures; and when its test rows were opened."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np

from threefold.assembly import choices_optimism
from threefold.cascade import stages_by_cost
from threefold.combiners import Ensemble, LinearEnsemble
from threefold.cost import measure_cost
from threefold.ensembles__registry import SelectedEnsemble
from threefold.evaluate import Evaluation, evaluate
from threefold.files import read_arrays, read_json, write_arrays, write_json
from threefold.heads import describe
from threefold.ledger import open_test, when_opened
from threefold.models__member import describe_joint
from threefold.recipe_schema import MemberSpec
from threefold.run import Run
from threefold.saved import saved_predictions
from threefold.savings import fit_savings
from threefold.scoring import per_class
from threefold.training__diagnostics import audit_run, make_thumbnails
from threefold.training__distillation import Distillation, distillation_results
from threefold.uncertainty import fit_uncertainty


def evaluate_run(run: Run) -> Evaluation:
    """Score and choose ensembles on a run's predictions; opens the test rows, where there are any."""
    spec = run.recipe.ensemble.model_copy(update={"members": run.recipe.combined})
    oof, test = saved_predictions(run.dir)
    if test is not None:
        open_test(run.dir, "train", len(test))
        distillation = Distillation.of(run)
        if distillation is not None:
            open_test(distillation.teacher.dir, "distill", len(test))
    return evaluate(oof, test, spec, run.recipe.seed)


def write_results(run: Run, found: Evaluation, seconds: dict[str, float]) -> None:
    """Write results.json, ensemble.npz, chosen.npz, suspects.csv and thumbs.npz."""
    info, oof = read_json(run.dir / "run.json"), saved_predictions(run.dir)[0]
    seen = {} if found.ensemble.seen_ is None else {"seen": found.ensemble.seen_.keys}
    write_arrays(run.dir / "ensemble.npz", **found.ensemble.state(), **seen)
    write_arrays(
        run.dir / "chosen.npz",
        probs=found.probs,
        labels=found.rows.labels,
        ids=np.array(found.rows.ids),
    )
    audit, suspects = audit_run(run, oof, found.calibration.probs)
    write_arrays(
        run.dir / "thumbs.npz", **{**_preview(run), **make_thumbnails(run, found, suspects)}
    )
    members = _member_table(run)
    scores = _with_costs(run, found, members)
    distillation = distillation_results(run, scores)
    write_json(
        run.dir / "results.json",
        {
            "name": run.recipe.name,
            "protocol": run.recipe.protocol,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **{key: info[key] for key in ("classes", "commit", "hardware", "threads", "digest")},
            "seconds": seconds,
            "expected": found.expected,
            "scores": scores,
            "comparisons": distillation["tables"][0]["comparisons"]
            if distillation
            else found.comparisons,
            "chosen": found.chosen,
            "combined": found.combined,
            "chosen_reason": found.reason,
            "temperature": found.calibration.temperature,
            "calibration": found.calibration.state(),
            "conformal": _uncertainty(run, found),
            "cascade": _cascade(run, found, members),
            "per_class": per_class(found.rows, found.probs),
            "members": members,
            "optimism": [*choices_optimism(run), *found.optimism],
            "ledger": found.ledger,
            "test_opened": when_opened(run.dir),
            "audit": audit,
            "notes": [*found.warnings, *audit["warnings"], *info["notes"]],
            **({"distill": distillation} if distillation else {}),
        },
    )


def _uncertainty(run: Run, found: Evaluation) -> dict[str, Any]:
    """Prediction sets and the unknown threshold of the chosen ensemble, measured on test rows where there are any."""
    rows, spec = found.fit_rows, run.recipe.ensemble
    made = fit_uncertainty(
        found.calibration.probs,
        rows.labels,
        alpha=spec.alpha,
        reject=spec.reject,
        groups=rows.groups,
        folds=rows.parts,
    )
    if found.rows.kind == "test":
        made = made.measure(found.probs, found.rows.labels, "test", found.rows.groups)
    return made.as_dict()


def _cascade(run: Run, found: Evaluation, members: list[dict[str, Any]]) -> dict[str, Any]:
    """The cascade of the chosen ensemble, measured cross-fitted and on test rows where there are any; else why there is none."""
    oof, test = saved_predictions(run.dir)
    names, used = (
        members_in_file(found.ensemble, found.combined),
        used_members(found.ensemble, found.combined),
    )
    share = run.recipe.ensemble.disagreement
    reasons = {
        "the recipe wants none (ensemble.disagreement = 0)": not share,
        "the chosen ensemble looks at one member only": len(used) < 2,
        "members are not in every fold": any(spec.folds for spec in run.recipe.members),
        "there are no out-of-fold rows to choose its thresholds on": oof is None,
    }
    for reason, holds in reasons.items():
        if holds:
            return {"missing": reason}
    one = {row["name"]: row["macs"] for row in members}
    costs = [float(one[n] * _passes(run, n)) for n in names]
    stages, rows = stages_by_cost(costs, [names.index(n) for n in used]), found.fit_rows
    made = fit_savings(
        rows.select(names).probs,
        rows.labels,
        found.calibration.probs,
        stages,
        costs=costs,
        members=names,
        disagreement=share,
        groups=rows.groups,
    )
    if test is not None:
        made = made.measure(test.select(names).probs, test.labels, found.probs, "test", test.groups)
    return made.as_dict()


def _passes(run: Run, name: str) -> int:
    """How often an image goes through a network of the member: once for each of its networks and views."""
    spec = run.recipe.member(name)
    return run.networks(spec) * max(1, run.views(spec).count)


def _preview(run: Run) -> dict[str, np.ndarray]:
    path = run.dir / "thumbs.npz"
    return (
        {name: value for name, value in read_arrays(path).items() if name == "preview"}
        if path.exists()
        else {}
    )


def _member_table(run: Run) -> list[dict[str, Any]]:
    def costs(spec: MemberSpec) -> dict[str, int]:
        return measure_cost(
            run.build(spec, len(run.sources.train.classes)), spec.img_size
        )._asdict()

    return [
        {
            "name": spec.name,
            "backbone": spec.backbone or " + ".join(spec.joins),
            "img_size": spec.img_size,
            "weights": spec.weights,
            "head": describe_joint(spec.head, spec.joins) if spec.joins else describe(spec.head),
            **costs(spec),
        }
        for spec in run.recipe.members
    ]


def _with_costs(run: Run, found: Evaluation, members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The scores, each with what an answer to a new image costs: every network that takes part, in every fold, for every view."""
    one = {row["name"]: row for row in members}
    scores = []
    for score in found.scores:
        names = _used(found, score)
        macs = sum(one[n]["macs"] * _passes(run, n) for n in names)
        parameters = sum(one[n]["parameters"] * run.networks(run.recipe.member(n)) for n in names)
        scores.append({**score, "macs": macs, "parameters": parameters})
    return scores


def _used(found: Evaluation, score: dict[str, Any]) -> list[str]:
    """Names of the members that an answer needs."""
    if score["kind"] == "member":
        return [score["name"]]
    return used_members(found.fitted[score["name"]], found.combined)


def used_members(ensemble: Ensemble, names: tuple[str, ...]) -> list[str]:
    """The members that a fitted ensemble looks at: those with a weight, or those selected."""
    if isinstance(ensemble, SelectedEnsemble):
        return used_members(ensemble.inner, tuple(names[i] for i in ensemble.chosen_))
    if isinstance(ensemble, LinearEnsemble):
        return [name for name, weight in zip(names, ensemble.weights_, strict=True) if weight > 0]
    return list(names)


def members_in_file(ensemble: Ensemble, names: tuple[str, ...]) -> list[str]:
    """The members whose networks an exported file holds: all, or those selected."""
    return (
        [names[i] for i in ensemble.chosen_]
        if isinstance(ensemble, SelectedEnsemble)
        else list(names)
    )
