"""Prediction of many images: batches, files that grow and go on, and devices."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from support.disk import files_up_to
from support.server import card, write_model

from threefold.errors import DataError, ExportError, RunError
from threefold.evaluation.saved import score_saved
from threefold.runtime import batches, devices, result_files
from threefold.runtime.batches import BatchSize, answer_images
from threefold.runtime.model import FULL, Model
from threefold.runtime.model_output import ModelOutput
from threefold.runtime.predict import Engine, find_images, parse_batch, write_predictions
from threefold.runtime.predict_file import FileSummary, predict_to_file
from threefold.runtime.tolerances import TOLERANCES

CANVAS = [{"filter": "triangle, antialiased", "resize": "crop", "pixels": 6}]
COUNT = 23


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of a few sizes, smaller and larger than the canvas, one of them unreadable."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(COUNT):
        height, width = rng.choice([3, 8, 11], 2)
        pixels = rng.integers(0, 256, (height, width, 3)) // rng.integers(1, 9)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}, é.png")
    (folder / "07, é.png").write_bytes(b"no image")
    return folder


def make_model(folder: Path, canvas: bool = True) -> Path:
    changes = {"preprocessing": CANVAS} if canvas else {}
    return write_model(folder / "m.onnx", model_card=card(**changes))


def predict(model: Path, images: Path, target: Path, **options: object) -> FileSummary:
    return predict_to_file(target, lambda _: None, model, [str(images)], **options)  # type: ignore[arg-type]


def read_rows(target: Path) -> list[tuple[str, str]]:
    """The path and the class in each row."""
    if target.suffix == ".jsonl":
        lines = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
        return [(line["image"], line["label"]) for line in lines]
    if target.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(target)
        return [*zip(*(table[name].to_pylist() for name in ("path", "prediction")), strict=True)]
    with target.open(encoding="utf-8", newline="") as stream:
        return [(row["path"], row["prediction"]) for row in csv.DictReader(stream)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_one_process_at_a_time_writes_a_file(images: Path, tmp_path: Path, suffix: str) -> None:
    model, target = make_model(tmp_path), tmp_path / f"answers{suffix}"

    with (
        FileLock(tmp_path / f".{target.name}.lock"),
        pytest.raises(
            RunError, match=r"another process is writing this file.*choose another --out"
        ),
    ):
        predict(model, images, target)
    assert not target.exists()
    predict(model, images, target)

    assert len(read_rows(target)) == COUNT - 1
    assert {path.name for path in tmp_path.glob(".*")} == set()


@pytest.mark.parametrize("canvas", [True, False])
@pytest.mark.parametrize("size", [0, 1, 5, 64])
def test_batches_answer_as_one_image_at_a_time(
    tmp_path: Path, images: Path, canvas: bool, size: int
) -> None:
    model = Model(make_model(tmp_path, canvas))
    paths = [str(path) for path in find_images([str(images)])]
    firsts = []

    answers = [
        *answer_images(model, paths, BatchSize(size), lambda first: firsts.append(first) or FULL)
    ]

    assert [answer.path for answer in answers] == paths
    assert len(firsts) == 1
    for i, (path, output, error) in enumerate(answers):
        assert (output is None) == (error is not None) == (i == 7)
        if output is not None:
            alone = model.run(model.fit_canvas(np.asarray(Image.open(path)))[None])
            np.testing.assert_allclose(output.probs, alone.probs, atol=1e-6)
            np.testing.assert_allclose(output.member_probs, alone.member_probs, atol=1e-6)


def test_an_archive_of_images_names_unpacking(tmp_path: Path, images: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", images)

    with pytest.raises(DataError, match=r"photos\.zip; fix: unpack it, and give the folder"):
        list(find_images([archive]))


def test_images_wait_in_bounded_memory(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(make_model(tmp_path))
    path = str(next(find_images([str(images)])))
    monkeypatch.setattr(batches, "AHEAD_PIXELS", 10 * 6 * 6)
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield path

    answers = answer_images(model, endless(), BatchSize(64), lambda _: FULL, threads=2)  # type: ignore[arg-type]
    for _ in range(64):
        next(answers)
    answers.close()  # type: ignore[attr-defined]

    assert taken <= 64 + 10


@pytest.mark.parametrize(("cores", "takes_turns"), [(2, True), (8, False)])
def test_few_cores_decode_and_answer_in_turns(
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    takes_turns: bool,
) -> None:
    monkeypatch.setattr(batches, "usable_cores", lambda: cores)
    model, paths = Model(make_model(tmp_path)), [str(next(find_images([str(images)])))] * 200
    is_running, both = threading.Event(), []
    run, decode = model.run, batches.decode

    def slow_run(*arguments: Any) -> ModelOutput:
        is_running.set()
        time.sleep(0.02)
        is_running.clear()
        return run(*arguments)

    def slow_decode(path: str) -> np.ndarray:
        both.append(is_running.is_set())
        time.sleep(0.001)
        return decode(path)

    monkeypatch.setattr(model, "run", slow_run)
    monkeypatch.setattr(batches, "decode", slow_decode)

    answers = [*answer_images(model, paths, BatchSize(8), lambda _: FULL, threads=2)]

    assert [answer.path for answer in answers] == paths
    assert any(both) == (not takes_turns)


def test_a_batch_that_fails_is_answered_in_halves(tmp_path: Path, images: Path) -> None:
    model, batch = Model(make_model(tmp_path)), BatchSize(16)
    run, sizes = model.session.run, []

    def of_few(outputs: object, inputs: dict[str, np.ndarray], options: object) -> object:
        sizes.append(len(inputs["images"]))
        if sizes[-1] > 4:
            raise ExportError("the model cannot answer", got="it needs more memory than allowed")
        return run(outputs, inputs, options)

    model.session.run = of_few
    paths = [str(path) for path in find_images([str(images)])]

    answers = [*answer_images(model, paths, batch, lambda _: FULL)]

    assert sum(answer.output is not None for answer in answers) == COUNT - 1
    assert batch.size == 3
    assert max(sizes[-3:]) <= 4


def test_auto_takes_the_fastest_size() -> None:
    seconds = {1: 1.0, 4: 2.0, 16: 4.0, 64: 40.0}
    batch = BatchSize()

    tried = []
    for _ in range(10):
        tried.append(batch.size)
        batch.observe(batch.size - 1, 1e-9)  # a part of a batch says nothing
        batch.observe(batch.size, seconds[batch.size])

    assert tried == [1, 1, 4, 4, 16, 16, 64, 64, 16, 16]


@pytest.mark.parametrize("text", ["0", "", "1025", "-1", "many", "1.5"])
def test_a_batch_that_is_no_number_is_refused(text: str) -> None:
    assert parse_batch("auto") == 0
    with pytest.raises(DataError, match="expected auto, or 1 to 1024"):
        parse_batch(text)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_file_goes_on_after_its_last_whole_row(
    tmp_path: Path, images: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    model, target = make_model(tmp_path, canvas=False), tmp_path / f"r.{suffix}"
    whole = tmp_path / f"whole.{suffix}"
    predict(model, images, whole)
    monkeypatch.setattr(result_files, "PART_ROWS", 2)
    monkeypatch.setattr("threefold.runtime.predict_file.FLUSH_SECONDS", 0.0)

    def stop(done: int, total: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(model, images, target, engine=Engine(batch=1), progress=stop)
    if suffix != "parquet":
        os.truncate(target, target.stat().st_size - 5)
    done = predict(model, images, target)
    again = predict(model, images, target)

    assert done.resumed == (15 if suffix == "parquet" else 14)
    assert (done.images, done.failed) == (COUNT, 1)
    assert (again.resumed, again.failed) == (COUNT, 1)
    assert read_rows(target) == read_rows(whole)
    assert len(read_rows(target)) == COUNT - 1
    assert {path.name for path in tmp_path.glob("r.*")} == {
        target.name,
        f"{target.name}.state.json",
    }


def test_every_cut_of_a_csv_file_is_repaired(tmp_path: Path, images: Path) -> None:
    model, target = make_model(tmp_path), tmp_path / "r.csv"
    (images / 'a "quoted"\r\nname.png').write_bytes((images / "00, é.png").read_bytes())
    predict(model, images, target)
    whole = target.read_bytes()

    for length in range(0, len(whole), 61):
        target.write_bytes(whole[:length])
        predict(model, images, target)
        assert target.read_bytes() == whole, length


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_evaluate_reads_the_file(tmp_path: Path, images: Path, suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    model, target = make_model(tmp_path), tmp_path / f"r.{suffix}"
    for name in ("blue", "red"):
        (images / name).mkdir()
    for i, path in enumerate(sorted(images.glob("*.png"))):
        path.rename(images / ("red" if i % 2 else "blue") / path.name)
    predict(model, images, target)

    summary, rows = score_saved([target], labels="folder")

    expected = [Path(path).parent.name == label for path, label in read_rows(target)]
    assert summary.scores[0].accuracy == np.mean(expected)
    assert rows.probs.shape[1:] == (COUNT - 1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "images/00, é.png").unlink(), "another list of images"),
        (lambda f: (f / "images/00, é.png").rename(f / "images/z.png"), "another list of images"),
        (
            lambda f: write_model(f / "m.onnx", model_card=card(name="b")),
            "results are of another m",
        ),
        (lambda f: (f / "r.csv.state.json").unlink(), "there is a file already"),
        (lambda f: (f / "r.csv").write_text("a,b\r\nc,d\r\n"), "was changed, or is damaged"),
        (lambda f: (f / "r.csv.state.json").write_text("[]"), "another list of images"),
    ],
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, images: Path, change: Callable[[Path], object], message: str
) -> None:
    model, target = make_model(tmp_path), tmp_path / "r.csv"
    predict(model, images, target)
    change(tmp_path)
    before = target.read_bytes()

    with pytest.raises(RunError, match=message):
        predict(model, images, target)

    assert target.read_bytes() == before


def test_other_suffixes_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ends in \.csv, \.jsonl, \.parquet, got \.xls"):
        predict(tmp_path / "none.onnx", tmp_path, tmp_path / "r.xls")


def test_a_missing_device_says_what_installs_it(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"pip install 'onnxruntime-gpu\[cuda,cudnn\]'"):
        Model(make_model(tmp_path), device="cuda")
    with pytest.raises(ExportError, match="expected cpu, cuda, coreml, openvino, got tpu"):
        Model(make_model(tmp_path), device="tpu")


def test_a_device_that_falls_back_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Model(make_model(tmp_path)).session
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]

    # As a session that was opened for CUDA becomes on a machine without its libraries.
    with pytest.raises(ExportError, match=r"cannot use the device: --device cuda; .*got CPUExec"):
        devices.require_device(session, "cuda")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    with pytest.raises(ExportError, match=r"cuda cannot open the model.*leave --device out"):
        Model(make_model(tmp_path), device="cuda")


def test_a_device_is_compared_with_the_cpu(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package of the CPU has one more provider, which leaves the work to the CPU.
    azure = devices.Device("AzureExecutionProvider", {}, "")
    monkeypatch.setattr(devices, "DEVICES", {**devices.DEVICES, "azure": azure})
    model = make_model(tmp_path)
    told: list[object] = []

    with (tmp_path / "answers.csv").open("w") as stream:
        words = (stream, told.append, model, [str(images)], 1, "csv", FULL)
        assert write_predictions(*words, Engine("azure", 0)) == 1
        strict = TOLERANCES["float32"]._replace(difference=-1.0)
        monkeypatch.setitem(TOLERANCES, "float32", strict)  # type: ignore[arg-type]
        with pytest.raises(ExportError, match="answers differently from the CPU"):
            write_predictions(*words, Engine("azure", 0))

    assert (
        told[0] == "azure against the CPU on 15 images: largest difference 0.0e+00 (allowed 0.0001)"
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_full_disk_loses_no_answer(
    tmp_path: Path, images: Path, suffix: str, part: float
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    model, whole = make_model(tmp_path), tmp_path / f"whole{suffix}"
    predict(model, images, whole)
    target = tmp_path / f"cut{suffix}"

    with (
        files_up_to(max(400, int(part * whole.stat().st_size))),  # the state beside it fits
        pytest.raises(RunError, match=r"cannot write: .*fix: raise the limit on the size"),
    ):
        predict(model, images, target)
    predict(model, images, target)

    assert read_rows(target) == read_rows(whole)
    assert not [*tmp_path.glob("*.parts"), *tmp_path.glob(".*.tmp")]


def test_a_failed_write_is_not_repeated_as_rows(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = make_model(tmp_path), tmp_path / "a.csv"
    monkeypatch.setattr("threefold.runtime.predict_file.FLUSH_SECONDS", 0.0)
    rows, append = [], result_files.CsvFile.append

    def fail_once(self: result_files.CsvFile, answers: list[dict[str, object]]) -> None:
        rows.extend(answers)
        if len(rows) == 3 and answers:
            raise RunError("cannot write")
        append(self, answers)

    with monkeypatch.context() as patch:
        patch.setattr(result_files.CsvFile, "append", fail_once)
        with pytest.raises(RunError, match="cannot write"):
            predict(model, images, target)

    assert len(rows) == 3
    predict(model, images, target)
    assert len(read_rows(target)) == COUNT - 1


# Tables and shards


def test_a_table_needs_no_labels(images: Path, tmp_path: Path) -> None:
    model, target = make_model(tmp_path), tmp_path / "answers.csv"
    names = [f"images/{i:02d}, é.png" for i in (3, 7, 1)]
    table = tmp_path / "new.csv"
    table.write_text("file,note\n" + "\n".join(f'"{name}",x' for name in names), "utf-8")

    summary = predict(model, table, target)

    assert [path for path, _ in read_rows(target)] == [str(tmp_path / names[i]) for i in (0, 2)]
    assert (summary.images, summary.failed) == (3, 1)


def test_shards_are_predicted_by_key(images: Path, tmp_path: Path) -> None:
    model, target = make_model(tmp_path), tmp_path / "answers.csv"
    files = sorted(images.iterdir())
    expected = read_answers(model, files, tmp_path)
    with tarfile.open(tmp_path / "new-000.tar", "w") as tar:
        for i, file in enumerate(files):
            tar.add(file, f"{i:02d}.png")

    summary = predict(model, tmp_path / "new-{000..000}.tar", target)

    answers = read_rows(target)
    assert [name for name, _ in answers] == [f"new-000/{i:02d}" for i in range(COUNT) if i != 7]
    assert [label for _, label in answers] == expected
    assert (summary.images, summary.failed) == (COUNT, 1)


def read_answers(model: Path, files: list[Path], folder: Path) -> list[str]:
    """The classes of readable files."""
    target = folder / "expected.csv"
    predict_to_file(target, lambda _: None, model, [str(file) for file in files])
    return [label for _, label in read_rows(target)]
