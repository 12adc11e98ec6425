"""A run as its folder has it: scores, charts, report and exported file, without torch."""

from __future__ import annotations

import html
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from threefold.data.in_memory import store_data
from threefold.errors import MissingExtraError, RunError
from threefold.files import TemporaryFolder
from threefold.names import printable
from threefold.predictions.multilabel import MultilabelPredictions
from threefold.predictions.multilabel_results import (
    MultilabelExpected,
    MultilabelResults,
    MultilabelScore,
)
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import Expected, Results, Score
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd

    from threefold.predictions.run_check import RunCheck
    from threefold.report.chart_files import Chart
    from threefold.runtime.model import Model


class SavedRun:
    """A run as its folder has it; `threefold.open` returns one.

    A notebook shows its scores as a table.

    Args:
        folder: the files of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read an existing run folder.

        Raises:
            RunError: there is no run.
        """
        return cls(RunFolder.open(path))

    def verify(self) -> RunCheck:
        """Verify every file of the run; `threefold doctor RUN --mend` makes damaged ones again."""
        from threefold.predictions.run_check import check_run

        return check_run(self.dir)

    @property
    def dir(self) -> Path:
        """Path of the run folder."""
        return self.folder.path

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.folder.recipe

    @property
    def results(self) -> Results:
        """Everything that was measured (results.json)."""
        return self.folder.results

    @property
    def multilabel_results(self) -> MultilabelResults:
        """Everything that was measured in a run with several labels per image.

        Raises:
            DataError: an image of the run has one label.
        """
        return self.folder.multilabel_results

    @property
    def mean_average_precision(self) -> float:
        """The mean average precision to expect, in a run with several labels per image.

        Raises:
            RunError: the run has no results yet.
            DataError: an image of the run has one label.
        """
        return self._multilabel_expected.mean_average_precision

    @property
    def macro_f1(self) -> float:
        """The macro F1 to expect at the labels' thresholds; errors as there."""
        return self._multilabel_expected.macro_f1

    @property
    def _multilabel_expected(self) -> MultilabelExpected:
        self.folder.check_finished()
        expected = self.multilabel_results.expected
        if expected is None:
            raise RunError("results.json has no score to expect", where=self.dir)
        return expected

    def multilabel_predictions(self, kind: str = "oof") -> MultilabelPredictions:
        """Return the "oof" or "test" predictions of a run with several labels per image.

        Raises:
            RunError: the run is not complete, or has no such rows.
        """
        rows = self.folder.multilabel_test if kind == "test" else self.folder.multilabel_oof
        if rows is None:
            raise RunError(f"no {kind} predictions", where=self.dir, expected=f"{kind}.npz")
        return rows

    def predictions(self, kind: str = "oof") -> Predictions:
        """Return the out-of-fold ("oof") or test ("test") predictions of the members.

        Raises:
            RunError: the run is not complete, or has no such rows.
        """
        return self.folder.predictions(kind)

    @property
    def accuracy(self) -> float:
        """The accuracy to expect of the chosen ensemble on new images.

        Measured on the test rows where there are any; else out of fold, where it pays for the
        choice of the ensemble.

        Raises:
            RunError: the run has no results yet.
        """
        return self._expected.accuracy

    @property
    def interval(self) -> tuple[float, float]:
        """The confidence interval of `accuracy`; errors as there."""
        return self._expected.interval

    @property
    def _expected(self) -> Expected:
        self.folder.check_finished()
        expected = self.results.expected
        if expected is None:
            raise RunError("results.json has no accuracy to expect", where=self.dir)
        return expected

    def leaderboard(self) -> pd.DataFrame:
        """Return the scores of all ensembles and members, the most accurate first.

        The rows that the headline is about (`rows`: test, or else oof) come first. `low` and `high`
        are the ends of the interval of the accuracy, `chosen` marks the ensemble that is exported.
        Of several labels per image, the mean average precision takes the place of the accuracy.

        Raises:
            RunError: the run has no results yet.
            MissingExtraError: pandas is not installed.
        """
        rows = [self._leaderboard_row(score) for score in self._ordered_scores()]
        try:
            import pandas as pd
        except ModuleNotFoundError:
            raise MissingExtraError(
                "a leaderboard is a pandas DataFrame, and pandas is not installed",
                fix="pip install pandas, or read run.results.scores",
            ) from None
        return pd.DataFrame(rows)

    def _ordered_scores(self) -> list[Score] | list[MultilabelScore]:
        """Return the scores in the order of the leaderboard."""
        self.folder.check_finished()
        results = self.folder.any_results
        if isinstance(results, MultilabelResults):
            return sorted(
                results.scores, key=lambda s: (s.rows != "test", -s.mean_average_precision)
            )
        return sorted(results.scores, key=lambda s: (s.rows != "test", -s.accuracy))

    def _leaderboard_row(self, score: Score | MultilabelScore) -> dict[str, Any]:
        row = {"name": score.name, "kind": score.kind, "rows": score.rows, "n": score.n}
        if isinstance(score, MultilabelScore):
            low, high = score.mean_average_precision_interval
            row["mean_average_precision"] = score.mean_average_precision
            figures: dict[str, Any] = {"macro_f1": score.macro_f1, "micro_f1": score.micro_f1}
            figures |= {"subset_accuracy": score.subset_accuracy, "log_loss": score.log_loss}
        else:
            low, high = score.interval
            row["accuracy"] = score.accuracy
            figures = {"log_loss": score.log_loss, "ece": score.ece}
        chosen = {"fitted_on": score.fitted_on, "chosen": self._is_chosen(score)}
        return {**row, "low": low, "high": high, **figures, **chosen}

    def _is_chosen(self, score: Score | MultilabelScore) -> bool:
        return score.kind == "ensemble" and score.name == self.folder.any_results.chosen

    def model(self, threads: int = 0) -> Model:
        """Open the exported file of the run (model.onnx).

        Args:
            threads: of onnxruntime; 0 = one per core.

        Raises:
            RunError: the run has none yet.
            ExportError: the file is damaged.
        """
        from threefold.runtime.model import load

        return load(self._model_file(), threads)

    def _model_file(self) -> Path:
        path = self.dir / "model.onnx"
        fix = f"run `{shlex.join(['threefold', 'export', str(self.dir), '--out', str(path)])}`"
        if not self.folder.has(path.name):
            raise RunError("the run has no exported file", where=path, fix=fix)
        return self.folder.verify(path.name, fix)

    def score(self, data: Any, labels: Any = None) -> Score | MultilabelScore:
        """Score the exported file on labelled images.

        Args:
            data: a folder of class folders, or of train/ [val/] test/, of which the test images are
                taken; a CSV or parquet file; or images in memory, as `threefold.fit` takes them.
            labels: of images in memory, as there.

        Returns:
            Accuracy with its interval, log loss, calibration error and more. Of several labels per
            image, mean average precision and F1 at the thresholds of the file.

        Raises:
            RunError: the run has no exported file.
            DataError: the images cannot be read, or have classes that the run does not know.
        """
        model = self._model_file()
        if isinstance(data, str | Path):
            return self._score_file(model, data)
        with TemporaryFolder() as folder:
            return self._score_file(model, store_data(data, labels, Path(folder) / "run"))

    def _score_file(self, model: Path, data: str | Path) -> Score | MultilabelScore:
        """Score the exported file on a folder or a table."""
        if self.folder.is_multilabel:
            from threefold.runtime.score_labels import score_label_models

            return score_label_models([model], data).summary.scores[0]
        from threefold.runtime.score_models import score_models

        return score_models([model], data)[0].scores[0]

    def report(self, out: str | Path | None = None) -> Path:
        """Return the path of the HTML report, which is written where there is none.

        Args:
            out: write it to this file, in place of report.html in the run folder.

        Raises:
            RunError: the run has no results yet.
        """
        path = self.dir / "report.html"
        if out is None and self.folder.has(path.name):
            fix = f"run `{shlex.join(['threefold', 'report', str(self.dir)])}`"
            return self.folder.verify(path.name, fix)
        from threefold.report.pages import write_report

        return write_report([self.folder], None if out is None else Path(out))

    def plot_scores(self) -> Chart:
        """Draw accuracy and interval of every ensemble and member.

        Of several labels per image, the mean average precision takes the place of the accuracy.

        Raises:
            RunError: the run has no results yet.
        """
        from threefold.report import run_charts

        return run_charts.plot_scores(self.folder)

    def plot_confusion(self) -> Chart:
        """Draw how often images of each class get each answer of the chosen ensemble.

        On the test rows where there are any, else out of fold.

        Raises:
            RunError: the run has no results yet, more than 30 classes, or several labels per image.
        """
        from threefold.report import run_charts

        return run_charts.plot_confusion(self.folder)

    def plot_calibration(self) -> Chart:
        """Draw the share of right answers of the chosen ensemble against its confidence.

        On the test rows where there are any, else out of fold. Of several labels per image, a chart
        for each label, at most 24, the lowest average precision first.

        Raises:
            RunError: the run has no results yet.
        """
        from threefold.report import run_charts

        return run_charts.plot_calibration(self.folder)

    def plot_learning_curves(self) -> Chart:
        """Draw the accuracy of each member on the select rows after each epoch.

        Of several labels per image, it is the share of right labels.

        Raises:
            RunError: the run has no results yet, or only heads on frozen features.
        """
        from threefold.report import run_charts

        return run_charts.plot_learning_curves(self.folder)

    def __repr__(self) -> str:
        """Name the run, its accuracy and its folder in one line."""
        kind = type(self).__name__
        name = printable(self.recipe.name, "")
        return f"<{kind} {name}: {self._headline()}, {printable(str(self.dir), '')}>"

    def _headline(self) -> str:
        """Return the accuracy to expect and its basis in words."""
        if not self.folder.has_results:
            return "no results yet"
        results = self.folder.any_results
        more = " (more members follow)" if results.pending else ""
        if isinstance(results, MultilabelResults):
            several = self._multilabel_expected
            low, high = several.mean_average_precision_interval
            return (
                f"mean average precision {several.mean_average_precision:.3f} "
                f"[{low:.3f}, {high:.3f}] on {several.n:,} {several.basis}, {results.chosen}{more}"
            )
        expected = results.expected
        if expected is None:
            return "no accuracy to expect"
        low, high = expected.interval
        text = f"accuracy {expected.accuracy:.3f} [{low:.3f}, {high:.3f}] on {expected.n:,}"
        return f"{text} {expected.basis}, {results.chosen}{more}"

    def _repr_html_(self) -> str:
        """What a notebook shows: the headline and the leaderboard."""
        name = html.escape(printable(self.recipe.name, ""))
        title = f"<p><b>{name}</b>: {html.escape(self._headline())}</p>"
        if not self.folder.has_results:
            return title
        head: tuple[str, ...] = ("", "rows", "images", "accuracy %", "interval", "log loss", "ECE")
        if self.folder.is_multilabel:
            head = ("", "rows", "images", "mAP", "interval", "macro F1", "log loss")
        cells = "".join(f"<th>{text}</th>" for text in head)
        body = "".join(self._html_row(score) for score in self._ordered_scores())
        return f"{title}<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"

    def _html_row(self, score: Score | MultilabelScore) -> str:
        name = html.escape(printable(score.name, ""))
        cells = [
            f"<b>{name}</b> (chosen)" if self._is_chosen(score) else name,
            html.escape(score.rows),
            f"{score.n:,}",
        ]
        if isinstance(score, MultilabelScore):
            low, high = score.mean_average_precision_interval
            cells += [f"{score.mean_average_precision:.4f}", f"{low:.4f} to {high:.4f}"]
            cells += [f"{score.macro_f1:.4f}", f"{score.log_loss:.3f}"]
        else:
            low, high = score.interval
            cells += [f"{100 * score.accuracy:.2f}", f"{100 * low:.2f} to {100 * high:.2f}"]
            cells += [f"{score.log_loss:.3f}", f"{score.ece:.3f}"]
        return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def open(path: str | Path) -> SavedRun:
    """Open a run folder to read its scores, charts, report and exported file; needs no torch.

    `threefold.Run.open` opens it to use its networks as well.

    Raises:
        RunError: there is no run.
    """
    return SavedRun.open(path)
