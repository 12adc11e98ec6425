"""The pages and the terminal of several labels per image."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console
from support.multilabel import make_multilabel

from threefold.cli import main
from threefold.cli import multilabel as terminal
from threefold.cli.signals import Signals
from threefold.evaluation.multilabel_saved import combine_multilabel


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "p.npz"
    make_multilabel(80).save(path)
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """A function that runs the program, and returns its exit code and what it printed."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["threefold", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main.run(Signals())
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out + printed.err

    return call


@pytest.mark.parametrize("verb", ["evaluate", "ensemble", "compare"])
def test_the_page_has_every_label_and_the_figures_of_json(verb, file, tmp_path, run):
    code, text = run(verb, file, "--json", "--html", tmp_path / "page.html")
    assert code == 0, text
    tree, page = json.loads(text), (tmp_path / "page.html").read_text()

    assert tree["task"] == "multilabel"
    assert [label["class"] for label in tree["per_label"]] == ["cat", "dog", "tree"]
    for label in tree["per_label"]:
        assert f'<th scope="row">{label["class"]}</th>' in page
        assert f"{label['average_precision']:.3f}" in page
    assert page.count("Precision against recall of") == 3
    assert "How often labels occur together" in page
    assert "<script" not in page


def test_tables_fit_80_columns(file):
    scored = combine_multilabel([file], ["auto"]).summary
    console = Console(width=80, record=True, force_terminal=False)

    console.print(terminal.score_table(scored.scores, scored.chosen))
    console.print(terminal.label_table(scored.per_label))
    console.print(terminal.pair_table(scored.comparisons))

    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert f"{scored.per_label[0].threshold:.3f}" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ensemble", "--method", "stacked"), "for one label per image"),
        (("ensemble", "--top", "2"), "--top"),
        (("evaluate", "--labels", "folder"), "--labels"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(words, message, file, run):
    code, text = run(words[0], file, *words[1:])

    assert code == 1
    assert message in text
    assert "Traceback" not in text


def test_calibration_and_thresholds_reach_the_page(file, tmp_path, run):
    code, _ = run("ensemble", file, "--method", "mean", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    state = combine_multilabel([file], ["mean"]).summary.ensemble

    assert code == 0
    np.testing.assert_allclose(state.weights, 0.5)
    for threshold in state.thresholds:
        assert f"{threshold:.3f}" in page
