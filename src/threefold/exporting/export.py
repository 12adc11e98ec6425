"""Export a run to one model file: the ensemble, its card, and the parity gate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from threefold.data.dataset import ImageDataset
from threefold.ensembles.calibration import Calibration, saved_calibration
from threefold.ensembles.cascade import Cascade
from threefold.ensembles.registry import restore
from threefold.errors import DamagedFileError, RunError
from threefold.evaluation.cascade_savings import cascade_card
from threefold.evaluation.saved import evaluate_saved
from threefold.evaluation.uncertainty import uncertainty_card
from threefold.exporting import targets
from threefold.exporting.ensemble import ExportedEnsemble
from threefold.exporting.multilabel import chosen_multilabel, fit_other_multilabel
from threefold.exporting.quantization import CALIBRATION_IMAGES
from threefold.files import real_path, sha256
from threefold.models.pipeline import Combiner
from threefold.predictions.export_schema import ExportReport, Latency
from threefold.predictions.results_schema import Score
from threefold.runtime.model import load
from threefold.training.features.frozen import frozen_digest
from threefold.training.run import Run
from threefold.training.run_images import image_changes

PARITY_IMAGES = {"float32": 32, "float16": 512, "bfloat16": 512, "int8": 512}
"""Images for the parity gate by precision: few show rounding, many are needed for classes."""

LATENCY_IMAGES = 8
"""Images on which the latency of the exported file is measured, once each."""

FULL_SIZE = 4
"""Images of the parity gate that are large photographs as they are; the others are made smaller."""

LARGE_PIXELS = 1_000_000
"""Pixels of a large photograph, which eager PyTorch takes a third of a second to resize."""


def export(
    run: Run,
    path: str | Path | None = None,
    method: str | None = None,
    members: Sequence[str] = (),
    precision: str = "float32",
    *,
    cascade: bool = True,
    fixed_size: bool = False,
) -> ExportReport:
    """Write a run's chosen ensemble as one file, behind the parity gate.

    Args:
        run: a finished run.
        path: the file, with one of targets.SUFFIXES (default model.onnx in the run folder).
        method: another method than the chosen one; of a run with any number of labels per image
            mean or best.
        members: other members than those that the recipe combines; a single one is exported alone.
        precision: of the members' weights: float32, float16, bfloat16, or int8, which is calibrated
            on training images.
        cascade: write the cascade of the run, if it has one, into an .onnx file.
        fixed_size: write an .onnx file for images that are resized before, which TensorRT reads.

    Returns:
        The parity report, with the path, size and latency of the file. The run keeps it, too; where
        the run cannot be written and the file is elsewhere, its watcher gets a note.

    Raises:
        ExportError: the answers differ, the kind of file or the precision is unknown, the file
            cannot be written, or no file of a fixed size can be made of the run.
        RunError: the run is not complete, or its recipe was edited since.
    """
    target = Path(path) if path is not None else run.dir / "model.onnx"
    targets.check_kind(target, precision, fixed_size)
    run.folder.check_finished()
    run.folder.check_recipe()
    start = time.monotonic()
    changes = image_changes(run, run.sources)
    if changes:
        run.watcher.note(
            f"the images have changed since the run began ({'; '.join(changes)}): the file is "
            "compared with the run on the images as they are now"
        )
    ensemble, parts = _choose_ensemble(run, target, method, members, cascade)
    train = run.sources.train
    test = None if run.folder.is_sealed else run.sources.test
    dataset = train if test is None else test
    rows = spread_rows(dataset, PARITY_IMAGES[precision])
    images = _parity_images(dataset, rows)
    calibration_images = []
    if precision == "int8":
        calibration_images = _parity_images(train, spread_rows(train, CALIBRATION_IMAGES))
    pipeline = run.pipeline(ensemble.combiner, ensemble.members)
    card = {**_run_card(run), "hashes": _hashes(run), **parts}
    with _recording(run, target):
        report = targets.export(
            pipeline,
            target,
            images,
            card,
            labels=dataset.truth[rows],
            rows="train, seen by the networks" if test is None else "test",
            precision=precision,
            calibration=calibration_images,
            cascade=_cascade_of(parts),
            fixed_size=fixed_size,
        )
    report = report.replace(path=str(target), method=parts["method"])
    if target.suffix == ".onnx":
        report = report.replace(latency=_measure_latency(target, dataset, rows))
    try:
        if test is not None:  # the gate counts correct answers
            run.folder.open_test("export", len(rows))
        run.folder.add_results("export", time.monotonic() - start, export=report)
    except RunError as error:
        if isinstance(error, DamagedFileError) or real_path(target).parent == real_path(run.dir):
            raise
        run.watcher.note(f"the run does not record this export: {error}")
    return report


def _choose_ensemble(
    run: Run, target: Path, method: str | None, members: Sequence[str], cascade: bool
) -> tuple[ExportedEnsemble, dict[str, Any]]:
    """Return the ensemble, and its part of the model card, with or without its cascade."""
    if method is not None or members:
        ensemble = fit_other_ensemble(run, method or "", members)
    else:
        ensemble = chosen_ensemble(run)
    parts = dict(ensemble.card)
    if not cascade:
        parts.pop("cascade", None)
    if "cascade" in parts and target.suffix != ".onnx":
        run.watcher.note(
            f"the cascade is left out: {target.suffix} files have none, so every member answers "
            "every image (an .onnx file has it)"
        )
    return ensemble, parts


def _cascade_of(card: Mapping[str, Any]) -> Cascade | None:
    savings = card.get("cascade")
    return None if savings is None else Cascade.from_state(savings["state"])


def _recording(run: Run, target: Path) -> AbstractContextManager[object]:
    """Record the hash of the run's own file in its manifest."""
    if real_path(target) == real_path(run.dir / "model.onnx"):
        return run.folder.recording("model.onnx")
    return nullcontext()


def spread_rows(dataset: ImageDataset, count: int) -> list[int]:
    """Return at most `count` rows of a data set, evenly spread."""
    return [int(row) for row in np.linspace(0, len(dataset) - 1, min(count, len(dataset)))]


def _measure_latency(path: Path, dataset: ImageDataset, rows: Sequence[int]) -> Latency:
    """Measure the latency of an exported file on the first rows, as they are."""
    images = [dataset.pixels(row) for row in rows[:LATENCY_IMAGES]]
    return Latency.parse(load(path).measure_latency(images, repeats=1), path)


def _parity_images(dataset: ImageDataset, rows: Sequence[int]) -> list[np.ndarray]:
    """Return images uint8 (h, w, 3); large ones after the first few are made smaller.

    So real photographs go through the whole pipeline, and the rest of them takes no minutes.
    """
    images = [dataset.pixels(row) for row in rows[:FULL_SIZE]]
    for row in rows[FULL_SIZE:]:
        pixels = dataset.pixels(row)
        height, width = pixels.shape[:2]
        factor = math.ceil(math.sqrt(height * width / LARGE_PIXELS))
        if factor > 1:
            pixels = np.asarray(Image.fromarray(pixels).reduce(factor))
        images.append(pixels)
    return images


def chosen_ensemble(run: Run) -> ExportedEnsemble:
    """Restore a run's chosen ensemble as it was fitted and scored."""
    if run.folder.is_multilabel:
        return chosen_multilabel(run)
    results = run.results
    arrays = run.folder.read_arrays("ensemble.npz")
    ensemble, names = restore(results.chosen, arrays, results.combined)
    calibration = saved_calibration(results.calibration, len(results.classes))
    card = _ensemble_card(results.chosen, calibration, results.scores)
    if results.expected is not None:  # which pays for the choice of the method, too
        card["score"] |= results.expected.model_dump(
            mode="json", include={"accuracy", "interval", "n", "rows"}
        )
    if results.conformal is not None:
        card |= uncertainty_card(results.conformal.as_json())
    if results.cascade is not None and list(results.cascade.members) == names:
        card |= cascade_card(results.cascade.as_json())
    combiner = Combiner(ensemble.to_module(), calibration.to_module())
    return ExportedEnsemble(combiner, names, card)


def fit_other_ensemble(run: Run, method: str, members: Sequence[str]) -> ExportedEnsemble:
    """Fit and score another method, or the method on other members.

    Args:
        run: a finished run.
        method: its name; empty = the mean, or the chosen way to combine any number of labels.
        members: the members to combine; empty = those of the recipe.
    """
    if run.folder.is_multilabel:
        return fit_other_multilabel(run, method or "auto", members)
    method = method or "mean"
    evaluation = evaluate_saved(run.dir, [method], members)
    ensemble, names = restore(method, evaluation.ensemble.state(), evaluation.combined)
    combiner = Combiner(ensemble.to_module(), evaluation.calibration.to_module())
    card = _ensemble_card(method, evaluation.calibration, evaluation.scores)
    return ExportedEnsemble(combiner, names, card)


def _ensemble_card(
    method: str, calibration: Calibration, scores: Sequence[Score]
) -> dict[str, Any]:
    """Return the entries of the model card about the ensemble."""
    score = next(s for s in reversed(scores) if s.name == method and s.kind == "ensemble")
    keys = {"accuracy", "interval", "level", "rows", "n", "protocol", "fitted_on"}
    return {
        "method": method,
        "temperature": calibration.temperature,
        "calibration": calibration.state(),
        "score": score.model_dump(mode="json", include=keys),
    }


def _run_card(run: Run) -> dict[str, Any]:
    """Return the entries of the model card about the run."""
    info = run.folder.info
    distillation = None if run.folder.is_multilabel else run.results.distill
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


def _hashes(run: Run) -> dict[str, Any]:
    """Return the SHA-256 of recipe, data, ensemble, weights and frozen backbones."""
    info = run.folder.info
    weights, backbones = {}, {}
    for spec in run.recipe.members:
        if run.recipe.is_frozen(spec.name):
            backbones[spec.name] = frozen_digest(run.folder, spec)
        for fold in run.final_folds:
            if fold < 0 or not spec.folds or fold in spec.folds:
                record = run.folder.job_record(run.last_job(spec.name, fold))
                weights[f"{spec.name}/{fold}"] = record.files["weights.safetensors"]
    return {
        "recipe": info.digest,
        "data": info.data,
        "ensemble": sha256(run.folder.verify("ensemble.npz")),
        "weights": weights,
        "backbones": backbones,
    }
