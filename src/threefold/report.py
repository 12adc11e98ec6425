"""The report: run folders in, one self-contained HTML page out.

It reads files and never recomputes a score: every figure with an interval comes from `results.json`; `reportview.py` says what is
drawn from the chosen ensemble's probabilities. The page needs no network, no script and no other file; colours follow
the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from threefold import charts
from threefold.errors import RunError
from threefold.files import read_arrays, read_json, write_bytes
from threefold.pictures import Thumbs, data_uri, heat_uri
from threefold.recipe import Recipe
from threefold.render import duration, number, render
from threefold.reportview import shared_view

GALLERY = 24
"""Most confident mistakes on the page."""

PREVIEW = 16
"""Augmented training images on the page."""

_NEEDED = ("recipe.toml", "run.json", "results.json", "chosen.npz")
_Array = np.ndarray[Any, Any]
_History = dict[str, Any]


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one HTML page about one or several complete runs.

    Args:
        run_dirs: run folders, shown in this order; several get a table on top that sets them side by side.
        out: file to write; default `report.html` in the run folder, or beside the first of several.

    Returns:
        The file written.

    Raises:
        RunError: no run is given, or a run folder is missing, incomplete or contradicts itself.
    """
    if not run_dirs:
        raise RunError("nothing to report on", fix="give at least one run folder")
    runs = [_read_run(Path(folder)) for folder in run_dirs]
    target = (
        Path(out)
        if out
        else (runs[0].path if len(runs) == 1 else runs[0].path.parent) / "report.html"
    )
    where = ", ".join(str(run.path) for run in runs)
    write_bytes(target, render("report.html.j2", where, runs=_views(runs, where)).encode())
    return target


@dataclass(frozen=True)
class _Run:
    """Everything the page shows of one run folder, as read."""

    path: Path
    recipe: Recipe
    toml: str
    info: dict[str, Any]
    results: dict[str, Any]
    score: dict[str, Any]
    """The entry of `results["scores"]` for the chosen ensemble, on the test rows where there are any."""
    probs: _Array
    labels: _Array
    ids: tuple[str, ...]
    thumbs: Thumbs
    histories: dict[tuple[str, str, str], _History]


def _read_run(path: Path) -> _Run:
    missing = [name for name in _NEEDED if not (path / name).is_file()]
    if missing:
        recipe = path / "recipe.toml" if "recipe.toml" not in missing else "RECIPE"
        raise RunError(
            "the run is not complete" if path.is_dir() else "there is no such run folder",
            where=path,
            expected=", ".join(_NEEDED),
            got=f"no {', no '.join(missing)}",
            fix=f"go on with `threefold train {recipe} --out {path}`",
        )
    results = read_json(path / "results.json")
    chosen = _arrays(path / "chosen.npz", "probs", "labels", "ids")
    score = _chosen_score(results, path)
    expected = (score["n"], len(results["classes"]))
    if (
        chosen["probs"].shape != expected
        or not len(chosen["labels"]) == len(chosen["ids"]) == expected[0]
    ):
        got = f"probs {chosen['probs'].shape}, {len(chosen['labels'])} labels, {len(chosen['ids'])} ids"
        where = f"{path / 'chosen.npz'} and results.json"
        raise RunError(
            "two files of the run do not belong together", where=where, expected=expected, got=got
        )
    return _Run(
        path=path,
        recipe=Recipe.load(path / "recipe.toml"),
        toml=(path / "recipe.toml").read_text(encoding="utf-8"),
        info=read_json(path / "run.json"),
        results=results,
        score=score,
        probs=chosen["probs"],
        labels=chosen["labels"],
        ids=tuple(map(str, chosen["ids"])),
        thumbs=Thumbs.read(path / "thumbs.npz"),
        histories={
            (file.parts[-4], file.parts[-3], file.parts[-2]): read_json(file)
            for file in sorted(path.glob("jobs/*/*/*/history.json"))
        },
    )


def _arrays(path: Path, *needed: str) -> dict[str, _Array]:
    arrays = read_arrays(path)
    if not arrays.keys() >= set(needed):
        raise RunError(
            "arrays are missing", where=path, expected=", ".join(needed), got=", ".join(arrays)
        )
    return arrays


def _chosen_score(results: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The headline: the chosen ensemble's score on the test rows, else on the out-of-fold rows."""
    try:
        scores: list[dict[str, Any]] = results["scores"]
        mine = {
            s["rows"]: s
            for s in scores
            if s["kind"] == "ensemble" and s["name"] == results["chosen"]
        }
    except KeyError as error:
        raise RunError(
            "results.json lacks a key", where=path / "results.json", expected=error
        ) from None
    if not mine:
        raise RunError(
            "results.json has no score",
            where=path,
            expected=f"an ensemble named {results['chosen']}",
        )
    score = mine.get("test") or mine["oof"]
    if score["rows"] == "oof" and score["fitted_on"] == "oof rows":
        raise RunError(
            "the chosen ensemble was fitted on the rows that it is scored on",
            where=path / "results.json",
            expected="oof rows, cross-fitted",
            got=score["fitted_on"],
        )
    return score


def _views(runs: Sequence[_Run], where: str) -> list[dict[str, Any]]:
    try:
        return [_view(run) for run in runs]
    except KeyError as error:
        raise RunError(
            "results.json or a history.json lacks a key", where=where, expected=error
        ) from None


def _view(run: _Run) -> dict[str, Any]:
    """What the template shows of one run; nothing in it is a score of our own making."""
    results, score, model = run.results, run.score, run.path / "model.onnx"
    rivals = {
        s["name"]
        for s in results["scores"]
        if s["kind"] == "ensemble" and s["rows"] == score["rows"]
    }
    return {
        **shared_view(results, score, run.probs, run.labels, run.thumbs),
        "run": run,
        "name": run.recipe.name,
        "recipe": run.recipe,
        "results": results,
        "info": run.info,
        "facts": _facts(run),
        "chosen_on_rows": score["rows"] == "oof"
        and run.recipe.ensemble.export == "auto"
        and len(rivals) > 1,
        "model_bytes": model.stat().st_size if model.is_file() else None,
        "mistakes": _mistakes(run),
        "heated": bool(run.thumbs.cams),
        "wrong": int((run.probs.argmax(axis=1) != run.labels).sum()),
        "curves": _learning_curves(run),
        "gates": [(*key, history) for key, history in run.histories.items()],
        "preview": []
        if run.thumbs.preview is None
        else [data_uri(image) for image in run.thumbs.preview[:PREVIEW]],
    }


def _facts(run: _Run) -> list[tuple[str, str]]:
    """Name and value of what identifies the run: when, where, with what, how long."""
    info, results = run.info, run.results
    seconds = results["seconds"]
    facts = {
        "created": results["created"],
        "time": ", ".join(f"{part} {duration(value)}" for part, value in seconds.items()),
        "hardware": f"{results['hardware']}, {results['threads']} threads",
        "images": f"{number(info['n_train'])} to train, {number(info['n_test'])} to test",
        "versions": ", ".join(
            f"{package} {version}" for package, version in info["versions"].items()
        ),
        "commit": results["commit"],
        "recipe digest": info["digest"],
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _mistakes(run: _Run) -> list[dict[str, Any]]:
    """The wrong answers given with the highest confidence, with their image and heat where the run kept them."""
    answers, confidence = run.probs.argmax(axis=1), run.probs.max(axis=1)
    wrong = np.flatnonzero(answers != run.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:GALLERY]
    classes, images, cams = run.results["classes"], run.thumbs.images, run.thumbs.cams
    return [
        {
            "id": name,
            "true": classes[run.labels[row]],
            "answer": classes[answers[row]],
            "confidence": float(confidence[row]),
            "image": data_uri(images[name]) if name in images else None,
            "heat": heat_uri(cams[name]) if name in images and name in cams else None,
        }
        for row, name in ((row, run.ids[row]) for row in worst.tolist())
    ]


def _learning_curves(run: _Run) -> list[tuple[str, Markup]]:
    """A chart for each member that has a history, all on the same accuracy axis."""
    reached = [
        epoch["select_accuracy"]
        for history in run.histories.values()
        for epoch in history["epochs"]
    ]
    if not reached:
        return []
    margin = 0.05 * (max(reached) - min(reached)) or 0.01
    limits = (min(reached) - margin, max(reached) + margin)
    curves = []
    for member in run.recipe.members:
        stages = [
            [
                history
                for (name, _, part), history in run.histories.items()
                if (name, part) == (member.name, stage.name)
            ]
            for stage in run.recipe.stages
        ]
        if any(stages):
            curves.append((member.name, charts.learning_curve(member.name, stages, limits)))
    return curves
