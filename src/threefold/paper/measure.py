"""Measure the cells of an item from its finished runs: accuracies, paired tests, learning curves.

Members and methods are fixed by the item before the run, and none of the methods is fitted, so
opening the test rows chooses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from threefold.ensembles.registry import make_ensemble
from threefold.json_files import read_json
from threefold.models.views import view_counts
from threefold.paper.items import Cell, Item, ItemRun
from threefold.paper.results import CellComparison, CellResult, ItemResults, StageCurve
from threefold.paper.scales import Protocol, Scale
from threefold.predictions.records import VERSION
from threefold.stats import paired_differences, paired_tests, scores
from threefold.stats.bootstrap import LEVEL
from threefold.training.run import Run

_GROUP_MEAN_NOTE = (
    "mean over groups, each counts alike; the interval is that of all images, for other groups"
)

Runs = Mapping[str, Sequence[Run]]
"""The finished runs of each `ItemRun` by its name, one per seed."""


@dataclass(frozen=True)
class CellHits:
    """Which images a cell answers right.

    Attributes:
        correct: (s, n) booleans, a row per seed.
        ids: n ids.
        groups: n groups, or None.
        kind: oof or test.
    """

    correct: np.ndarray
    ids: tuple[str, ...]
    groups: tuple[str, ...] | None
    kind: str


def measure_item(item: Item, scale: Scale, protocol: Protocol, runs: Runs) -> ItemResults:
    """Measure every cell beside the paper's value, and run the paired tests.

    Args:
        item: the table or figure.
        scale: the scale of the runs.
        protocol: the protocol of the runs.
        runs: finished runs; at least one.
    """
    hits: dict[str, CellHits] = {}
    cells: list[CellResult] = []
    for item_run in item.runs:
        seeds = runs.get(item_run.name, ())
        for cell in item_run.cells:
            cell_hits = find_hits(seeds, cell, item_run)
            if cell_hits is not None:
                hits[cell.label] = cell_hits
            note = item.notes.get(cell.label, "")
            cells += cell_results(cell, note, cell_hits, seeds)
    first_seeds = next(iter(runs.values()))
    first = first_seeds[0].results
    seconds = sum(run.results.seconds["train"] for seeds in runs.values() for run in seeds)
    curves = item.draw == "curves"
    return ItemResults(
        version=VERSION,
        item=item.name,
        title=item.title,
        scale=scale,
        protocol=protocol,
        draw=item.draw,
        seeds=tuple(run.recipe.seed for run in first_seeds),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        trained=first.created,
        hardware=first.hardware,
        threads=first.threads,
        commit=first.commit,
        training_minutes=seconds / 60,
        cells=tuple(cells),
        comparisons=compare_cells(item.compare, hits),
        stages=tuple(c for name in runs for c in _stage_curves(item, name, runs)) if curves else (),
        notes=tuple(collect_notes(item, scale, runs)),
    )


def find_hits(runs: Sequence[Run], cell: Cell, item_run: ItemRun) -> CellHits | None:
    """Return the images that a cell answers right in the run of every seed.

    Returns:
        The hits; None if the run or its members are left out at this scale.
    """
    hits = [_hits_of_run(run, cell, item_run.ensemble) for run in runs]
    complete = [h for h in hits if h is not None]
    if not complete:
        return None
    first = complete[0]
    correct = np.stack([h.correct[0] for h in complete])
    return CellHits(correct, first.ids, first.groups, first.kind)


def _hits_of_run(run: Run, cell: Cell, ensemble: Sequence[str]) -> CellHits | None:
    """Return the hits on the test rows, or out of fold where there are none."""
    rows = run.folder.headline_rows()
    if rows.kind == "test":
        run.folder.open_test("reproduce", len(rows))
    if cell.method:
        members = [name for name in ensemble if name in rows.members]
        if len(members) < 2:
            return None
        selected = rows.select(members)
        method = make_ensemble(cell.method).fit(selected.probs, selected.labels)
        probs = method.predict_proba(selected.probs)
    elif cell.member not in rows.members:
        return None
    elif cell.ensemble_folds is not None:
        probs = mix_folds(run, cell, ensemble, rows.probs.shape[1:], rows.kind)
    else:
        probs = rows.probs[rows.members.index(cell.member)]
    correct = (probs.argmax(1) == rows.labels)[None]
    return CellHits(correct, rows.ids, rows.groups, rows.kind)


def mix_folds(
    run: Run, cell: Cell, ensemble: Sequence[str], shape: tuple[int, ...], kind: str
) -> np.ndarray:
    """Return probabilities (n, k) of an ensemble in some folds and of one member in the others.

    Source: paper, table 3. Test rows are answered by the mean over folds.
    """
    views = run.recipe.views
    chosen = run.folder.chosen_views if views.choose else None
    choice = view_counts(views).index(chosen.views) if chosen is not None else 0
    folds = [fold for fold in run.roles if fold >= 0]
    probs = np.zeros(shape)
    for fold in folds:
        names = ensemble if fold in (cell.ensemble_folds or ()) else (cell.member,)
        jobs = [run.last_job(name, fold) for name in names]
        saved = [run.folder.job_probs(job, run.roles[job.fold].score) for job in jobs]
        key = "test" if kind == "test" else "score"
        part = np.mean([arrays[key][choice] for arrays in saved], axis=0)
        if kind == "test":
            probs += part / len(folds)
        else:
            probs[run.roles[fold].score] = part
    return probs


def cell_results(
    cell: Cell, note: str, hits: CellHits | None, runs: Sequence[Run]
) -> list[CellResult]:
    """Return the results of a cell.

    Of images in groups, one result per group precedes the mean over groups, as in the paper.
    """
    result = CellResult(row=cell.row, column=cell.column, paper=cell.paper, note=note)
    if hits is None:
        return [_add_cost(result, cell, runs)]
    result = result.replace(rows=hits.kind)
    total = _add_score(result, hits.correct, hits.groups)
    if hits.groups is None:
        return [_add_cost(total, cell, runs)]
    groups = np.array(hits.groups)
    parts = [
        _add_score(
            result.replace(column=str(name), paper=None, note=""), hits.correct[:, groups == name]
        )
        for name in np.unique(groups)
    ]
    mean = float(np.mean([part.ours for part in parts]))
    return [*parts, total.replace(column="mean", ours=mean, note=note or _GROUP_MEAN_NOTE)]


def _add_score(
    result: CellResult, correct: np.ndarray, groups: Sequence[str] | None = None
) -> CellResult:
    intervals = np.array([scores.share_interval(row, groups, LEVEL) for row in correct])
    low, high = intervals.mean(0).tolist()
    return result.replace(
        ours=float(correct.mean()),
        interval=(low, high),
        n=correct.shape[1],
        per_seed=tuple(correct.mean(1).tolist()),
    )


def _add_cost(result: CellResult, cell: Cell, runs: Sequence[Run]) -> CellResult:
    """Add parameters and multiply-adds of a single member (paper, figure 4)."""
    if cell.method or cell.ensemble_folds is not None or not runs:
        return result
    for row in runs[0].results.members:
        if row.name == cell.member:
            return result.replace(
                backbone=row.backbone,
                img_size=row.img_size,
                parameters=row.parameters,
                macs=row.macs,
            )
    return result


def compare_cells(
    pairs: Sequence[tuple[str, str]], hits: Mapping[str, CellHits]
) -> tuple[CellComparison, ...]:
    """Run paired tests on the same images, under Holm's correction over the pairs.

    Args:
        pairs: labels of cells; pairs with a cell that was left out are skipped.
        hits: the hits of each measured cell, by label.
    """
    comparisons = [
        _compare(a, b, hits[a], hits[b])
        for a, b in pairs
        if a in hits and b in hits and hits[a].ids == hits[b].ids
    ]
    if not comparisons:
        return ()
    adjusted = paired_tests.holm([comparison.p for comparison in comparisons]).tolist()
    corrected = [c.replace(p_holm=p) for c, p in zip(comparisons, adjusted, strict=True)]
    return tuple(c.replace(verdict=_verdict(c)) for c in corrected)


def _compare(a: str, b: str, first: CellHits, second: CellHits) -> CellComparison:
    seeds = len(first.correct)
    if seeds > 1:
        gap = paired_tests.seeds_difference(first.correct, second.correct, first.groups, LEVEL)
        return CellComparison(
            a=a,
            b=b,
            seeds=seeds,
            test="crossed random effects over seeds and images",
            difference=gap.estimate,
            interval=(gap.low, gap.high),
            p=gap.p,
            per_seed=gap.per_seed,
        )
    correct_a, correct_b = first.correct[0], second.correct[0]
    counts = paired_tests.mcnemar_exact(correct_a, correct_b, first.groups)
    difference = paired_differences.paired_bootstrap(
        correct_a.astype(float), correct_b.astype(float), first.groups, level=LEVEL
    )
    return CellComparison(
        a=a,
        b=b,
        seeds=seeds,
        test="exact McNemar",
        difference=difference.estimate,
        interval=(difference.low, difference.high),
        p=counts.p,
        only_a=counts.only_a,
        only_b=counts.only_b,
    )


def _verdict(c: CellComparison) -> str:
    if c.only_a is not None and c.only_b is not None:
        return paired_tests.verdict(c.a, c.b, c.only_a, c.only_b, c.p_holm)
    if c.p_holm > 1 - LEVEL:
        return f"no evidence of a difference over {c.seeds} seeds, p = {c.p_holm:.2f}"
    better, worse = (c.a, c.b) if c.difference > 0 else (c.b, c.a)
    return f"{better} is better than {worse} over {c.seeds} seeds, p = {c.p_holm:.3f}"


def _stage_curves(item: Item, name: str, runs: Runs) -> list[StageCurve]:
    """Return the learning curves of the first seed of a run."""
    run = runs[name][0]
    curves = []
    for member in run.recipe.members:
        paper = item.notebook_stages.get(member.name, ())
        for number, stage in enumerate(run.recipe.stages_of(member.name)):
            jobs = [j for j in run.jobs if (j.member, j.stage) == (member.name, stage.name)]
            histories = [read_json(run.folder.job_folder(job) / "history.json") for job in jobs]
            folds = [[epoch["select_accuracy"] for epoch in h["epochs"]] for h in histories]
            length = min(map(len, folds))
            curve = StageCurve(
                run=name,
                member=member.name,
                stage=stage.name,
                number=number,
                lr=stage.lr,
                select=tuple(np.mean([fold[:length] for fold in folds], axis=0).tolist()),
                best=float(np.mean([max(fold) for fold in folds])),
                accepted=sum(bool(h["accepted"]) for h in histories),
                folds=len(histories),
                paper=paper[number] if number < len(paper) else None,
            )
            curves.append(curve)
    return curves


def collect_notes(item: Item, scale: Scale, runs: Runs) -> list[str]:
    """Return what readers must know beside the figures.

    The runs of one item differ only in their seeds, so the notes of the first stand for all; a
    pointer names the others where theirs differ.
    """
    notes = []
    if scale == "smoke":
        notes.append(
            "made-up pictures and tiny fresh networks: "
            "this shows that the path works, and nothing about the paper"
        )
    if scale == "small":
        members = [m for seeds in runs.values() for m in seeds[0].recipe.members]
        backbones = sorted({m.backbone for m in members if m.backbone})
        notes.append(
            f"small: {', '.join(backbones)} in place of the paper's networks, "
            "fewer images and epochs; not the paper's setting"
        )
    sources = {item_run.name: item_run.source for item_run in item.runs}
    run_notes: list[str] = []
    for name, seeds in runs.items():
        data = seeds[0].recipe.data
        if data.source != sources[name]:
            notes.append(f"{name}: images from {data.source} {data.root}".rstrip())
        first = seeds[0].results.notes
        run_notes += first
        others = [run for run in seeds[1:] if set(run.results.notes) - set(first)]
        if others:
            names = ", ".join(str(run.recipe.seed) for run in others)
            run_notes.append(f"{name}: other notes in results.json of seeds {names}")
    return [*notes, *sorted(set(run_notes))]
