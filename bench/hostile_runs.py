"""Probes of `hostile.py` for run folders: edited recipes, damaged files, what lies in their place.

One tiny run is trained, scored and exported; every probe damages a copy of it.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from hostile_probe import Probe, Refusal
from PIL import Image
from tiny_recipe import tiny_recipe

from threefold import api
from threefold.errors import ThreefoldError
from threefold.evaluation.saved import evaluate_saved
from threefold.exporting.export import export
from threefold.files import sha256
from threefold.npz_files import read_arrays, write_arrays
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Job, Recipe
from threefold.report.pages import write_report
from threefold.runtime.model import Model
from threefold.training.pixel_cache import PixelCache
from threefold.training.run import Run

JOB = Job("m", 1, "tune")
FLIPS = 24
"""Bits flipped in each file, evenly spread."""


@functools.cache
def _workplace() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hostile")


@functools.cache
def finished() -> Path:
    """A run of one network without pretrained weights: a head on its features, then one epoch."""
    base = Path(_workplace().name)
    os.environ["THREEFOLD_CACHE"] = str(base / "cache")
    rng = np.random.default_rng(0)
    for name, colour in {"red": (200, 60, 60), "blue": (60, 60, 200)}.items():
        for number in range(12):
            pixels = np.clip(rng.normal(colour, 50, (32, 32, 3)), 0, 255).astype(np.uint8)
            path = base / "images" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    recipe = Recipe.parse(tiny_recipe(str(base / "images")))
    api.finish(api.train(recipe, base / "run"))
    return base / "run"


def copy(root: Path) -> Path:
    """Copy the run to where it can be damaged."""
    return Path(shutil.copytree(finished(), root / "run"))


def train(run: Path) -> None:
    """Train as `threefold train RUN/recipe.toml --out RUN` does."""
    api.train(Recipe.load(run / "recipe.toml"), run)


def train_again(run: Path) -> None:
    """Train after the summaries were deleted, so that the files of the jobs are read."""
    for name in ("results.json", "oof.npz"):
        (run / name).unlink(missing_ok=True)
    train(run)


def hashes(run: Path) -> dict[str, str]:
    """SHA-256 of all weights and arrays."""
    paths = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".npz")]
    return {path.relative_to(run).as_posix(): sha256(path) for path in paths}


def runs() -> Iterator[Probe]:
    """Run folders that were edited or damaged."""
    edited = Refusal("edited after the run began.*fix: undo the change, or train")
    yield Probe("run: another seed after a kill", _seed_after_kill, edited)
    yield Probe("run: export after another seed", lambda r: _no_file(r, _export_edited), edited)
    for name, verb in {"report": lambda run: write_report([run]), "ensemble": _evaluate}.items():
        yield Probe(f"run: {name} after another seed", lambda r, v=verb: v(_edit(copy(r))), edited)
    yield Probe("run: a deleted fold", _deleted_fold, True)
    yield Probe("run: damaged cached features", _damaged_features, True)
    yield Probe("run: damaged cached images", _damaged_squares, True)
    advice = Refusal("fix: delete .*jobs/m/fold1 and run `threefold train ")
    for name, damage in {
        "a bit flipped": flip,
        "cut short": lambda path: path.write_bytes(path.read_bytes()[:100]),
        "deleted": Path.unlink,
        "of another fold": _other_fold,
        "text": lambda path: path.write_text("probs"),
    }.items():
        yield Probe(
            f"run: probs.npz {name}",
            lambda root, damage=damage: _train_damaged(root, "probs.npz", damage),
            advice,
        )
    yield Probe("run: answers on other rows", _other_rows, advice)
    yield Probe(
        "run: export, a bit of the weights flipped",
        lambda root: _no_file(root, _export_damaged),
        Refusal(r"fix: delete .*jobs/m/\w+ and run `threefold train "),
    )
    yield Probe("run: a folder of another job", _other_job, advice)
    for name, read in READERS.items():
        yield Probe(
            f"run: flipped bits in {name}",
            lambda root, name=name, read=read: _flips(copy(root), name, read),
            0,
        )
    for name, read in READERS.items():
        yield Probe(
            f"run: a pipe in place of {name}",
            lambda root, name=name, read=read: _pipe(copy(root), name, read),
            Refusal("no(t a)? regular file|missing or damaged"),
        )


def flip(path: Path, position: int | None = None) -> None:
    """Change one bit of a file, by default in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 4
    path.write_bytes(content)


def _edit(run: Path) -> Path:
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("seed = 0", "seed = 1", 1))
    return run


def _seed_after_kill(root: Path) -> None:
    run = copy(root)
    shutil.rmtree(run / "jobs" / "m" / "fold1")
    train_again(_edit(run))


def _no_file(root: Path, action: Callable[[Path, Path], object]) -> None:
    """Run what must fail, and check that it writes nothing."""
    target = root / "new.onnx"
    try:
        action(copy(root), target)
    finally:
        assert not target.exists(), "a file was written"


def _export_edited(run: Path, target: Path) -> None:
    export(Run.open(_edit(run)), target)


def _export_damaged(run: Path, target: Path) -> None:
    for path in run.glob("jobs/*/*/tune/weights.safetensors"):
        flip(path)
    export(Run.open(run), target)


def _evaluate(run: Path) -> list[float]:
    return [score.accuracy for score in evaluate_saved(run, ["mean"]).scores]


def _deleted_fold(root: Path) -> bool:
    run = copy(root)
    shutil.rmtree(run / "jobs" / "m" / "fold1")
    train_again(run)
    return hashes(run) == hashes(finished())


def _damaged_features(root: Path) -> bool:
    run = copy(root)
    for path in (Path(_workplace().name) / "cache").rglob("*.npy"):
        flip(path)
    shutil.rmtree(run / "jobs")
    train_again(run)
    return hashes(run) == hashes(finished())


def _damaged_squares(root: Path) -> bool:
    """Whether squares that were damaged on disk come back as they were."""
    run, rows = Run.open(copy(root)), np.arange(4)
    spec = run.recipe.members[0]
    cache = PixelCache(run.sources, run.all_views, run.dir / "cache")
    right = cache.rows("train", spec, rows).pixels[:]
    for path in (run.dir / "cache").glob("*.npy"):
        flip(path, -1)
        flip(path, -9)
    again = PixelCache(run.sources, run.all_views, run.dir / "cache")
    return np.array_equal(again.rows("train", spec, rows).pixels[:], right)


def _train_damaged(root: Path, name: str, damage: Callable[[Path], object]) -> None:
    run = copy(root)
    damage(run / JOB.path / name)
    train_again(run)


def _other_fold(path: Path) -> None:
    other = path.parents[2] / "fold0" / path.parent.name / path.name
    path.write_bytes(other.read_bytes())


def _other_rows(root: Path) -> None:
    """Answers in another order, under a sound hash."""
    run = copy(root)
    path = run / JOB.path / "probs.npz"
    arrays = read_arrays(path)
    write_arrays(path, **{**arrays, "rows": arrays["rows"][::-1]})
    RunFolder(run).finish_job(JOB, 0.0)
    train_again(run)


def _other_job(root: Path) -> None:
    run = copy(root)
    shutil.rmtree(run / JOB.path)
    shutil.copytree(run / JOB._replace(fold=0).path, run / JOB.path)
    train_again(run)


def _arrays(name: str) -> Callable[[Path], Any]:
    def read(run: Path) -> dict[str, Any]:
        return {key: value.tolist() for key, value in read_arrays(run / name).items()}

    return read


def _job_arrays(name: str) -> Callable[[Path], Any]:
    def read(run: Path) -> dict[str, Any]:
        arrays = RunFolder(run).read_job_arrays(JOB, name)
        return {key: value.tolist() for key, value in arrays.items()}

    return read


READERS: dict[str, Callable[[Path], Any]] = {
    "results.json": lambda run: RunFolder(run).results.as_json(),
    "run.json": lambda run: RunFolder(run).info.as_json(),
    "oof.npz": lambda run: RunFolder(run).predictions("oof").probs.tolist(),
    "chosen.npz": _arrays("chosen.npz"),
    "ensemble.npz": _arrays("ensemble.npz"),
    "model.onnx": lambda run: Model(run / "model.onnx").card,
    f"{JOB.path}/done.json": lambda run: RunFolder(run).job_record(JOB).as_json(),
    f"{JOB.path}/history.json": lambda run: RunFolder(run).histories(),
    f"{JOB.path}/choice.npz": _job_arrays("choice.npz"),
    f"{JOB.path}/probs.npz": _job_arrays("probs.npz"),
    f"{JOB.path}/weights.safetensors": lambda run: {
        name: tensor.tolist()
        for name, tensor in Run.open(run).load_job(JOB, 2).state_dict().items()
    },
}
"""Files of a run, and what is read from each."""


def _flips(run: Path, name: str, read: Callable[[Path], Any]) -> int:
    """Count the flipped bits that change what is read without an error."""
    path, right = run / name, read(run)
    content = path.read_bytes()
    changed = 0
    for position in np.linspace(0, len(content) - 1, FLIPS).astype(int):
        flip(path, position)
        with suppress(ThreefoldError):
            changed += read(run) != right
        path.write_bytes(content)
    return changed


def _pipe(run: Path, name: str, read: Callable[[Path], Any]) -> Any:
    (run / name).unlink()
    os.mkfifo(run / name)
    return read(run)
