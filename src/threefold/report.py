"""The report: run folders in, one self-contained HTML page out.

It reads files and never recomputes a score: every figure with an interval comes from `results.json`. Only the
confusion matrix, the mistakes and the reliability curve are drawn from the chosen ensemble's probabilities. The page
needs no network, no script and no other file; colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.exceptions import UndefinedError
from markupsafe import Markup
from PIL import Image

from threefold import charts, stats
from threefold.errors import RunError
from threefold.files import read_arrays, read_json, write_bytes
from threefold.recipe import Recipe

_NEEDED = ("recipe.toml", "run.json", "results.json", "chosen.npz")
_MATRIX_CLASSES = 30  # a larger matrix cannot be read; the list of confused pairs can
_PAIRS = 10
_GALLERY = 24
_PREVIEW = 16
_THUMB_SIDE = 160
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
    target = Path(out) if out else (runs[0].path if len(runs) == 1 else runs[0].path.parent) / "report.html"
    write_bytes(target, _render(runs).encode())
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
    images: dict[str, _Array]
    preview: _Array | None
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
    if chosen["probs"].shape != expected or not len(chosen["labels"]) == len(chosen["ids"]) == expected[0]:
        got = f"probs {chosen['probs'].shape}, {len(chosen['labels'])} labels, {len(chosen['ids'])} ids"
        where = f"{path / 'chosen.npz'} and results.json"
        raise RunError("two files of the run do not belong together", where=where, expected=expected, got=got)
    thumbs = read_arrays(path / "thumbs.npz") if (path / "thumbs.npz").is_file() else {}
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
        images=dict(zip(map(str, thumbs.get("ids", ())), thumbs.get("images", ()), strict=True)),
        preview=thumbs.get("preview"),
        histories={
            (file.parts[-4], file.parts[-3], file.parts[-2]): read_json(file)
            for file in sorted(path.glob("jobs/*/*/*/history.json"))
        },
    )


def _arrays(path: Path, *needed: str) -> dict[str, _Array]:
    arrays = read_arrays(path)
    if not arrays.keys() >= set(needed):
        raise RunError("arrays are missing", where=path, expected=", ".join(needed), got=", ".join(arrays))
    return arrays


def _chosen_score(results: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The headline: the chosen ensemble's score on the test rows, else on the out-of-fold rows."""
    try:
        scores: list[dict[str, Any]] = results["scores"]
        mine = {s["rows"]: s for s in scores if s["kind"] == "ensemble" and s["name"] == results["chosen"]}
    except KeyError as error:
        raise RunError("results.json lacks a key", where=path / "results.json", expected=error) from None
    if not mine:
        raise RunError("results.json has no score", where=path, expected=f"an ensemble named {results['chosen']}")
    score = mine.get("test") or mine["oof"]
    if score["rows"] == "oof" and score["fitted_on"] == "oof rows":
        raise RunError(
            "the chosen ensemble was fitted on the rows that it is scored on",
            where=path / "results.json",
            expected="oof rows, cross-fitted",
            got=score["fitted_on"],
        )
    return score


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("threefold", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, number=_number, duration=_duration)
    return environment


def _render(runs: Sequence[_Run]) -> str:
    try:
        page = _environment().get_template("report.html.j2").render(runs=[_view(run) for run in runs])
    except (UndefinedError, KeyError) as error:
        where = ", ".join(str(run.path) for run in runs)
        raise RunError("results.json or a history.json lacks a key", where=where, expected=error) from None
    return page


def _view(run: _Run) -> dict[str, Any]:
    """What the template shows of one run; nothing in it is a score of our own making."""
    matrix = stats.confusion_matrix(run.probs, run.labels)
    tallied = [s["name"] for s in run.results["scores"] if s["kind"] == "ensemble" and s["rows"] == run.score["rows"]]
    scores = sorted(run.results["scores"], key=lambda s: (s["kind"], s["rows"] != run.score["rows"], -s["accuracy"]))
    model = run.path / "model.onnx"
    return {
        "run": run,
        "name": run.recipe.name,
        "recipe": run.recipe,
        "results": run.results,
        "per_class": sorted(run.results["per_class"], key=lambda c: 2.0 if c["recall"] is None else c["recall"]),
        "info": run.info,
        "facts": _facts(run),
        "score": run.score,
        "scores": scores,
        "digits": 1 if run.score["n"] <= 2000 else 2,  # one image in a thousand is 0.1 %
        "chosen_on_rows": run.score["rows"] == "oof" and run.recipe.ensemble.export == "auto" and len(set(tallied)) > 1,
        "model_bytes": model.stat().st_size if model.is_file() else None,
        "dots": charts.score_dots(scores),
        "matrix": matrix if len(matrix) <= _MATRIX_CLASSES else None,
        "worst_share": float(_off_diagonal(_row_shares(matrix)).max()),
        "shares": _row_shares(matrix),
        "pairs": _confused_pairs(matrix, run.results["classes"]),
        "mistakes": _mistakes(run),
        "wrong": int((run.probs.argmax(axis=1) != run.labels).sum()),
        "curves": _learning_curves(run),
        "gates": [(*key, history) for key, history in run.histories.items()],
        "reliability": charts.reliability(run.probs, run.labels, run.score["level"]),
        "preview": [] if run.preview is None else [_data_uri(image) for image in run.preview[:_PREVIEW]],
    }


def _facts(run: _Run) -> list[tuple[str, str]]:
    """Name and value of what identifies the run: when, where, with what, how long."""
    info, results = run.info, run.results
    seconds = results["seconds"]
    facts = {
        "created": results["created"],
        "time": ", ".join(f"{part} {_duration(value)}" for part, value in seconds.items()),
        "hardware": f"{results['hardware']}, {results['threads']} threads",
        "images": f"{_number(info['n_train'])} to train, {_number(info['n_test'])} to test",
        "versions": ", ".join(f"{package} {version}" for package, version in info["versions"].items()),
        "commit": results["commit"],
        "recipe digest": info["digest"],
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _row_shares(matrix: _Array) -> _Array:
    return np.asarray(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))


def _off_diagonal(matrix: _Array) -> _Array:
    return np.asarray(np.where(np.eye(len(matrix), dtype=bool), 0, matrix))


def _confused_pairs(matrix: _Array, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent (true, answer) pairs, each with its count and its share of the true class."""
    wrong, shares = _off_diagonal(matrix), _row_shares(matrix)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    cells = [divmod(int(cell), len(classes)) for cell in order]
    return [
        {"true": classes[i], "answer": classes[j], "count": int(wrong[i, j]), "share": float(shares[i, j])}
        for i, j in cells
        if wrong[i, j] > 0
    ]


def _mistakes(run: _Run) -> list[dict[str, Any]]:
    """The wrong answers given with the highest confidence, with their image where the run kept it."""
    answers, confidence = run.probs.argmax(axis=1), run.probs.max(axis=1)
    wrong = np.flatnonzero(answers != run.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:_GALLERY]
    classes = run.results["classes"]
    return [
        {
            "id": run.ids[row],
            "true": classes[run.labels[row]],
            "answer": classes[answers[row]],
            "confidence": float(confidence[row]),
            "image": _data_uri(run.images[run.ids[row]]) if run.ids[row] in run.images else None,
        }
        for row in worst.tolist()
    ]


def _data_uri(pixels: _Array) -> str:
    """An image (h, w, 3) as a data URI: small ones exactly, large ones reduced, so that the page stays light."""
    image = Image.fromarray(pixels)
    exact = max(image.size) <= 64
    image.thumbnail((_THUMB_SIDE, _THUMB_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG" if exact else "JPEG", **({"optimize": True} if exact else {"quality": 85}))
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _learning_curves(run: _Run) -> list[tuple[str, Markup]]:
    """A chart for each member that has a history, all on the same accuracy axis."""
    reached = [epoch["select_accuracy"] for history in run.histories.values() for epoch in history["epochs"]]
    if not reached:
        return []
    margin = 0.05 * (max(reached) - min(reached)) or 0.01
    limits = (min(reached) - margin, max(reached) + margin)
    curves = []
    for member in run.recipe.members:
        stages = [
            [history for (name, _, part), history in run.histories.items() if (name, part) == (member.name, stage.name)]
            for stage in run.recipe.stages
        ]
        if any(stages):
            curves.append((member.name, charts.learning_curve(member.name, stages, limits)))
    return curves


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * float(value):.{digits}f}\u00a0%"


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{float(value):,.{digits}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
