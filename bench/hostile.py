"""Try inputs as the world makes them, and count what comes of each.

    uv run python bench/hostile.py [--only TEXT] [--verbose]

Every probe makes a small input and says what is right: a value, or a refusal whose one line has
certain words. `right` = the value; `refused clearly` = a ThreefoldError of one line with the words;
`wrong` = another value, another message, or a traceback. The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import tempfile
import traceback
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_runs
import hostile_serving
import hostile_weights
import numpy as np
from hostile_probe import Probe, Refusal
from PIL import Image

from threefold.data.dataset import Sources
from threefold.data.images import decode
from threefold.data.load import load_data
from threefold.errors import ThreefoldError
from threefold.predictions.formats import read_predictions
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import DataSpec
from threefold.runtime.predict import find_images


def paint(root: Path, *names: str) -> Path:
    """Write images of one shade each, as PNG whatever their names."""
    for shade, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), shade, np.uint8)).save(path, "PNG")
    return root


def classes_in(root: Path, *parts: str, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write two images of each class into each part."""
    return paint(root, *(f"{p}/{c}/{i}.png" for p in parts for c in classes for i in range(2)))


def load(root: Path, source: str = "folder", **options: Any) -> Sources:
    """Load a data set as a recipe does."""
    return load_data(DataSpec.model_validate({"source": source, "root": str(root), **options}), 0)


def counts(sources: Sources) -> tuple[int, int]:
    """Numbers of training and test images."""
    return len(sources.train), 0 if sources.test is None else len(sources.test)


def folders() -> Iterator[Probe]:
    """Folders of images, and what lies in them."""
    pairs = [
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("trainset", "testset"),
        ("TRAIN", "test1"),
    ]
    for train, test in pairs:
        yield Probe(
            f"folder: {train}/ {test}/",
            lambda root, pair=(train, test): counts(load(classes_in(root, *pair))),
            (4, 4),
        )
    for parts in (("fold_0", "fold_1"), ("a", "b")):
        yield Probe(
            f"folder: {' '.join(parts)} hold the same",
            lambda root, parts=parts: load(classes_in(root, *parts)),
            Refusal("read like parts of one data set"),
        )
    for test in ("test", "test1"):
        yield Probe(
            f"folder: flat train/ {test}/",
            lambda root, test=test: load(paint(root, "train/cat.1.png", f"{test}/1.png")),
            Refusal("neither split nor"),
        )
    for name in (".NET", "Ã\x89clair", "a\tb", "a\nb"):
        yield Probe(
            f"folder: a class {name!r}",
            lambda root, name=name: load(classes_in(root, ".", classes=(name, "java", "rust"))),
            Refusal("hidden folder|control characters"),
        )
    yield Probe("folder: accents of macOS", _accents, ("café", "thé"))
    yield Probe("folder: what predict reads", _walk, ["a/1.jpg", "a/2", "b/3.png"])


def _accents(root: Path) -> tuple[str, ...]:
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    return load(classes_in(root, ".", classes=(*forms, "thé"))).train.classes


def _walk(root: Path) -> list[str]:
    paint(
        root, "a/1.jpg", "a/2", "elsewhere/3.png", "a/._1.jpg", "__MACOSX/x.png", "a/@eaDir/y.png"
    )
    (root / "elsewhere").rename(root.parent / "elsewhere")
    (root / "b").symlink_to(root.parent / "elsewhere")
    os.mkfifo(root / "a/pipe.png")
    return [path.relative_to(root).as_posix() for path in find_images([str(root)])]


def tables() -> Iterator[Probe]:
    """CSV files of images."""
    for name in ("Split", "SPLIT"):
        yield Probe(f"csv: {name}", lambda root, name=name: counts(_csv(root, name)), (4, 2))
    for name in ("subset", "is_valid", "Fold", "group_id", "label"):
        yield Probe(
            f"csv: {name}",
            lambda root, name=name: _csv(root, name),
            Refusal("would not be read|two columns"),
        )

    for name, row, right in (
        ("a column for each class", "i5,0,1", (6, 0)),
        ("two classes of an image", "i5,1,1", Refusal("exactly one class.*multi-label")),
        ("no class of an image", "i5,0,0", Refusal("exactly one class.*multi-label")),
    ):
        yield Probe(f"csv: {name}", lambda root, row=row: counts(_one_hot(root, row)), right)


def _one_hot(root: Path, row: str) -> Sources:
    """A table as ISIC publishes them, with this last row."""
    paint(root, *(f"images/i{i}.png" for i in range(6)))
    rows = [f"i{i},{1.0 - i % 2},{float(i % 2)}" for i in range(5)]
    (root / "x.csv").write_text("\n".join(["image,MEL,NV", *rows, row]))
    return load(root / "x.csv", "csv")


def _csv(root: Path, column: str) -> Sources:
    paint(root, *(f"{i}.png" for i in range(6)))
    rows = [f"{i}.png,{'ab'[i % 2]},{'test' if i > 3 else 'train'}" for i in range(6)]
    (root / "x.csv").write_text("\n".join([f"path,label,{column}", *rows]))
    return load(root / "x.csv", "csv")


def images() -> Iterator[Probe]:
    """Files of images, and what only looks like one."""
    row = np.zeros((1, 200), np.float32)
    row[0, :3] = 0, 0.5, 1
    for outlier in (1.0000001, 9.0, -1e-9):
        spoilt = row.copy()
        spoilt[0, 3] = outlier
        yield Probe(
            f"image: float TIFF with a pixel of {outlier}",
            lambda _, values=spoilt: decode(_encode(values))[0, :3, 0].tolist(),
            [0, 128, 255],
        )
    for kind in (np.uint16, np.int32):
        values = np.array([[0, 255, 257]], kind)
        yield Probe(
            f"image: {np.dtype(kind).name} of at most 257",
            lambda _, values=values: decode(_encode(values))[0, :, 0].tolist(),
            [0, 1, 1],
        )
    others = {
        b"<!doctype html><p>404": "an HTML page",
        b"version https://git-lfs.github.com/spec/v1": "git lfs pull",
        b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom": "a video",
        b"\0" * 4096: "zero bytes",
        b"": "empty",
    }
    for content, words in others.items():
        yield Probe(f"image: {words}", lambda _, content=content: decode(content), Refusal(words))


def _encode(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    return stream.getvalue()


def predictions() -> Iterator[Probe]:
    """Predictions of other programs, with their labels beside them."""
    for column in ("id", "image_id", "Id", "image", "file", "filename", "Nummer"):
        yield Probe(f"labels: ids in {column}", lambda root, c=column: _accuracy(root, c), 1.0)
    yield Probe(
        "labels: ids of other images",
        lambda root: _accuracy(root, "image_id", "z"),
        Refusal("no column of the table of labels has the ids"),
    )
    wrong = {
        "percentages": np.array([[90.0, 10], [20, 80]]),
        "sigmoid": np.array([[0.9, 0.8], [0.2, 0.9]]),
        "transpose": np.array([[0.9, 0.2, 0.3], [0.1, 0.8, 0.7]]),
        "bfloat16": np.full((2, 2), 0.50390625),
        "softmax": np.array([[3.0, -1], [2, 5]]),
    }
    for words, probs in wrong.items():
        yield Probe(
            f"probs: {words}",
            lambda root, probs=probs: _read_array(root, probs),
            Refusal(words),
        )


def _accuracy(root: Path, column: str, prefix: str = "") -> float:
    names, labels = ["img1.jpg", "img2.jpg", "img3.jpg"], ["cat", "dog", "dog"]
    np.savez(root / "x.npz", probs=np.eye(2)[[0, 1, 1]], ids=names, classes=["cat", "dog"])
    rows = [f"{prefix}{name},{label}" for name, label in zip(names, labels, strict=True)]
    (root / "t.csv").write_text("\n".join([f"{column},label", *rows[::-1]]))
    read = read_predictions(root / "x.npz", labels=root / "t.csv")
    return float((read.probs[0].argmax(-1) == read.labels).mean())


def _read_array(root: Path, probs: np.ndarray) -> Any:
    np.savez(root / "x.npz", probs=probs, labels=np.zeros(len(probs), int))
    return read_predictions(root / "x.npz")


def recipes() -> Iterator[Probe]:
    """Recipes that no person has typed."""
    text = (
        'stages = [{name = "a", epochs = 1, lr = 0.1}]\nmembers = [{name = "m", backbone = "b"}]\n'
    )
    for encoding in ("utf-8-sig", "utf-16"):
        yield Probe(
            f"recipe: {encoding}",
            lambda root, e=encoding: _recipe(root, text.encode(e)).name,
            "run",
        )
    for odd in ("seed = " + "9" * 5000, "a = " + "[" * 5000, "data.group_regex = 'a{99999999999}'"):
        yield Probe(
            f"recipe: {odd[:24]}",
            lambda root, odd=odd: _recipe(root, f"{odd}\n{text}".encode()),
            Refusal("recipe is (invalid|not valid)"),
        )


def _recipe(root: Path, content: bytes) -> Recipe:
    (root / "x.toml").write_bytes(content)
    return Recipe.load(root / "x.toml")


def judge(probe: Probe) -> tuple[str, str]:
    """Run a probe; return its outcome and what threefold said."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        root.mkdir()
        try:
            said = probe.run(root)
        except ThreefoldError as error:
            message = str(error)
            is_clear = isinstance(probe.right, Refusal) and re.search(probe.right.words, message)
            return ("refused clearly" if is_clear and "\n" not in message else "wrong"), message
        except Exception:
            return "wrong", traceback.format_exc()
    is_right = not isinstance(probe.right, Refusal) and said == probe.right
    return ("right" if is_right else "wrong"), repr(said)[:200]


def main() -> int:
    """Run the probes, print what is wrong and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="probes whose name has this text")
    parser.add_argument("--verbose", action="store_true", help="print every answer")
    args = parser.parse_args()
    outcomes: Counter[str] = Counter()
    groups = [folders, tables, images, predictions, recipes]
    groups += [
        hostile_serving.blocks_beside_pixels,
        hostile_serving.models,
        hostile_serving.requests,
        hostile_runs.runs,
        hostile_weights.weights,
        hostile_weights.hub,
    ]
    for group in groups:
        for probe in group():
            if args.only not in probe.name:
                continue
            outcome, said = judge(probe)
            outcomes["tried"] += 1
            outcomes[outcome] += 1
            if args.verbose or outcome == "wrong":
                print(f"{outcome:16}{probe.name}: {said}")
    print(
        ", ".join(f"{outcomes[key]} {key}" for key in ("tried", "right", "refused clearly")), end=""
    )
    print(f", {outcomes['wrong']} wrong")
    return 1 if outcomes["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
