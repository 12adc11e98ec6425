"""The measurements of a run folder: results.json of either task, and the predictions they are of.

A run with several labels per image has other records. What reads the ones of one label per image
refuses such a run with one line, so no verb takes it for what it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from threefold.errors import DataError, RunError
from threefold.json_files import read_json
from threefold.predictions.job_files import JobFiles
from threefold.predictions.member_probs import wrong_task
from threefold.predictions.multilabel import MultilabelPredictions
from threefold.predictions.multilabel_results import MultilabelResults
from threefold.predictions.results_schema import Results

AnyResults = Results | MultilabelResults


@dataclass(frozen=True, eq=False)
class MultilabelAnswers:
    """What the chosen ensemble answers on its headline rows.

    Attributes:
        probs: (n, k), calibrated.
        decided: (n, k) uint8, the labels that each image is given.
        targets: (n, k) uint8.
        ids: n names.
    """

    probs: np.ndarray
    decided: np.ndarray
    targets: np.ndarray
    ids: tuple[str, ...]


class RunResults(JobFiles):
    """The measurements of a run; `run_folder.RunFolder` has the other files."""

    @property
    def is_multilabel(self) -> bool:
        """Whether an image of the run has any number of labels."""
        return self.recipe.data.task == "multilabel"

    @property
    def has_results(self) -> bool:
        """Whether there are results, of all members or of the first (`Results.pending`)."""
        return (self.path / "results.json").exists()

    def check_finished(self, what: str = "the run is not complete") -> None:
        """Raise a RunError that says `what` unless the run has results."""
        if not self.has_results:
            raise RunError(what, where=self.path, fix=f"run `{self.train_command()}`")

    def check_results_kept(self) -> None:
        """Raise a RunError if the run had results, and results.json is gone."""
        if not self.has_results and self.has("results.json"):
            self.verify("results.json")

    @cached_property
    def any_results(self) -> AnyResults:
        """Everything that was measured (results.json), whatever the task."""
        path = self.path / "results.json"
        with self.advising(path):
            self.verify("results.json")
            tree = read_json(path)
            if isinstance(tree, dict) and tree.get("task") == "multilabel":
                return MultilabelResults.parse(tree, path)
            return Results.parse(tree, path)

    @property
    def results(self) -> Results:
        """Everything that was measured (results.json).

        Raises:
            DataError: an image of the run has several labels.
        """
        results = self.any_results
        if isinstance(results, MultilabelResults):
            raise wrong_task("multilabel", self.path)
        return results

    @results.setter
    def results(self, results: Results) -> None:
        """Replace them here, not in the file."""
        self.any_results = results

    @property
    def multilabel_results(self) -> MultilabelResults:
        """Everything that was measured in a run with several labels per image.

        Raises:
            DataError: an image of the run has one label.
        """
        results = self.any_results
        if isinstance(results, Results):
            raise wrong_task("multiclass", self.path)
        return results

    def write_results(self, results: AnyResults) -> None:
        """Write results.json."""
        self.write_record("results.json", results)
        self.any_results = results

    def add_results(self, step: str, seconds: float, **changes: Any) -> None:
        """Add the duration of a step, and values that it brought, to results.json."""
        durations = {**self.any_results.seconds, step: seconds}
        self.write_results(self.any_results.replace(seconds=durations, **changes))

    @property
    def is_sealed(self) -> bool:
        """Whether test rows stay unread, because members are still to be trained."""
        return self.has_results and bool(self.any_results.pending)

    # Several labels per image

    @cached_property
    def multilabel_oof(self) -> MultilabelPredictions | None:
        """The members' out-of-fold predictions of several labels per image, if there are any."""
        return self._read_multilabel("oof")

    @property
    def multilabel_test(self) -> MultilabelPredictions | None:
        """Those on the test rows, if there are any and they are not sealed."""
        return None if self.is_sealed else self.all_multilabel_test

    @property
    def all_multilabel_test(self) -> MultilabelPredictions | None:
        """Those on the test rows, sealed or not: for the last step of a run."""
        return self._read_multilabel("test")

    def _read_multilabel(self, kind: str) -> MultilabelPredictions | None:
        name = f"{kind}.npz"
        if not self.has(name):
            return None
        with self.advising_predictions(name):
            return MultilabelPredictions.load(self.verify(name))

    @contextmanager
    def advising_predictions(self, name: str) -> Iterator[None]:
        """Say how damaged predictions of the run are made anew."""
        try:
            yield
        except DataError as error:
            fix = f"delete {self.path / name} and run `{self.train_command()}`"
            raise error.with_fix(f"{fix}, which writes it again") from None

    def multilabel_headline(self) -> MultilabelPredictions:
        """Return the predictions that the headline is about: test, or oof without a test split.

        Raises:
            RunError: the run is not complete.
        """
        rows = self.multilabel_test
        rows = self.multilabel_oof if rows is None else rows
        if rows is None:
            raise RunError(
                "no predictions",
                where=self.path,
                expected="oof.npz or test.npz",
                fix=f"run `{self.train_command()}` to its end",
            )
        return rows

    @cached_property
    def multilabel_chosen(self) -> MultilabelAnswers:
        """The chosen ensemble's calibrated answers and labels on the headline rows (chosen.npz).

        Raises:
            RunError: the file is missing or damaged.
        """
        path = self.path / "chosen.npz"
        arrays = self.read_arrays("chosen.npz")
        names = ("probs", "decided", "targets", "ids")
        if not arrays.keys() >= set(names):
            raise RunError(
                "arrays are missing", where=path, expected=", ".join(names), got=", ".join(arrays)
            )
        return MultilabelAnswers(
            arrays["probs"], arrays["decided"], arrays["targets"], tuple(map(str, arrays["ids"]))
        )

    def write_multilabel_chosen(
        self, rows: MultilabelPredictions, probs: np.ndarray, decided: np.ndarray
    ) -> None:
        """Write chosen.npz: answers (n, k), and the labels that they give, on the headline rows."""
        answers = MultilabelAnswers(probs, decided, rows.targets, rows.ids)
        self.write_arrays(
            "chosen.npz",
            probs=probs,
            decided=decided,
            targets=rows.targets,
            ids=np.array(rows.ids),
        )
        self.multilabel_chosen = answers

    def multilabel_chosen_rows(self) -> MultilabelPredictions:
        """Return the chosen ensemble's answers as the only member of the headline rows.

        Raises:
            RunError: the run is not complete.
        """
        name = f"{self.multilabel_results.chosen} (chosen)"
        probs = self.multilabel_chosen.probs[None]
        return replace(self.multilabel_headline(), probs=probs, members=(name,))
