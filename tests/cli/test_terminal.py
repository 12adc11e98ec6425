"""The terminal: quiet in a pipe, names with brackets, tables of 80 columns."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import re
from typing import Any

import pytest
from rich.console import Console

from threefold.cli.terminal import expected_line, score_table, verdict_line
from threefold.predictions.results_schema import Comparison, Expected, MetricScore, Score
from threefold.recipe.recipe import Job
from threefold.training.progress.terminal_curves import Curves, sparkline
from threefold.training.progress.terminal_watcher import TerminalWatcher, has_bar, show_progress
from threefold.training.progress.watcher import Watcher

RECORD: dict[str, Any] = {
    "epoch": 0,
    "loss": 1.0,
    "select_accuracy": 0.5,
    "images_per_second": 10.0,
}


def watch(verbose: bool, terminal: bool) -> str:
    """Print a note and two jobs, the first of them already done."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    with TerminalWatcher(console, verbose) as watcher:
        watcher.note("frozen = blocks\\.[0-2]")
        watcher.plan([Job("a", 0, "one"), Job("a", 0, "two")], [40, 20])
        watcher.job(Job("a", 0, "one"), skipped=True)
        watcher.job(Job("a", 0, "two"), skipped=False)
        watcher.batch(20)
        watcher.epoch(RECORD)
    return stream.getvalue()


def test_in_a_pipe_only_notes_are_printed_and_brackets_survive() -> None:
    assert watch(verbose=False, terminal=False) == "note frozen = blocks\\.[0-2]\n"


def test_verbose_names_jobs_and_epochs() -> None:
    text = watch(verbose=True, terminal=False)

    assert "a fold0 one: already done" in text
    assert "a fold0 two epoch 0: loss 1.000, select 0.5000, 10 images/s" in text


def test_on_a_terminal_the_bar_names_the_job() -> None:
    assert "a fold0 two" in watch(verbose=False, terminal=True)


def test_each_of_several_jobs_has_a_bar_in_80_columns() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    jobs = [Job(f"tf_efficientnet_lite{i}-tuned", i, "tune") for i in range(4)]
    with TerminalWatcher(console) as watcher:
        watcher.plan(jobs, [100] * 4)
        watcher.job(jobs[0], skipped=True)
        for job, images in zip(jobs[1:], (60, 20, 40), strict=True):
            watcher.job(job, skipped=False)
            watcher.focus(job)
            watcher.batch(images)
            watcher.epoch(RECORD | {"images_per_second": 1234.0})
        watcher.ended(jobs[3], done=False)  # its worker died
        watcher.ended(jobs[2])
        whole, *others = watcher.progress.tasks
        console.print(watcher.progress.get_renderable())

    assert (whole.description, whole.completed) == ("2 of 4 jobs", 260)
    assert [task.completed for task in others] == [60]
    lines = [re.sub(r"\x1b\[\S*?[A-Za-z]", "", line) for line in stream.getvalue().splitlines()]
    assert max(map(len, lines[-3:])) <= 80
    assert "…et_lite1-tuned fold1 tune" in stream.getvalue()
    assert "1234 images/s, select 0.500" in stream.getvalue()


def test_curves_of_the_last_stages_fit_into_80_columns() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    jobs = [Job(f"m{i}-tf_efficientnet_lite0-tuned", 0, "tune2") for i in range(8)]
    curves = Curves()
    for i, job in enumerate(jobs):
        for epoch in range(40):
            record = RECORD | {"epoch": epoch, "loss": 1.0 / (epoch + 1), "select_accuracy": 0.5}
            curves.add(job, record)
            if i == 7 and epoch == 1:
                break

    console.print(curves)

    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 7
    assert re.search(r"…\S+-tuned fold0 tune2 +40 +█▄?[▁▂▃▄▅▆▇█]+▁ +0.025 +▄{16} +0.500", lines[1])
    assert re.search(r"tune2 +2 +█▁ +0.500 +▄▄ +0.500", lines[-1])


def test_a_terminal_without_blocks_shows_numbers() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    curves = Curves()
    curves.add(Job("a", 0, "one"), RECORD)

    console.print(curves)
    stream.seek(0)

    assert stream.read().splitlines()[1].split() == ["a", "fold0", "one", "1", "1.000", "0.500"]


def test_a_terminal_shows_curves_and_a_pipe_does_not() -> None:
    assert "select accuracy" in watch(verbose=False, terminal=True)
    assert "select accuracy" not in watch(verbose=True, terminal=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([3.0], "▄"),
        ([0.0, 1.0, 2.0, 7.0], "▁▂▃█"),
        ([0.0, 0.0, 5.0, 5.0, 9.0, 5.0], "▁▆█"),
    ],
)
def test_sparklines_go_from_the_least_to_the_most(values: list[float], expected: str) -> None:
    assert sparkline(values, 4 if len(values) <= 4 else 3) == expected


def test_the_metric_of_a_run_comes_before_its_accuracy() -> None:
    expected = Expected(accuracy=0.9, interval=(0.8, 0.95), n=20, rows="oof", basis="oof rows")
    metric = MetricScore(name="balanced_accuracy", value=0.8765, interval=(0.7, 0.95))

    assert expected_line(expected).startswith("Expect [bold]90.0%[/] of new images to be right")
    assert expected_line(expected.replace(metric=metric)).splitlines() == [
        "Expect balanced accuracy [bold]0.876[/] on new images (95 % interval 0.700 to 0.950).",
        expected_line(expected),
    ]


SCORE = Score(
    name="short",
    kind="member",
    rows="foreign",
    n=10000,
    accuracy=0.9555,
    interval=(0.95, 0.96),
    level=0.95,
    log_loss=0.1,
    ece=0.01,
    protocol="honest",
    fitted_on="nothing",
)


def print_table(scores: list[Score], chosen: str) -> list[str]:
    """Print a table of scores; returns its lines."""
    stream = io.StringIO()
    Console(file=stream, width=80, color_system=None).print(score_table(scores, chosen))
    return stream.getvalue().splitlines()


def test_equal_ensembles_of_one_member_share_a_line() -> None:
    names = ("mean", "pruned", "stacked")
    ensembles = [SCORE.replace(name=name, kind="ensemble") for name in names]
    ensembles[2] = ensembles[2].replace(log_loss=0.2)

    one = print_table([SCORE, *ensembles], "mean")
    two = print_table([SCORE, SCORE.replace(name="other"), *ensembles], "mean")

    assert [line.split()[0] for line in one[1:]] == ["short", "mean", "stacked", "others"]
    assert one[-1].strip() == "others are the member"
    assert len(two) == 6


def test_notes_are_wrapped_between_words_in_a_pipe() -> None:
    stream = io.StringIO()
    path = "/a" * 60

    TerminalWatcher(Console(file=stream, soft_wrap=True)).note(f"{'word ' * 40}{path}")

    *lines, last = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert last.strip() == path


def test_the_score_table_keeps_the_ends_of_long_names() -> None:
    score = SCORE
    long = score.replace(name="a_very_long_name_that_ends_in_its_backbone_[x]_SEResNeXt101")
    stream = io.StringIO()

    Console(file=stream, width=80, color_system=None).print(score_table([score, long]))

    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "_SEResNeXt101" in text
    assert "95.00 - 96.00" in text
    assert "given 10000" in text


def test_one_watcher_follows_several_runs() -> None:
    """The last job of a run does not belong to the next one."""
    with TerminalWatcher(Console(file=io.StringIO())) as watcher:
        for member in ("a", "b"):
            job = Job(member, 0, "one")
            watcher.plan([job], [10])
            watcher.job(job, skipped=False)
            watcher.batch(4)

        completed = [task.completed for task in watcher.progress.tasks]

    assert completed == [10, 4]


def test_a_verdict_names_both() -> None:
    better = Comparison(
        a="x", b="y", rows="oof", p=0.02, verdict="y is better than x: 9 against 1 images"
    )
    none = better.replace(verdict="no evidence of a difference: 3 against 3 images")

    assert verdict_line(better) == better.verdict
    assert verdict_line(none) == "x and y: no evidence of a difference: 3 against 3 images"


def test_from_python_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress() as follower:
        follower.plan([Job("a", 0, "one")], [40])
        follower.job(Job("a", 0, "one"), skipped=False)
        follower.batch(20)
        follower.note("a [note]")

    assert capsys.readouterr() == ("", "note a [note]\n")


def test_progress_can_be_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    own = Watcher()
    with show_progress(progress=False) as silent, show_progress(own) as follower:
        silent.note("nothing")

    assert follower is own
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("has_widgets", [False, True])
def test_a_notebook_has_a_bar_where_widgets_are(
    has_widgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.machinery.ModuleSpec("ipywidgets", None) if has_widgets else None
    monkeypatch.setattr(importlib.util, "find_spec", {"ipywidgets": spec}.get)

    assert has_bar(Console(force_jupyter=True)) is has_widgets
