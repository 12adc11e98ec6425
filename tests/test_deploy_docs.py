"""The program of docs/deploy.md without threefold is short and answers like `threefold.load`."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.paths import ROOT
from support.server import UNCERTAIN, card, write_model

import threefold
from threefold.data.images import decode
from threefold.training.run import Run

DOCS = ROOT / "docs/deploy.md"
ALONE = """
import sys, runpy
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "threefold":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def program() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return str(block)


def images(folder: Path) -> list[Path]:
    """Files of every kind that the program says it reads."""
    rng = np.random.default_rng(3)
    rgb, rgba = (rng.integers(0, 256, (31, 47, c)).astype(np.uint8) for c in (3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, glass = Image.fromarray(rgb), Image.fromarray(rgba)
    made = {
        "rgb.png": (plain, {}),
        "grey.png": (plain.convert("L"), {}),
        "palette.png": (plain.convert("P"), {"transparency": 3}),
        "glass.png": (glass, {}),
        "la.png": (glass.convert("LA"), {}),
        "side.jpg": (plain, {"exif": exif}),
        "side.png": (plain, {"exif": exif}),
        "cmyk.jpg": (plain.convert("CMYK"), {}),
        "glass.webp": (glass, {"lossless": True}),
        "a.gif": (plain, {}),
        "a.bmp": (plain, {}),
        "a.tif": (plain, {}),
        "deep.png": (Image.fromarray(rgb[..., 0].astype(np.uint16) * 250), {}),
        "deep.tif": (Image.fromarray(rgb[..., 1].astype(np.uint16) * 255), {}),
    }
    for name, (image, options) in made.items():
        buffer = io.BytesIO()
        image.save(
            buffer,
            {".jpg": "JPEG", ".tif": "TIFF"}.get(Path(name).suffix, Path(name).suffix[1:].upper()),
            **options,
        )
        (folder / name).write_bytes(buffer.getvalue())
    return [folder / name for name in made]


def test_it_is_short_and_knows_three_packages() -> None:
    text = program()
    assert len([line for line in text.splitlines() if line.strip()]) <= 20
    assert not re.search(r"import threefold|from threefold", text)
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)) == {
        "json",
        "numpy",
        "PIL",
    }
    assert "onnxruntime" in text


def test_it_decodes_and_answers_as_threefold_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = images(tmp_path)
    model = write_model(tmp_path / "m.onnx", model_card=card(**UNCERTAIN))
    monkeypatch.setattr(sys, "argv", ["program", str(model), *map(str, files)])
    names: dict[str, object] = {}
    exec(compile(program(), str(DOCS), "exec"), names)
    for path in files:
        assert np.array_equal(names["decode"](path), decode(path)), path.name  # type: ignore[operator]
    loaded = threefold.load(model)
    expected = []
    for path, probs in zip(files, loaded.predict_proba(files), strict=True):
        best = np.argsort(-probs, kind="stable")
        expected.append(
            f"{path}: " + ", ".join(f"{loaded.classes[i]} {probs[i]:.1%}" for i in best)
        )
    assert capsys.readouterr().out.splitlines() == expected


def test_it_runs_where_threefold_is_not_installed(finished: Run, tmp_path: Path) -> None:
    """On a real run's file; the lines are those of `threefold predict`, which adds the set."""
    (tmp_path / "program.py").write_text(program(), encoding="utf-8")
    paths = [str(Path(finished.recipe.data.root) / i) for i in finished.sources.test.ids[:3]]  # type: ignore[union-attr]
    words = [str(finished.dir / "model.onnx"), *paths]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "program.py"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    told = subprocess.run(
        [sys.executable, "-m", "threefold", "predict", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [line.partition(";")[0] for line in told.stdout.splitlines()]
