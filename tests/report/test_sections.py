"""The report's sections beyond the scores, and their words where a run lacks them."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.fake_runs import answers, fake_run, full_run
from support.html_page import Page
from support.summaries import FASHION, fake_scores

from threefold.errors import RunError
from threefold.npz_files import read_arrays, write_arrays
from threefold.predictions.results_schema import Expected, PredictionSummary, Score
from threefold.report import charts
from threefold.report.pages import write_report
from threefold.report.views import expected_score

HOSTILE = ' <script>alert("x")</script> 木漏れ日 🙂 $x^2$ &amp; ' + "w" * 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def full(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report([folder], tmp_path_factory.mktemp("pages") / "report.html"))


def changed(folder: Path, target: Path, change: Any) -> Page:
    """The page of a copy of the run with another results.json."""
    shutil.copytree(folder, target)
    tree = json.loads((target / "results.json").read_text(encoding="utf-8"))
    tree.pop("sha256", None)
    change(tree)
    (target / "results.json").write_text(json.dumps(tree), encoding="utf-8")
    return Page(write_report([target]))


def test_whole_page(full: Page) -> None:
    full.needs_nothing_else()
    full.is_sound()
    headings = re.findall(r"<h2>(.*?)</h2>", full.source)

    assert headings == [
        "Which classes are confused",
        "Members against ensembles",
        "What does accuracy cost?",
        "Stopping early",
        "Can its confidence be trusted?",
        "Prediction sets",
        "How optimistic the choices are",
        "Most confident mistakes",
        "Labels and images to check",
        "Learning curves",
        "What augmentation does to the training images",
        "How this was measured",
        "Glossary",
    ]
    assert len(full.source) < 1_500_000


def test_first_screen_says_how_many_which_rows_and_when(full: Page) -> None:
    assert "about 89 of 100 , between 87 and 91 (95 % interval" in full.text

    assert (
        "the test set, which took no part in training or choosing. "
        "It was opened on 24 November 2026, 06:15 UTC, once." in full.text
    )
    squares = re.search(
        r'<svg role="img" aria-label="100 squares: about 89 right.*?</svg>', full.source
    )
    assert squares is not None
    assert [path.count("M") for path in re.findall(r' d="([^"]*)"', squares[0])] == [87, 4, 9]


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(
    ("rows", "times", "words"),
    [("test", 3, "the test rows were opened 3 times"), ("oof", 0, "out-of-fold")],
)
def test_opening_often_and_never(
    folder: Path, tmp_path: Path, rows: str, times: int, words: str
) -> None:
    if rows == "oof":
        page = Page(write_report([fake_run(tmp_path / "run", rows="oof", n=200)]))
        assert "opened" not in page.text
    else:
        page = changed(
            folder, tmp_path / "run", lambda tree: tree["test_opened"].update(times=times)
        )
        assert "; 3 times in all." in page.text
        assert sum("stamp" in (attrs.get("class") or "") for _, attrs in page.tags) == 2

    assert words in page.text


def test_confused_pairs_have_their_pictures(full: Page, folder: Path) -> None:
    pairs = re.findall(r'<div class="pair">(.*?)</div></div>', full.source, re.S)

    assert len(pairs) == 10
    assert all(1 <= pair.count("<img") <= 6 for pair in pairs)
    chosen = read_arrays(folder / "chosen.npz")
    top, labels = chosen["probs"].argmax(1), chosen["labels"]
    count, back = (int(((labels == a) & (top == b)).sum()) for a, b in ((5, 7), (7, 5)))
    assert (
        f"Sandal taken for Sneaker {count} images, {count / (labels == 5).sum():.1%}"
        in full.text.replace(" %", "%")
    )
    assert f"of the class; the other way round: {back}" in full.text
    ids = re.findall(r'<span title="(.*?)">', pairs[0])
    rows = [list(map(str, chosen["ids"])).index(name) for name in ids]
    assert {(int(labels[row]), int(top[row])) for row in rows} == {(5, 7)}


def test_heat_is_laid_over_the_mistakes(full: Page, folder: Path) -> None:
    section = full.source[
        full.source.index('id="run1-mistakes"') : full.source.index('id="run1-audit"')
    ]
    overlays = re.findall(r'<img class="heat" src="data:image/png;base64,([^"]+)"', section)

    assert len(overlays) == 23
    assert section.count("no map") == 1
    heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(overlays[0]))))
    assert heat.shape == (32, 32, 4)
    cam = read_arrays(folder / "thumbs.npz")["cams"][0]
    hottest = np.unravel_index(heat[..., 3].argmax(), (32, 32))
    np.testing.assert_allclose(
        hottest, np.array(np.unravel_index(cam.argmax(), cam.shape)) / 3, atol=1.5
    )
    assert heat[..., 3].min() == 0
    assert "It does not mean that they ignored the rest" in full.text


def test_optimism_of_each_choice(full: Page) -> None:
    section = full.text[full.text.index("The best of several candidates") :]

    assert (
        "best epoch the epoch with the best accuracy 89.3 % 87.4 % +1.9 +0.7 to +3.1 "
        "the apparent accuracy is too good" in section
    )
    assert (
        "number of views how many views are averaged 88.4 % 88.4 % 0.0 −0.6 to +0.6 "
        "no more than chance explains" in section
    )
    assert "fit of stacked" in section
    assert "select rows against score rows, 3,000 images" in section


def test_sets_unknown_images_and_calibration(full: Page) -> None:
    assert "sets of 1.2 classes on average contain the right one for 90.3 % of images" in full.text

    assert "Of images that do belong to one, 4.7 % are then rejected by mistake" in full.text
    assert (
        "one number for all classes (temperature scaling, 1.21): the least log loss out of fold"
        in full.text
    )


def test_cost_table_and_front(folder: Path, full: Page) -> None:
    scores = [
        s
        for s in json.loads((folder / "results.json").read_text())["scores"]
        if s["rows"] == "test"
    ]
    front = {
        s["name"]
        for s in scores
        if not any(o["macs"] <= s["macs"] and o["accuracy"] > s["accuracy"] for o in scores)
        and not any(o["macs"] < s["macs"] and o["accuracy"] == s["accuracy"] for o in scores)
    }
    section = full.source[
        full.source.index('id="run1-cost"') : full.source.index('id="run1-reliability"')
    ]
    rows = re.findall(r"<tr.*?>(.*?)</tr>", section, re.S)
    marked = {
        re.search(r'<th scope="row">(\S+?)[\s<]', row)[1] for row in rows if "<td>yes</td>" in row
    }  # type: ignore[index]

    assert marked <= front
    assert {"lite0", "lite1"} <= marked
    chosen, single = (next(s for s in scores if s["name"] == name) for name in ("mean", "lite2"))
    times = f"{chosen['macs'] / single['macs']:.1f} times"
    assert f"needs {times} the computation of the best single member (lite2)" in full.text


def test_audit_shows_suspects_and_the_pairs_that_matter_first(full: Page) -> None:
    section = full.source[
        full.source.index('id="run1-audit"') : full.source.index('id="run1-learning"')
    ]

    assert section.count("<figure>") == 24
    assert section.count("no image kept") == 4
    assert (
        "57 labels look wrong to networks that never saw the image; here are the 24 most doubtful"
        in full.text
    )
    parts = re.findall(r"<td>(two parts|same|–)</td></tr>", section)
    assert len(parts) == 20
    assert set(parts[:8]) == {"two parts"}
    assert "two parts" not in parts[8:]


def test_ledger_shows_what_was_seen(full: Page) -> None:
    assert "choice of the ensemble out-of-fold rows out-of-fold rows 3,000, seen" in full.text

    assert "temperature out-of-fold rows of the other folds out-of-fold rows none" in full.text


@pytest.mark.usefixtures("no_charts")
def test_an_old_run_says_plainly_what_it_lacks(tmp_path: Path) -> None:
    page = Page(write_report([fake_run(tmp_path / "run", n=200)]))
    page.is_sound()
    for words in (
        "do not include their cost",
        "Sets of several classes were not measured",
        "Stopping early was not measured",
        "The optimism of its choices was not measured",
        "The labels of this run were not audited",
    ):
        assert words in page.text

    assert "Grad-CAM" not in page.text
    assert "Which rows each step saw" not in page.text


def test_stopping_early_shows_what_it_costs_and_saves(full: Page) -> None:
    for words in (
        "takes 46 % of the multiply-adds, and 88.3 % of images are right instead of 88.4 %",
        "difference -0.10 points",
        "0.62 % of the images get a different class",
        "lite0 0.710 60.0 % 25 % 4.4 85.1 %",
        "+ lite1 never 25.0 % 60 % 10.4 87.7 %",
        "+ lite2 the whole ensemble 15.0 % 100 % 17.3 88.3 %",
        "7.1 ms on average when it may stop early",
        "thresholds chosen on other rows",
    ):
        assert words in full.text, words


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tree: tree["audit"].update(
                suspects=[],
                n_suspects=0,
                duplicates=None,
                missing="cleanlab is not installed",
                warnings=[],
            ),
            "No audit was made: cleanlab is not installed.",
        ),
        (
            lambda tree: tree["audit"].update(
                suspects=[], n_suspects=0, duplicates={"total": 0, "pairs": []}, warnings=[]
            ),
            "No label looks wrong, and no two images are the same.",
        ),
        (lambda tree: tree.update(optimism=[]), "The optimism of its choices was not measured"),
        (lambda tree: tree["conformal"].update(unknown=None), "sets of 1.2 classes on average"),
        (
            lambda tree: tree.update(cascade={"missing": "members are not in every fold"}),
            "always asks every member: members are not in every fold.",
        ),
        (lambda tree: tree.pop("export"), "46 % of the multiply-adds"),
        (lambda tree: tree["cascade"]["measured"].pop(), "for which this was not measured"),
        (
            lambda tree: tree.update(
                calibration={"name": "none", "reason": "", "temperature": None}
            ),
            "without a correction.",
        ),
        (
            lambda tree: tree.update(calibration=None, temperature=1.5),
            "calibrated (temperature 1.50)",
        ),
        (lambda tree: [s.update(macs=None) for s in tree["scores"]], "do not include their cost"),
        (
            lambda tree: tree.update(ledger=[], test_opened=None, comparisons=[]),
            "the date was not recorded",
        ),
    ],
)
def test_parts_that_are_missing(folder: Path, tmp_path: Path, change: Any, words: str) -> None:
    page = changed(folder, tmp_path / "run", change)

    assert words in page.text
    page.is_sound()


@pytest.mark.filterwarnings("error")
def test_hostile_and_foreign_names(tmp_path: Path) -> None:
    classes = tuple(f"{name}{HOSTILE}" for name in FASHION)
    page = Page(write_report([full_run(tmp_path / "run", classes, evil=HOSTILE)]))
    page.needs_nothing_else()
    page.is_sound()

    assert page.source.count("&lt;script&gt;") > 100
    assert "木漏れ日 🙂 $x^2$ &amp;amp;" in page.source


@pytest.mark.slow
def test_many_classes_and_members_stay_readable(tmp_path: Path) -> None:
    classes = tuple(f"species {number}" for number in range(200))
    target = write_report([full_run(tmp_path / "run", classes, n=4000, members=55)])
    page = Page(target)
    page.is_sound()

    assert target.stat().st_size < 2_000_000
    assert "With 200 classes a full matrix cannot be read" in page.text
    dots = re.search(r'<svg role="img" aria-label="Accuracy of every.*?</svg>', page.source, re.S)
    assert dots is not None
    assert "43 others" in dots[0]
    assert "other members" in page.text
    assert page.source.count("tall") > 3


@pytest.mark.slow
@pytest.mark.usefixtures("no_charts")
def test_a_page_of_large_pictures_is_below_ten_megabytes(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    shutil.copytree(folder, target)
    thumbs = read_arrays(target / "thumbs.npz")
    rng = np.random.default_rng(0)
    for name in ("images", "suspect_images", "pair_images", "preview"):
        thumbs[name] = rng.integers(0, 256, (len(thumbs[name]), 400, 300, 3), dtype=np.uint8)
    write_arrays(target / "thumbs.npz", **thumbs)

    assert write_report([target]).stat().st_size < 10_000_000


@pytest.mark.parametrize("name", ["cams", "suspect_images", "pair_true"])
def test_pictures_that_do_not_belong_together_are_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "run"
    shutil.copytree(folder, target)
    thumbs = read_arrays(target / "thumbs.npz")
    write_arrays(target / "thumbs.npz", **{**thumbs, name: thumbs[name][:-1]})

    with pytest.raises(RunError, match="arrays do not belong together"):
        write_report([target])


def test_a_member_may_be_called_like_an_ensemble(folder: Path, tmp_path: Path) -> None:
    page = changed(
        folder,
        tmp_path / "run",
        lambda tree: tree.update(
            scores=[
                *fake_scores(["mean", "b"], "test", 1000),
                *fake_scores(["mean", "b"], "oof", 3000),
            ]
        ),
    )

    # Twice among the scores, once among the costs.
    assert page.source.count('class="tag">chosen') == 3
    dots = re.search(r'<svg role="img" aria-label="Accuracy of every.*?</svg>', page.source, re.S)
    assert dots is not None
    assert len(re.findall(r">mean<", dots[0])) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize(("scheme", "paper"), [(1, (255, 255, 255)), (0, (0x14, 0x16, 0x1A))])
def test_a_browser_shows_it_in_both_schemes(
    full: Page, folder: Path, tmp_path: Path, scheme: int, paper: tuple[int, ...]
) -> None:
    page, shot = write_report([folder], tmp_path / "page.html"), tmp_path / "shot.png"
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=1000,1400",
    ]
    # A file, since the browser's helper processes outlive it and would hold a pipe open.
    with open(tmp_path / "log", "w") as log:
        command = [*browser, f"--screenshot={shot}", page.as_uri()]
        subprocess.run(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, timeout=120, check=True
        )

    assert "CONSOLE" not in (tmp_path / "log").read_text(errors="replace")
    image = np.asarray(Image.open(shot).convert("RGB"))
    assert tuple(image[5, 5]) == paper
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 500


def test_answers_of_the_fixture_are_usable() -> None:
    probs, labels = answers(np.random.default_rng(0), 1000, 10)

    assert 0.85 < (probs.argmax(1) == labels).mean() < 0.95


def test_without_test_rows_the_headline_pays_for_the_choice() -> None:
    score = Score.parse(fake_scores(["x", "y"], "oof", 900)[-1], "score")
    expected = Expected(accuracy=0.89, interval=(0.87, 0.91), n=900, rows="oof", basis="oof rows")
    summary = PredictionSummary(kind="ensemble", scores=(score,), expected=expected)

    headline = expected_score(summary, score)
    assert headline == score.replace(accuracy=0.89, interval=(0.87, 0.91))

    other = expected.replace(rows="test")
    assert expected_score(summary.replace(expected=other), score) == score
    assert expected_score(summary.replace(expected=None), score) == score


def test_costs_that_are_nearly_equal_have_an_axis() -> None:
    point = {
        "kind": "member",
        "accuracy": 0.8,
        "interval": [0.7, 0.9],
        "parameters": 1,
        "front": True,
        "chosen": False,
    }
    points = [
        {**point, "name": n, "macs": c, "number": i + 1}
        for i, (n, c) in enumerate((("a", 8_123_456), ("b", 8_123_999)))
    ]

    assert "8.12 million" in charts.pareto(points, 0.95)
