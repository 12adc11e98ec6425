"""The files of a run: typed, versioned, written once, and read without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_runs import fake_export, fake_run, full_run

from threefold.errors import DataError, RunError
from threefold.predictions.records import (
    VERSION,
    DuplicatesRecord,
    JobRecord,
    Record,
    TestLedger,
)
from threefold.predictions.results_schema import Results
from threefold.predictions.run_folder import RunFolder


def edit(path: Path, **changes: object) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree.pop("sha256", None)
    path.write_text(json.dumps({**tree, **changes}), encoding="utf-8")


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    folder = RunFolder(full_run(tmp_path / "run"))
    written = json.loads((folder.path / "results.json").read_text(encoding="utf-8"))

    results = folder.results

    assert results.as_json() == written
    assert Results.parse(results.as_json(), "again") == results
    assert results.score("mean", "ensemble", "test") in results.scores
    assert results.score("nobody", "ensemble", "test") is None


@pytest.mark.parametrize(
    ("version", "got"), [(VERSION + 1, f"got version {VERSION + 1}"), (None, "got no version")]
)
def test_another_version_is_one_clear_line(tmp_path: Path, version: int | None, got: str) -> None:
    folder = RunFolder(fake_run(tmp_path / "run", n=20))
    edit(folder.path / "results.json", version=version)

    with pytest.raises(RunError, match=f"another version.*expected version {VERSION}, {got}") as e:
        folder.results.as_json()

    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": "many"}, "the file is damaged.*threads"),
        ({"extra": 1}, "the file is damaged.*extra"),
        ({"seconds": None}, "the file is damaged.*seconds"),
    ],
)
def test_a_damaged_file_is_one_clear_line(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = RunFolder(fake_run(tmp_path / "run", n=20))
    edit(folder.path / "results.json", **changes)

    with pytest.raises(RunError, match=message) as e:
        folder.results.as_json()

    assert "\n" not in str(e.value)


def test_a_flipped_digit_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(fake_run(tmp_path / "run", n=20))
    folder.write_results(folder.results)
    path = folder.path / "results.json"
    text = path.read_text(encoding="utf-8")
    assert RunFolder(folder.path).results == folder.results
    digit = re.search(r'"accuracy": 0\.(\d)', text)
    assert digit is not None

    other = str((int(digit[1]) + 1) % 10)
    path.write_text(text[: digit.start(1)] + other + text[digit.end(1) :], encoding="utf-8")

    with pytest.raises(RunError, match=r"changed since the run wrote it.*as in manifest\.json"):
        RunFolder(folder.path).results.as_json()
    (folder.path / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"the file is damaged.*checksum"):
        RunFolder(folder.path).results.as_json()


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    folder = RunFolder(fake_run(tmp_path / "run", n=20))
    seconds = {"train": float("inf"), "export": 1.5}

    folder.write_results(folder.results.replace(seconds=seconds))

    text = (folder.path / "results.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert RunFolder(folder.path).results.seconds == seconds


def test_what_was_written_is_not_read_back(tmp_path: Path) -> None:
    folder = RunFolder(fake_run(tmp_path / "run", n=20))
    report = fake_export()
    folder.add_results("export", 8.5, export=report)
    stored = json.loads((folder.path / "results.json").read_text(encoding="utf-8"))

    (folder.path / "results.json").unlink()

    assert folder.results.seconds["export"] == stored["seconds"]["export"] == 8.5
    assert folder.results.export == report
    assert stored["export"] == report.as_json()


def test_a_run_is_read_without_torch(tmp_path: Path) -> None:
    path = fake_run(tmp_path / "run", n=20)
    code = (
        "import sys; from threefold.predictions.run_folder import RunFolder; "
        f"f = RunFolder.open({str(path)!r}); f.recipe, f.info, f.results, f.chosen; "
        "assert not {'torch', 'timm', 'filelock'} & set(sys.modules)"
    )

    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert process.returncode == 0, process.stderr


def renamed(tree: Any) -> Iterator[Any]:
    """Yield a tree of plain values with one key changed, for every key in it."""
    if isinstance(tree, list) and tree:
        yield from ([part, *tree[1:]] for part in renamed(tree[0]))
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield {(f"{key[:-1]}~" if k == key else k): v for k, v in tree.items()}
            yield from ({**tree, key: part} for part in renamed(value))


RECORDS: dict[str, tuple[type[Record], dict[str, Any]]] = {
    "ledger.json": (
        TestLedger,
        {"version": VERSION, "test_opened": [{"at": "now", "by": "train", "rows": 3}]},
    ),
    "done.json": (JobRecord, {"job": {}, "seconds": 1.0, "files": {}}),
    "duplicates.json": (
        DuplicatesRecord,
        {
            "count": 1,
            "pairs": [{"a": "x", "b": "y", "distance": 0.1, "same_label": None, "same_part": True}],
            "note": "",
        },
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_changed_key_is_one_clear_line(name: str) -> None:
    record, tree = RECORDS[name]
    record.parse(tree, name)
    trees = list(renamed(tree))

    assert len(trees) >= 3
    for changed in trees:
        with pytest.raises(RunError, match=name) as error:
            record.parse(changed, name)
        assert "\n" not in str(error.value)


def test_a_changed_key_of_run_json_says_what_helps(tmp_path: Path) -> None:
    path = fake_run(tmp_path / "run", n=20) / "run.json"
    tree = json.loads(path.read_text(encoding="utf-8"))

    for changed in renamed({key: tree[key] for key in tree if key not in ("versions", "roles")}):
        path.write_text(json.dumps({**changed, "versions": {}, "roles": {}}), encoding="utf-8")
        with pytest.raises(RunError, match=r"run\.json") as error:
            RunFolder(path.parent).info.as_json()
        assert "fix: " in str(error.value)


@pytest.mark.parametrize("kind", ["oof", "test"])
def test_damaged_labels_of_a_run_have_advice(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"{kind}.npz").write_bytes(b"no arrays")
    folder = RunFolder(tmp_path)

    with pytest.raises(DataError, match=rf"delete .*{kind}\.npz and run `threefold train .*again"):
        _ = folder.multilabel_oof if kind == "oof" else folder.all_multilabel_test
