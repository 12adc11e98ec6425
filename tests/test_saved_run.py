"""A run from Python: its scores as a table, its charts, report and file, without torch."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.fake_runs import fake_run, full_run

import threefold
from threefold.errors import MissingExtraError, RunError
from threefold.json_files import read_json, write_json
from threefold.report import charts
from threefold.report.svg import PAGE_COLOURS
from threefold.training.run import Run

REPORT_CSS = Path(threefold.__file__).parent / "report/templates/report.css"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every section, and an accuracy to expect; only to be read."""
    folder = full_run(tmp_path_factory.mktemp("runs") / "whole")
    tree = read_json(folder / "results.json")
    expected = {"accuracy": 0.889, "interval": [0.868, 0.907], "n": 1000, "rows": "test"}
    write_json(folder / "results.json", {**tree, "expected": {**expected, "basis": "test images"}})
    return folder


@pytest.fixture
def unfinished(whole: Path, tmp_path: Path) -> Path:
    """A run folder with a recipe alone."""
    folder = tmp_path / "unfinished"
    folder.mkdir()
    (folder / "recipe.toml").write_bytes((whole / "recipe.toml").read_bytes())
    return folder


def test_the_headline_is_the_accuracy_to_expect(whole: Path) -> None:
    run = threefold.open(whole)

    assert (run.accuracy, run.interval) == (0.889, (0.868, 0.907))
    assert repr(run) == (
        f"<SavedRun whole: accuracy 0.889 [0.868, 0.907] on 1,000 test images, mean, {whole}>"
    )


def test_the_leaderboard_is_a_frame_with_the_best_first(whole: Path) -> None:
    run = threefold.open(whole)

    frame = run.leaderboard()

    assert isinstance(frame, pd.DataFrame)
    assert len(frame) == len(run.results.scores)
    test = frame[frame.rows == "test"]
    assert list(test.index) == list(range(len(test)))
    assert test.accuracy.is_monotonic_decreasing
    assert set(frame[frame.chosen].name) == {"mean"}
    assert set(frame[frame.chosen].kind) == {"ensemble"}
    assert ((frame.low <= frame.accuracy) & (frame.accuracy <= frame.high)).all()


def test_without_pandas_one_line_says_what_to_install(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(MissingExtraError, match="pip install pandas") as caught:
        threefold.open(whole).leaderboard()

    assert "\n" not in str(caught.value)


def test_a_notebook_shows_a_table_of_plain_text(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "evil", evil="<script>")

    page = threefold.open(folder)._repr_html_()

    ElementTree.fromstring(f"<div>{page}</div>")
    assert "<script" not in page
    assert "lite0&lt;script&gt;" in page
    assert "<b>mean</b> (chosen)" in page


@pytest.mark.parametrize("kind", ["scores", "confusion", "calibration", "learning_curves"])
def test_charts_are_svg_documents(whole: Path, tmp_path: Path, kind: str) -> None:
    chart = getattr(threefold.open(whole), f"plot_{kind}")()

    path = chart.save(tmp_path / "chart.svg")

    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert chart._repr_svg_() == path.read_text(encoding="utf-8")
    assert "var(--" not in chart.svg
    assert repr(chart).startswith("<Chart of ")
    assert len(repr(chart)) < 80


def test_the_confusion_matrix_has_the_counts_of_the_answers(whole: Path) -> None:
    run = threefold.open(whole)
    chosen = run.folder.chosen
    counts = pd.crosstab(chosen.labels, chosen.probs.argmax(1)).to_numpy().ravel()

    drawing = ElementTree.fromstring(run.plot_confusion().svg)

    texts = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    drawn = sorted(int(text) for text in texts if text and text.isdigit())
    assert drawn == sorted(counts[counts > 0])


def test_charts_are_saved_as_svg_only(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"charts are saved as SVG: .*chart\.png"):
        threefold.open(whole).plot_scores().save(tmp_path / "chart.png")


def test_a_matrix_that_cannot_be_read_is_not_drawn(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "many", tuple(f"class{i}" for i in range(40)), images=False)

    with pytest.raises(RunError, match="expected at most 30, got 40"):
        threefold.open(folder).plot_confusion()


def test_a_run_without_epochs_has_no_learning_curves(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no learning curves"):
        threefold.open(fake_run(tmp_path / "heads", images=False)).plot_learning_curves()


@pytest.mark.slow
def test_the_report_is_written_where_there_is_none(whole: Path, tmp_path: Path) -> None:
    run = threefold.open(whole)

    path = run.report()

    assert path == whole / "report.html"
    first = path.stat().st_mtime_ns
    assert run.report().stat().st_mtime_ns == first
    assert run.report(tmp_path / "other.html") == tmp_path / "other.html"


def test_what_a_run_lacks_is_one_line(unfinished: Path, whole: Path) -> None:
    run = threefold.open(unfinished)

    assert repr(run) == f"<SavedRun whole: no results yet, {unfinished}>"
    assert run._repr_html_() == "<p><b>whole</b>: no results yet</p>"
    for ask in (run.leaderboard, run.plot_scores, run.plot_calibration, lambda: run.accuracy):
        with pytest.raises(RunError, match="the run is not complete"):
            ask()
    with pytest.raises(RunError, match=r"no exported file: .*threefold export"):
        threefold.open(whole).model()
    with pytest.raises(RunError, match="no exported file"):
        threefold.open(whole).score(whole)
    with pytest.raises(RunError, match=r"not a run folder: \S*m\.onnx.*threefold\.load$"):
        threefold.open(whole.parent / "m.onnx")
    with pytest.raises(RunError, match=r"not a run folder.*`threefold fit` made$"):
        threefold.open(whole.parent / "no such run")
    with pytest.raises(RunError, match="not a run folder"):
        threefold.open(whole.parent)


def test_colours_of_charts_are_those_of_the_page() -> None:
    light = REPORT_CSS.read_text(encoding="utf-8").partition("@media")[0]

    for variable, colour in PAGE_COLOURS.items():
        assert f"{variable[4:-1]}: {colour};" in light


def test_opening_a_run_needs_no_torch(whole: Path) -> None:
    code = (
        "import sys, threefold\n"
        f"run = threefold.open({str(whole)!r})\n"
        "run.accuracy, run.plot_confusion(), run._repr_html_()\n"
        "assert 'torch' not in sys.modules"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_that_trains_has_the_same_methods(whole: Path) -> None:
    run = Run.open(whole)

    assert isinstance(run, threefold.SavedRun)
    assert repr(run).startswith("<Run whole: accuracy 0.889")


def test_rows_of_the_matrix_are_the_right_classes() -> None:
    drawing = ElementTree.fromstring(charts.confusion(np.array([[5, 2], [0, 3]]), ["a", "b"]))

    texts = {element.text: element for element in drawing.iter() if element.text}
    five, two, three = (
        [float(texts[count].attrib[axis]) for axis in "xy"] for count in ("5", "2", "3")
    )
    assert two[0] > five[0]
    assert two[1] == pytest.approx(five[1])
    assert three == pytest.approx([two[0], three[1]])
    assert three[1] > two[1]
    assert "0" not in texts
