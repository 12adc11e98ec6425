"""The report, from fake but complete run folders."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.fake_runs import answers, fake_run
from support.html_page import Page

from threefold.errors import RunError
from threefold.npz_files import read_arrays, write_arrays
from threefold.report.pages import write_report


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report([fake_run(tmp_path_factory.mktemp("runs") / "demo", curves=True)]))


def test_one_file_that_needs_nothing_else(demo: Page) -> None:
    demo.needs_nothing_else()

    assert not re.search(r"//|@import", re.sub(r"base64,[^\"]+", "", demo.source))
    assert re.findall(r"url\((?!#)", demo.source) == []
    assert len(demo.source) < 1_000_000


def test_says_what_to_expect_in_plain_numbers(demo: Page) -> None:
    words = (
        "Expect 88.9 % of new images to be right about 89 of 100 , between 87 and 91 "
        "(95 % interval 86.8 % to 90.7 %)"
    )

    assert words in demo.text
    assert "the test set, opened at the end; the date was not recorded" in demo.text
    assert "the simplest within one standard error of the best (stacked)" in demo.text
    assert "some evidence that mean is better: 41 against 24 images, p = 0.046" in demo.text
    assert "train 21 min 10 s" in demo.text


@pytest.mark.usefixtures("no_charts")
def test_headline_has_the_metric_that_the_run_goes_by(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", n=20)
    expected = {
        "accuracy": 0.9,
        "interval": [0.7, 0.97],
        "n": 20,
        "rows": "test",
        "basis": "test rows",
        "metric": {"name": "macro_f1", "value": 0.877, "interval": [0.7, 0.95]},
    }
    _edit(folder / "results.json", lambda tree: tree.update(expected=expected))

    page = Page(write_report([folder]))

    assert "Macro F1, which this run goes by: 0.877 , interval 0.700 to 0.950." in page.text


def test_is_well_formed_and_accessible(demo: Page) -> None:
    demo.is_sound()

    assert sum(tag == "svg" for tag, _ in demo.tags) == 6


def test_charts_take_the_colours_of_the_page(demo: Page) -> None:
    charts = "".join(re.findall(r"<svg.*?</svg>", demo.source, re.S))

    assert not re.search(r"#[0-9a-f]{6}(?![0-9a-f\"])", charts)
    assert {"var(--ink)", "var(--soft)", "var(--line)", "var(--accent)"} == set(
        re.findall(r"var\(--\w+\)", charts)
    )
    assert "prefers-color-scheme: dark" in demo.source


@pytest.mark.usefixtures("no_charts")
def test_confusions_and_mistakes_of_the_chosen_answers(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", ("cat", "dog", "eel"), n=4)
    probs = np.array(
        [[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.05, 0.95, 0.0]], np.float32
    )
    write_arrays(
        folder / "chosen.npz",
        probs=probs,
        labels=np.array([0, 0, 1, 2]),
        ids=np.array(["a", "b", "c", "d"]),
    )
    page = Page(write_report([folder]))
    matrix = page.source[page.source.index('class="matrix"') :]
    cells = re.findall(r'<td(?: class="(right|wrong)"[^>]*)?>(\d*)</td>', matrix)
    right, wrong, none = ("right", "1"), ("wrong", "1"), ("", "")
    never_right = ("right", "0")

    assert cells[:9] == [right, wrong, none, wrong, never_right, none, none, wrong, never_right]
    order = [
        "eel answered dog 95.0 % sure",
        "cat answered dog 70.0 % sure",
        "dog answered cat 60.0 % sure",
    ]
    places = [page.text.index(words) for words in order]
    assert places == sorted(places)
    assert "3 images of 4 were answered wrong" in page.text


def test_learning_curves_mark_what_the_gate_dropped(demo: Page) -> None:
    assert demo.text.count("within its noise") == 9
    curves = re.findall(
        r'<svg role="img" aria-label="Learning curve of lite.*?</svg>', demo.source, re.S
    )

    assert len(curves) == 3
    assert all(chart.count("stroke-dasharray") == 3 for chart in curves)


def test_names_cannot_inject_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder = fake_run(tmp_path / "run", (evil, '"><img src=x onerror=y>', "a & b"), notes=(evil,))
    (folder / "recipe.toml").write_text(f"# </code>{evil}\n" + (folder / "recipe.toml").read_text())
    page = Page(write_report([folder]))

    assert "script" not in {tag for tag, _ in page.tags}
    assert all((attrs.get("src") or "data:").startswith("data:") for _, attrs in page.tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.source


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(
    ("rows", "protocol", "export", "kind", "words"),
    [
        ("test", "honest", "auto", "honest", "nothing was chosen on the rows scored here"),
        (
            "oof",
            "honest",
            "auto",
            "honest",
            "only the choice between ensembles used these scores",
        ),
        ("oof", "honest", "mean", "honest", "nothing was chosen on the rows scored here"),
        ("test", "paper", "auto", "paper", "selected on test"),
    ],
)
def test_stamp_says_what_the_scores_are_worth(
    tmp_path: Path, rows: str, protocol: str, export: str, kind: str, words: str
) -> None:
    page = Page(
        write_report(
            [fake_run(tmp_path / "run", n=200, rows=rows, protocol=protocol, export=export)]
        )
    )

    assert [
        attrs["class"] for tag, attrs in page.tags if "stamp" in (attrs.get("class") or "")
    ] == [f"stamp {kind}"]
    assert words in page.text
    assert ("Expect 88.9 %" in page.text) == (protocol == "honest")


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("k", [2, 30, 31, 40])
def test_matrix_only_where_it_can_be_read(tmp_path: Path, k: int) -> None:
    page = Page(
        write_report([fake_run(tmp_path / "run", tuple(f"class {i}" for i in range(k)), n=400)])
    )

    assert ("matrix" in [attrs.get("class") for _, attrs in page.tags]) == (k <= 30)
    assert "Most frequent mistakes" in page.text
    assert page.open == []


@pytest.mark.usefixtures("no_charts")
def test_nothing_wrong_and_no_images(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", ("cat", "dog"), n=20, images=False)
    labels = np.arange(20) % 2
    probs, ids = np.eye(2, dtype=np.float32)[labels], np.array([f"image{row}" for row in range(20)])
    write_arrays(folder / "chosen.npz", probs=probs, labels=labels, ids=ids)
    page = Page(write_report([folder]))

    assert "No image was answered wrong" in page.text
    assert "augmentation" not in page.text
    assert "holds no history" in page.text


@pytest.mark.usefixtures("no_charts")
def test_large_images_are_reduced(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", n=400)
    noise = np.random.default_rng(1).integers(0, 255, (40, 200, 300, 3), dtype=np.uint8)
    probs, labels = answers(np.random.default_rng(0), 400, 10)
    wrong = np.flatnonzero(probs.argmax(axis=1) != labels)
    wrong = wrong[np.argsort(-probs[wrong].max(1), kind="stable")][:10]
    write_arrays(folder / "chosen.npz", probs=probs, labels=labels, ids=np.arange(400).astype(str))
    write_arrays(
        folder / "thumbs.npz", images=noise[: len(wrong)], ids=wrong.astype(str), preview=noise[:2]
    )
    page = Page(write_report([folder]))
    sizes = [_image(attrs["src"]).size for tag, attrs in page.tags if tag == "img"]

    assert len(sizes) == 12
    assert set(sizes) == {(160, 107)}
    assert len(page.source) < 400_000


@pytest.mark.usefixtures("no_charts")
def test_small_images_are_kept_exactly(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", n=20)
    page = Page(write_report([folder]))
    last = [attrs["src"] for tag, attrs in page.tags if tag == "img"][-1]
    np.testing.assert_array_equal(_image(last), read_arrays(folder / "thumbs.npz")["preview"][-1])


def _image(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", n=100)
    first = write_report([folder]).read_bytes()

    assert write_report([folder], tmp_path / "again" / "x.html").read_bytes() == first
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["x.html"]


@pytest.mark.usefixtures("no_charts")
def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    folders = [fake_run(tmp_path / "a", n=100), fake_run(tmp_path / "b", n=100, protocol="paper")]
    target = write_report(folders)
    page = Page(target)

    assert target == tmp_path / "report.html"
    assert "threefold report: 2 runs" in page.text
    assert page.headings().count(1) == 1
    assert {"run1", "run2", "run2-measured"} <= {attrs.get("id") for _, attrs in page.tags}


@pytest.mark.parametrize("name", ["recipe.toml", "run.json", "results.json", "chosen.npz"])
def test_incomplete_run_says_what_is_missing_and_the_fix(tmp_path: Path, name: str) -> None:
    folder = fake_run(tmp_path / "run", n=20)
    (folder / name).unlink()

    with pytest.raises(RunError) as caught:
        write_report([folder])
    message = str(caught.value)
    assert "the run is not complete" in message
    assert f"got no {name}" in message
    recipe = "RECIPE" if name == "recipe.toml" else folder / "recipe.toml"
    assert f"`threefold train {recipe} --out {folder}`" in message
    assert not (folder / "report.html").exists()


def test_refuses_files_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", n=20)
    probs, labels = answers(np.random.default_rng(0), 19, 10)
    write_arrays(folder / "chosen.npz", probs=probs, labels=labels, ids=np.arange(19).astype(str))

    with pytest.raises(
        RunError, match=r"do not belong together.*expected \(20, 10\), got probs \(19, 10\)"
    ):
        write_report([folder])


def test_refuses_a_headline_on_rows_the_ensemble_has_seen(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", n=20, rows="oof")
    _edit(folder / "results.json", lambda tree: tree["scores"][0].update(fitted_on="oof rows"))

    with pytest.raises(RunError, match="fitted on the rows that it is scored on"):
        write_report([folder])


def _edit(path: Path, change: Any) -> None:
    tree = json.loads(path.read_text())
    tree.pop("sha256", None)
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.pop("scores"), "lacks a key"),
        (lambda tree: tree.pop("chosen_reason"), "chosen_reason"),
        (lambda tree: tree["members"][0].pop("head"), "head"),
        (lambda tree: tree["scores"][0].pop("log_loss"), "log_loss"),
        (lambda tree: tree.update(chosen="other"), "an ensemble named other"),
    ],
)
def test_malformed_results_are_one_clear_line(tmp_path: Path, change: Any, words: str) -> None:
    folder = fake_run(tmp_path / "run", n=20)
    _edit(folder / "results.json", change)

    with pytest.raises(RunError, match=words) as caught:
        write_report([folder])
    assert "\n" not in str(caught.value)


def test_no_runs_and_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to report on"):
        write_report([])

    with pytest.raises(RunError, match="there is no such run folder"):
        write_report([tmp_path / "absent"])

    (tmp_path / "cat").mkdir()
    with pytest.raises(RunError, match=f"not a run folder: .*run `threefold fit {tmp_path}`"):
        write_report([tmp_path])
