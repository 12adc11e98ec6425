"""The HTML pages: the report of run folders, and the page about saved predictions.

Every figure with an interval comes from `results.json` or the summary and is never recomputed;
`reportview.py` says what is drawn from the chosen ensemble's probabilities. A page needs no
network, no script and no other file; its colors follow the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from threefold.errors import RunError, refuse_address
from threefold.files import write_bytes
from threefold.predictions.results_schema import PredictionSummary, Score
from threefold.predictions.run_folder import ChosenAnswers, RunFolder
from threefold.recipe.recipe import Job, fold_name
from threefold.report.facts import run_facts
from threefold.report.images import Thumbs, data_uri, heat_uri
from threefold.report.multilabel_pages import write_multilabel_report
from threefold.report.render import render
from threefold.report.run_charts import chosen_score, learning_curves
from threefold.report.views import EVIDENCE, main_rows, shared_view

MISTAKES = 24
"""Largest number of mistakes on the page, the most confident ones."""

PREVIEW = 16
"""Largest number of augmented training images on the page."""

_NEEDED = ("recipe.toml", "run.json", "results.json", "chosen.npz")


def write_report(runs: Sequence[Path | RunFolder], out: Path | None = None) -> Path:
    """Write one HTML page about one or several complete runs.

    Args:
        runs: run folders, shown in this order; several get a table on top that compares them.
        out: file to write; default `report.html` in the run folder, or beside the first of several.

    Returns:
        The file written.

    Raises:
        RunError: no run is given, or a run folder is missing, incomplete or contradicts itself, or
            its recipe was edited.
    """
    if not runs:
        raise RunError("nothing to report on", fix="give at least one run folder")
    folders = [run if isinstance(run, RunFolder) else RunFolder(run) for run in runs]
    if any((f.path / "recipe.toml").is_file() and f.is_multilabel for f in folders):
        return write_multilabel_report(folders, out)
    read = [_RunPage.read(folder) for folder in folders]
    first = read[0].folder.path
    target = Path(out) if out else (first if len(read) == 1 else first.parent) / "report.html"
    where = ", ".join(str(page.folder.path) for page in read)
    views = [page.view() for page in read]
    folders[0].write_target(target, render("report.html.j2", where, runs=views).encode())
    return target


@dataclass(frozen=True)
class _RunPage:
    """Everything that the page shows of one run folder.

    Attributes:
        score: of the chosen ensemble, on the test rows where there are any.
        chosen: its answers on those rows.
    """

    folder: RunFolder
    score: Score
    chosen: ChosenAnswers
    thumbs: Thumbs
    histories: dict[Job, dict[str, Any]]

    @classmethod
    def read(cls, folder: RunFolder) -> _RunPage:
        """Read a run folder and check that its files belong together."""
        path = folder.path
        missing = [name for name in _NEEDED if not (path / name).is_file()]
        if missing:
            refuse_address(path, RunError)
            if path.is_dir() and len(missing) == len(_NEEDED):
                RunFolder.open(path)  # says that it is no run
            recipe = path / "recipe.toml" if "recipe.toml" not in missing else "RECIPE"
            raise RunError(
                "the run is not complete" if path.is_dir() else "there is no such run folder",
                where=path,
                expected=", ".join(_NEEDED),
                got=f"no {', no '.join(missing)}",
                fix=f"resume with `threefold train {recipe} --out {path}`",
            )
        folder.check_recipe()
        chosen, score = folder.chosen, chosen_score(folder)
        expected = (score.n, len(folder.results.classes))
        lengths = {len(chosen.labels), len(chosen.ids)}
        if chosen.probs.shape != expected or lengths != {score.n}:
            raise RunError(
                "two files of the run do not belong together",
                where=f"{path / 'chosen.npz'} and results.json",
                expected=expected,
                got=f"probs {chosen.probs.shape}, {len(chosen.labels)} labels, "
                f"{len(chosen.ids)} ids",
                fix=folder.rescoring(path / "chosen.npz"),
            )
        with folder.advising(path / "thumbs.npz"):
            thumbs = Thumbs.read(folder.verify("thumbs.npz"))
        return cls(folder, score, chosen, thumbs, folder.histories())

    def view(self) -> dict[str, Any]:
        """Return what the template shows; no score is computed here."""
        results, recipe, path = self.folder.results, self.folder.recipe, self.folder.path
        probs, labels, model = self.chosen.probs, self.chosen.labels, path / "model.onnx"
        ensembles = {
            s.name for s in results.scores if s.kind == "ensemble" and s.rows == self.score.rows
        }
        is_chosen_on_rows = self.score.rows == "oof" and recipe.ensemble.export == "auto"
        preview = self.thumbs.preview
        return {
            **shared_view(results, self.score, probs, labels, self.thumbs),
            "path": path,
            "toml": (path / "recipe.toml").read_text(encoding="utf-8"),
            "name": recipe.name,
            "recipe": recipe,
            "folds_reason": self.folder.folds_reason,
            "results": results,
            "info": self.folder.info,
            "facts": run_facts(self.folder),
            "chosen_on_rows": is_chosen_on_rows and len(ensembles) > 1,
            "model_bytes": model.stat().st_size if model.is_file() else None,
            "mistakes": self._mistakes(),
            "heated": bool(self.thumbs.cams),
            "wrong": int((probs.argmax(axis=1) != labels).sum()),
            "curves": learning_curves(self.folder.recipe, self.histories),
            "gates": [
                (job.member, fold_name(job.fold), job.stage, history)
                for job, history in self.histories.items()
            ],
            "preview": [] if preview is None else [data_uri(image) for image in preview[:PREVIEW]],
        }

    def _mistakes(self) -> list[dict[str, Any]]:
        """Return the most confident wrong answers, with image and heat where the run has them."""
        probs, labels = self.chosen.probs, self.chosen.labels
        answers, confidence = probs.argmax(axis=1), probs.max(axis=1)
        wrong = np.flatnonzero(answers != labels)
        worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
        classes = self.folder.results.classes
        images, cams = self.thumbs.images, self.thumbs.cams
        mistakes = []
        for row in worst.tolist():
            name = self.chosen.ids[row]
            has_heat = name in images and name in cams
            mistakes.append(
                {
                    "id": name,
                    "true": classes[labels[row]],
                    "answer": classes[answers[row]],
                    "confidence": float(confidence[row]),
                    "image": data_uri(images[name]) if name in images else None,
                    "heat": heat_uri(cams[name]) if has_heat else None,
                }
            )
        return mistakes


def write_page(
    path: Path,
    title: str,
    summary: PredictionSummary,
    probs: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Path:
    """Write one HTML page about saved predictions.

    Args:
        path: the file.
        title: its heading, such as the name of the file or the run.
        summary: what the verbs print with `--json`; sections that it lacks are left out.
        probs: (n, k) of the score that is the headline (the chosen ensemble, or else the most
            accurate), for the reliability curve and the confusion matrix; or None.
        labels: (n,), with probs.

    Returns:
        The file written.

    Raises:
        RunError: the summary has no score, or does not belong to the probabilities.
        DataError: probabilities or labels are not usable.
    """
    if not summary.scores:
        raise RunError("there is no score to show", where=title)
    score, candidates = _headline(summary)
    if score is None:
        probs = labels = None
    elif probs is not None and labels is not None:
        shape, expected = (len(probs), len(labels)), (score.n, score.n)
        if shape != expected:
            raise RunError(
                "probabilities and scores do not belong together",
                where=title,
                expected=expected,
                got=shape,
            )
    view = {
        **shared_view(summary, score, probs, labels, Thumbs()),
        "title": title,
        "kind": summary.kind,
        "source": summary.source,
        "chosen": summary.chosen,
        "reason": summary.chosen_reason,
        "candidates": candidates,
        "warnings": summary.warnings,
        "best": _best(summary) if summary.kind == "compare" else None,
    }
    write_bytes(Path(path), render("page.html.j2", title, v=view).encode())
    return Path(path)


def _headline(summary: PredictionSummary) -> tuple[Score | None, int]:
    """Return the score of the headline, and among how many it was the best (0 = it was chosen)."""
    if summary.kind == "compare":
        return None, 0
    rows = main_rows(summary.scores)
    if summary.chosen is not None:
        chosen = summary.score(summary.chosen, "ensemble", rows)
        if chosen is not None:
            return chosen, 0
    candidates = [s for s in summary.scores if s.rows == rows]
    return max(candidates, key=lambda s: s.accuracy), len(candidates) if len(candidates) > 1 else 0


def _best(summary: PredictionSummary) -> dict[str, Any]:
    """Return the most accurate contender, and those without evidence of a difference from it."""
    rows = main_rows(summary.scores)
    best = max((s for s in summary.scores if s.rows == rows), key=lambda s: s.accuracy)
    rivals = [
        c.b if c.a == best.name else c.a
        for c in summary.comparisons
        if best.name in (c.a, c.b) and c.rows == rows and c.p > EVIDENCE
    ]
    return {"score": best, "rivals": rivals}
