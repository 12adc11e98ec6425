"""The comparison with peers: sets keep their groups apart, and the tables do their sums right."""

from __future__ import annotations

import csv
import tarfile
from pathlib import Path

import numpy as np
import pytest
from development_sets import SETS, images_of, prepare
from hits import pack_hits
from peer_systems import EpochTimes, Schedule, networks_to_train, schedule
from peer_tables import (
    OURS,
    Promise,
    Result,
    compare,
    digest_names,
    error_ratios,
    print_tables,
    read_results,
)
from PIL import Image

from threefold.errors import DataError


def make_result(
    system: str, accuracy: float | None, name: str = "elpv", **changes: object
) -> Result:
    result = Result(
        set=name,
        system=system,
        minutes=1.0,
        seconds=50.0,
        peak_gb=1.0,
        status="ok",
        hardware="a machine",
        threads=2,
        date="2026-01-01",
        commit="abc",
        versions={"torch": "2"},
        accuracy=accuracy,
        log_loss=0.5,
        images=10,
    )
    return result._replace(**changes)


def write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), shade).save(path)


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as stream:
        for path in sorted(folder.iterdir()):
            stream.add(path, path.name)


def test_pupils_stay_on_one_side(tmp_path: Path) -> None:
    rows = []
    for pupil in range(6):
        for label in range(2):
            name = f"{label}/IMG_{pupil}{label}.JPG"
            write_image(tmp_path / "source" / "sign_digits" / name, shade=pupil)
            part = "test" if pupil in (1, 4) else "train"
            rows.append({"path": name, "split": part, "label": label, "group": f"run00{pupil}"})
    table = tmp_path / "source" / "sign_digits" / "splits.csv"
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pack(tmp_path / "source", tmp_path / "sign_digits.tar.gz")

    folder = prepare("sign_digits", tmp_path, tmp_path / "sets")

    groups = {}
    for part in ("train", "test"):
        names = [path.name for path, _ in images_of(folder / part)]
        groups[part] = SETS["sign_digits"].groups(names)
    assert sorted(set(groups["train"])) == ["run000", "run002", "run003", "run005"]
    assert sorted(set(groups["test"])) == ["run001", "run004"]
    assert len(groups["train"]) == 8


def test_small_cifar_takes_the_first_200_by_name(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            for number in range(203):
                write_image(tmp_path / "source" / part / name / f"{number:04d}.png", shade=number)
    pack(tmp_path / "source", tmp_path / "cifar10_jpeg.tar.gz")

    folder = prepare("cifar10", tmp_path, tmp_path / "sets")

    for part in ("train", "test"):
        images = images_of(folder / part)
        assert [c for _, c in images] == ["cat"] * 200 + ["dog"] * 200
        assert {path.name for path, _ in images} == {f"{i:04d}.png" for i in range(200)}


def test_a_file_without_its_group_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no group .* in cell3"):
        SETS["elpv"].groups(["block001_cell1.jpg", "cell3.jpg"])


def test_epochs_fill_the_time() -> None:
    epoch = EpochTimes(head=10.0, whole=30.0)

    assert schedule(105.0, epoch) == Schedule(head=1, whole=3)
    assert schedule(39.0, epoch) == Schedule(head=3, whole=0)
    assert schedule(9.0, epoch) == Schedule(head=0, whole=0)


def test_fewer_networks_where_epochs_would_be_few() -> None:
    epoch = EpochTimes(head=10.0, whole=30.0)

    # Costs are 1, 1.5 and 2, and each network should get one epoch of its head and three of all.
    assert networks_to_train(450.0, epoch) == 3
    assert networks_to_train(449.0, epoch) == 2
    assert networks_to_train(249.0, epoch) == 1


def test_ratio_of_errors_uses_the_sets_of_both() -> None:
    results = [
        make_result(OURS, 0.9, "elpv"),
        make_result(OURS, 0.8, "demo"),
        make_result(OURS, 0.5, "trashnet"),
        make_result("fastai", 0.8, "elpv"),
        make_result("fastai", 0.8, "demo"),
        make_result("fastai", None, "trashnet", status="did not finish"),
        make_result("probe", 0.6, "elpv"),
        make_result("probe", 0.9, "demo"),
        make_result("probe", 0.5, "trashnet", minutes=2.0),
    ]

    ratios = error_ratios(results, minutes=1.0)

    assert ratios["fastai"] == (pytest.approx(0.3 / 0.4), 2)
    assert ratios["probe"] == (pytest.approx(0.3 / 0.5), 2)
    assert ratios["best"] == (pytest.approx(0.3 / 0.3), 2)


def answered(system: str, correct: list[bool], names: list[str], name: str = "demo") -> Result:
    return make_result(
        system,
        float(np.mean(correct)),
        name,
        images=len(correct),
        hits=pack_hits(np.array(correct)),
        names=digest_names(names),
    )


def test_the_paired_test_counts_images() -> None:
    names = [f"{i}.png" for i in range(8)]
    ours = answered(OURS, [True] * 8, names)
    peer = answered("probe", [True] + [False] * 7, names)

    test = compare(ours, peer)

    assert (test.only_a, test.only_b) == (7, 0)
    assert test.p == pytest.approx(2 / 2**7)


def test_answers_to_other_images_are_not_compared() -> None:
    names = [f"{i}.png" for i in range(8)]
    ours = answered(OURS, [True] * 8, names)
    peer = answered("probe", [True] * 8, names[::-1])

    with pytest.raises(DataError, match="different images: demo, threefold, probe"):
        compare(ours, peer)


def test_the_table_compares_by_groups(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"block{i // 4}_{i}.png" for i in range(16)]
    ours = answered(OURS, [True] * 16, names, "elpv")
    peer = answered("probe", [False] * 8 + [True] * 8, names, "elpv")

    print_tables([ours, peer], {"elpv": [name.partition("_")[0] for name in names]})
    by_groups = capsys.readouterr().out
    print_tables([ours, peer])
    by_images = capsys.readouterr().out

    assert "8 : 0, p = 0.5" in by_groups
    assert "8 : 0, p = 0.0078" in by_images


def test_results_survive_their_file_and_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    kept = make_result(OURS, 0.9, promise=Promise(0.88, 0.85, 0.89, 100), seconds=70.0)
    results = [kept, make_result("fastai", None, status="did not finish")]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(result.to_json()) + "\n" for result in results))

    read = read_results(path)
    print_tables(read)

    assert read == results
    assert not kept.promise_holds
    printed = capsys.readouterr().out
    assert "| elpv | 1 | 0.900 / 0.500 (70*) | did not finish |" in printed
    assert "0.880 [0.850, 0.890] | no |" in printed
    assert "covers the test accuracy in 0 of 1 runs" in printed
