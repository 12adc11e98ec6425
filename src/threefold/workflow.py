"""The verbs as functions: what the command line calls and what Python users call."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from threefold import targets
from threefold.calibration import Calibration, saved_calibration
from threefold.cascade import Cascade
from threefold.datasets import ImageDataset, Sources
from threefold.ensembles__registry import restore
from threefold.errors import ExportError, RunError
from threefold.files import read_arrays, sha256
from threefold.jobs import train_members
from threefold.models__pipeline import Combiner
from threefold.plan import plan_folder
from threefold.precision import CALIBRATION_IMAGES
from threefold.predictions__results_schema import Score
from threefold.recipe import Recipe
from threefold.report__pages import write_report
from threefold.results import evaluate_run, write_results
from threefold.run import Run
from threefold.runtime import load
from threefold.saved import evaluate_saved
from threefold.savings import cascade_card
from threefold.training__watcher import Watcher
from threefold.uncertainty import uncertainty_card

PARITY_IMAGES = {"float32": 64, "float16": 512, "bfloat16": 512, "int8": 512}
"""Images that a file is compared with the pipeline on; rounding shows on few, changed classes on many."""


def train(
    recipe: Recipe,
    out: str | Path,
    watcher: Watcher | None = None,
    header: str = "",
    sources: Sources | None = None,
) -> Run:
    """Train every member in every fold, ensemble and score them; resumable, and quick when all is done.

    Args:
        recipe: what to run.
        out: the run folder; a folder of the same recipe is continued.
        watcher: told how it goes on; silent by default.
        header: comment lines for the recipe's copy in the run folder.
        sources: the recipe's images, where they have been read and verified already.

    Raises:
        ThreefoldError: bad recipe, data or folder, or another process is at work in it, each with its remedy.
    """
    run = Run.create(recipe, out, watcher, header, sources)
    if not run.folder.is_finished:
        with run.folder.locked():
            train_members(run)
            start = time.monotonic()
            evaluation = evaluate_run(run)
            scoring_seconds = time.monotonic() - start
            training_seconds = sum(run.folder.job_record(job).seconds for job in run.jobs)
            seconds = {"train": training_seconds, "ensemble": scoring_seconds}
            write_results(run, evaluation, seconds)
    return run


def export(
    run: Run,
    path: str | Path | None = None,
    method: str | None = None,
    members: Sequence[str] = (),
    precision: str = "float32",
) -> dict[str, Any]:
    """Write a run's chosen ensemble as one file, behind the parity gate.

    Args:
        run: a finished run.
        path: the file, .onnx, .pt2 or .xml (default model.onnx in the run folder).
        method: another method than the chosen one.
        members: other members than those that the recipe combines; one alone is exported as it is, by `mean`.
        precision: of the members' weights: float32, float16, bfloat16, or int8, which is calibrated on training images.

    Returns:
        The parity report, with the file's path, its size in bytes, and its latency (`runtime.Model.latency`).

    Raises:
        ExportError: the answers differ, there is no such kind of file or precision, or the file cannot be written.
        RunError: the run is not complete.
    """
    target = Path(path) if path is not None else run.dir / "model.onnx"
    targets.check_kind(target, precision)
    run.folder.check_finished()
    began = time.monotonic()
    again = method is not None or bool(members)
    combiner, names, fitted = _fit_again(run, method or "mean", members) if again else _fitted(run)
    pipeline = run.pipeline(combiner, names)
    card = {**_card(run), "hashes": _hashes(run), **fitted}
    train, test = run.sources.train, run.sources.test
    kind, dataset = ("train, seen by the networks", train) if test is None else ("test", test)
    rows = _spread(dataset, PARITY_IMAGES[precision])
    images = [dataset.pixels(row) for row in rows]
    report = targets.export(
        pipeline,
        target,
        images,
        card,
        labels=dataset.labels[rows],
        rows=kind,
        precision=precision,
        calibration=[train.pixels(row) for row in _spread(train, CALIBRATION_IMAGES)]
        if precision == "int8"
        else (),
        cascade=Cascade.from_state(fitted["cascade"]["state"]) if "cascade" in fitted else None,
    )
    if test is not None:  # the gate counts right answers
        run.folder.open_test("export", len(rows))
    report |= {"path": str(target), "method": fitted["method"]}
    if target.suffix == ".onnx":
        report |= {"latency": load(target).measure_latency(images[:16])}
    run.folder.add_results("export", time.monotonic() - began, export=report)
    return report


def _spread(dataset: ImageDataset, count: int) -> list[int]:
    """Rows of a data set, evenly spread."""
    return [int(row) for row in np.linspace(0, len(dataset) - 1, min(count, len(dataset)))]


def _hashes(run: Run) -> dict[str, Any]:
    """What the file was made of: the recipe, names and labels of the images, fitted ensemble, and every network's weights (SHA-256)."""
    info = run.folder.info
    weights = {}
    for spec in run.recipe.members:
        for fold in run.final_folds:
            if fold < 0 or not spec.folds or fold in spec.folds:
                record = run.folder.job_record(run.last_job(spec.name, fold))
                weights[f"{spec.name}/{fold}"] = record.files["weights.safetensors"]
    return {
        "recipe": info.digest,
        "data": info.data,
        "ensemble": sha256(run.dir / "ensemble.npz"),
        "weights": weights,
    }


def _fitted(run: Run) -> tuple[Combiner, list[str], dict[str, Any]]:
    """The run's chosen ensemble as it was fitted and scored, its members, and what the model card says of it."""
    results = run.results
    arrays = read_arrays(run.dir / "ensemble.npz")
    ensemble, names = restore(results.chosen, arrays, results.combined)
    calibration = saved_calibration(results.as_json(), len(results.classes))
    card = _card_of(results.chosen, calibration, results.scores)
    if results.conformal is not None:
        card |= uncertainty_card(results.conformal.as_json())
    if results.cascade is not None and list(results.cascade.members) == names:
        card |= cascade_card(results.cascade.as_json())
    return Combiner(ensemble.to_module(), calibration.to_module()), names, card


def _fit_again(
    run: Run, method: str, members: Sequence[str]
) -> tuple[Combiner, list[str], dict[str, Any]]:
    """Another method or other members, fitted and scored now."""
    found = evaluate_saved(run.dir, [method], members)
    ensemble, names = restore(method, found.ensemble.state(), found.combined)
    combiner = Combiner(ensemble.to_module(), found.calibration.to_module())
    return combiner, names, _card_of(method, found.calibration, found.scores)


def _card_of(method: str, calibration: Calibration, scores: Sequence[Score]) -> dict[str, Any]:
    score = next(s for s in reversed(scores) if s.name == method and s.kind == "ensemble")
    keys = {"accuracy", "interval", "level", "rows", "n", "protocol", "fitted_on"}
    return {
        "method": method,
        "temperature": calibration.temperature,
        "calibration": calibration.state(),
        "score": score.model_dump(mode="json", include=keys),
    }


def _card(run: Run) -> dict[str, Any]:
    """What the model card inside the file says of the run."""
    info, distillation = run.folder.info, run.results.distill
    card: dict[str, Any] = {
        "name": run.recipe.name,
        "backbones": [f"{m.backbone} + {m.head.kind}" for m in run.recipe.members],
        "digest": info.digest,
        "versions": info.versions,
        "n_train": info.n_train,
    }
    if distillation is not None:
        card["taught_by"] = distillation.teacher.name
    return card


def report(run: Run, out: Path | None = None) -> Path:
    """Write a run's report.html."""
    start = time.monotonic()
    path = write_report([run.folder], out)
    run.folder.add_results("report", time.monotonic() - start)
    return path


def fit(
    folder: str | Path,
    out: str | Path,
    *,
    budget_minutes: float = 20.0,
    members: tuple[str, ...] = (),
    overrides: tuple[str, ...] = (),
    watcher: Watcher | None = None,
) -> Run:
    """Look at a folder of images, plan, train, ensemble, export and report: everything, within a time budget.

    Args:
        folder: class folders, or train/ [val/] test/ with class folders inside.
        out: the run folder.
        budget_minutes: bound on the wall time (0 = none).
        members: timm names; by default three EfficientNet-Lite with linear, GRU and BiLSTM heads.
        overrides: `a.b=c` changes to the recipe that the plan makes.
        watcher: told how it goes on.

    Raises:
        ThreefoldError: the folder or the recipe cannot be used, with the remedy.
    """
    kept = Path(out) / "recipe.toml"
    if (
        kept.exists()
    ):  # an interrupted fit goes on with the recipe it chose, whatever the machine's speed is today
        recipe, header, sources = Recipe.load(kept), "", None
        if Recipe.load(kept, overrides) != recipe or (
            members and tuple(m.backbone for m in recipe.members) != members
        ):
            raise RunError(
                "the folder holds a run of another recipe",
                where=out,
                fix="choose another --out, or leave out --set and --members to go on",
            )
        if Path(recipe.data.root).resolve() != Path(folder).resolve():
            raise RunError(
                "the folder holds a run on other images",
                where=out,
                got=recipe.data.root,
                fix="choose another --out",
            )
    else:
        plan = plan_folder(folder, budget_minutes, members, overrides)
        recipe, header, sources = plan.recipe, plan.explain(), plan.sources
        if watcher:
            for choice in plan.choices:
                watcher.note(f"{choice.key} = {choice.value}: {choice.reason}")
    run = train(recipe, out, watcher, header, sources)
    finish(run)
    return run


def finish(run: Run) -> None:
    """Export and report a trained run, unless that is done."""
    if not (run.dir / "model.onnx").exists():
        export(run)
    report(run)


def sample_image(run: Run) -> tuple[Path, str]:
    """Write one test image of a run as a PNG file beside it; returns its path and its true class."""
    dataset = run.sources.test if run.sources.test is not None else run.sources.train
    row = len(dataset) // 3
    path = run.dir / "sample.png"
    Image.fromarray(dataset.pixels(row)).save(path)
    return path, dataset.classes[int(dataset.labels[row])]


def predict_elsewhere(model: Path, image: Path) -> str:
    """What `threefold predict` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "threefold", "predict", str(model), str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ExportError(
            "the exported file does not answer in a fresh process",
            where=model,
            got=done.stderr.strip()[-200:],
        )
    return done.stdout
