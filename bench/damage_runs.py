"""The runs that `damage.py` damages, and the verbs that read them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from threefold import api
from threefold.data.group_file import GROUP_FILE, write_groups
from threefold.evaluation.compare import compare_saved
from threefold.evaluation.multilabel_saved import (
    combine_multilabel,
    compare_multilabel,
    score_multilabel,
)
from threefold.evaluation.review import open_review
from threefold.evaluation.saved import evaluate_saved, score_saved, summarize_evaluation
from threefold.exporting.export import export
from threefold.files import sha256
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe
from threefold.report.pages import write_report
from threefold.runtime.model import load
from threefold.saved_run import SavedRun
from threefold.training.progress.watcher import Watcher
from threefold.training.run import Run

Verb = Callable[[Path, "Words"], Any]
"""Reads a run folder, and returns plain values that are equal for equal answers."""

COLOURS = {"red": (200, 60, 60), "green": (60, 180, 60), "blue": (60, 60, 200)}
CHANGING = ("seconds", "created", "commit", "export", "test_opened")
"""Entries of results.json that differ between equal runs."""


class Words(Watcher):
    """Collects what a verb says, and can end the training after some batches."""

    def __init__(self, batches: int = -1) -> None:
        self.notes: list[str] = []
        self.left = batches

    def note(self, text: str) -> None:
        """Receive a message for the user."""
        self.notes.append(text)

    def batch(self, images: int) -> None:
        """Count down, and stop as Ctrl-C does."""
        self.left -= 1
        if self.left == 0:
            self.stop = KeyboardInterrupt()


def paint_folder(root: Path, per_class: int, seed: int, size: int = 24) -> Path:
    """Write class folders of coloured noise."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        for number in range(per_class):
            pixels = np.clip(rng.normal(colour, 150, (size, size, 3)), 0, 255).astype(np.uint8)
            path = root / name / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def make_images(base: Path, seed: int = 0) -> Path:
    """Write train/ and test/ of three classes, and a folder of unlabelled images beside them."""
    paint_folder(base / "images" / "train", 8, seed)
    paint_folder(base / "images" / "test", 4, seed + 1)
    paint_folder(base / "unlabelled", 2, seed + 2)
    return base / "images"


def tree_of(base: Path, run: Path, seed: int = 0) -> dict[str, Any]:
    """A recipe: a head on a frozen backbone, and a tuned network that also has pseudo labels."""
    return {
        "name": "tiny",
        "seed": seed,
        "data": {"root": str(base / "images"), "group_file": str(run / GROUP_FILE)},
        "folds": {"k": 2, "select": 0.25, "scheme": "grouped"},
        "augment": {"hflip": True},
        "features": {"engine": "torch"},
        "views": {"kind": "flip", "choose": True},
        "train": {"batch_size": 8, "device": "cpu", "precision": "float32"},
        "ensemble": {"methods": ["mean", "stacked"]},
        "stages": [
            {"name": "head", "kind": "head", "members": ["probe"]},
            {"name": "tune", "epochs": 2, "lr": 1e-3, "members": ["tuned"]},
            {"name": "last", "epochs": 1, "lr": 1e-4, "members": ["tuned"]},
        ],
        "members": [
            {"name": "probe", "backbone": "test_resnet", "weights": "none", "img_size": 32},
            {"name": "tuned", "starts_from": "probe", "img_size": 32},
        ],
        "pseudo_labels": {
            "images": str(base / "unlabelled"),
            "members": ["tuned"],
            "threshold": 0.3,
        },
    }


def make_run(base: Path, seed: int = 0, *, batches: int = -1) -> Path:
    """Train a run in `base/run`, which is exported and reported, or stopped after some batches.

    It is trained where its copies will be damaged, so that the paths in it are theirs.
    """
    run = base.parent / "trial" / "run"
    shutil.rmtree(run, ignore_errors=True)
    images = make_images(base, seed)
    ids = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    write_groups(run / GROUP_FILE, ids, [f"g{number // 2}" for number in range(len(ids))])
    recipe = Recipe.parse(tree_of(base, run, seed))
    if batches < 0:
        api.finish(api.train(recipe, run, Words()))
    else:
        with suppress(KeyboardInterrupt):
            api.train(recipe, run, Words(batches))
            raise RuntimeError("the training was not stopped")
    return run.rename(base / "run")


def make_multilabel_run(base: Path, seed: int = 0) -> Path:
    """Train and finish a run of images with any number of labels."""
    folder = paint_folder(base / "several", 10, seed)
    paths = sorted(folder.rglob("*.png"))
    rows = [
        f"{path},{int('red' in path.parts)},{int(number % 2)},{int(number % 3 == 0)}"
        for number, path in enumerate(paths)
    ]
    table = base / "labels.csv"
    table.write_text("\n".join(["path,warm,odd,third", *rows]) + "\n", encoding="utf-8")
    tree = tree_of(base, base / "run", seed)
    tree |= {
        "data": {"source": "csv", "root": str(table), "task": "multilabel"},
        "folds": {"k": 2, "select": 0.25},
        "views": {},
        "ensemble": {},
    }
    del tree["pseudo_labels"]
    run = base.parent / "trial" / "run"
    shutil.rmtree(run, ignore_errors=True)
    api.finish(api.train(Recipe.parse(tree), run, Words()))
    return run.rename(base / "run")


# What a verb answers, as plain values


def plain(value: Any) -> Any:
    """Return values that can be compared with `==`."""
    if hasattr(value, "as_json"):
        return json.loads(json.dumps(value.as_json(), default=float))
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
    return value


def outcome_of(run: Path) -> dict[str, Any]:
    """What training leaves: hashes of weights and arrays, and the results but for durations."""
    hashes = {
        path.relative_to(run).as_posix(): sha256(path)
        for path in run.rglob("*")
        if path.suffix in (".safetensors", ".npz")
    }
    results = RunFolder(run).any_results.as_json()
    kept = {key: value for key, value in results.items() if key not in CHANGING}
    return {"hashes": hashes, "results": json.loads(json.dumps(kept, default=float))}


def _evaluate(run: Path, words: Words) -> Any:
    summary, rows = score_saved([run])
    return [plain(summary), plain(rows.probs)]


def _ensemble(run: Path, words: Words) -> Any:
    return plain(summarize_evaluation([run], evaluate_saved(run, ["mean", "stacked"])))


def _compare(run: Path, words: Words) -> Any:
    return plain(compare_saved([str(run), f"{run}:probe"])[0])


def _report(run: Path, words: Words) -> Any:
    out = run.parent / "page.html"
    write_report([run], out)
    return out.read_text(encoding="utf-8")


def _export(run: Path, words: Words) -> Any:
    opened = Run(RunFolder.open(run), words)
    out = run.parent / "out.onnx"
    report = export(opened, out)
    return [sha256(out), report.max_difference, report.top1_agreement]


def _predict(run: Path, words: Words) -> Any:
    model = load(run / "model.onnx")
    images = sorted((run.parent.parent / "made" / "images").rglob("*.png"))
    images = images or sorted((run.parent.parent / "made" / "several").rglob("*.png"))
    return model.predict_proba([str(path) for path in images[:3]]).tolist()


def _train(run: Path, words: Words) -> Any:
    """Train a finished run, which is returned at once."""
    trained = api.train(Recipe.load(run / "recipe.toml"), run, words)
    return repr(trained), plain(trained.folder.any_results)


def _resume(run: Path, words: Words) -> Any:
    """Train an interrupted run to its end."""
    api.train(Recipe.load(run / "recipe.toml"), run, words)
    return outcome_of(run)


def _fit(run: Path, words: Words) -> Any:
    """Export and report a finished run again, as `threefold fit` does."""
    trained = api.train(Recipe.load(run / "recipe.toml"), run, words)
    api.finish(trained)
    return sha256(run / "model.onnx")


def _score_again(run: Path, words: Words) -> Any:
    """Train after the results were deleted, which reads the files of all jobs."""
    (run / "results.json").unlink(missing_ok=True)
    return _resume(run, words)


def _saved_run(run: Path, words: Words) -> Any:
    saved = SavedRun.open(run)
    model = saved.model()
    return [
        repr(saved),
        saved._repr_html_(),
        json.loads(saved.leaderboard().to_json()),
        str(model.card),
        saved.folder.info.as_json(),
        str(saved.folder.test_opened()),
        saved.report().read_text(encoding="utf-8"),
    ]


def _charts(run: Path, words: Words) -> Any:
    saved = SavedRun.open(run)
    charts = (saved.plot_scores, saved.plot_confusion, saved.plot_calibration)
    return [chart()._repr_svg_() for chart in (*charts, saved.plot_learning_curves)]


def _review(run: Path, words: Words) -> Any:
    review = open_review(str(run))
    return [repr(item) for item in review.items] + list(review.notes)


VERBS: dict[str, Verb] = {
    "evaluate": _evaluate,
    "ensemble": _ensemble,
    "compare": _compare,
    "report": _report,
    "predict": _predict,
    "open": _saved_run,
    "charts": _charts,
    "review": _review,
    "export": _export,
    "train": _train,
    "fit": _fit,
    "score again": _score_again,
}
"""Verbs that read a finished run; those that write into it come last."""


def _evaluate_labels(run: Path, words: Words) -> Any:
    return repr(score_multilabel([run], [])[0])


def _ensemble_labels(run: Path, words: Words) -> Any:
    return repr(combine_multilabel([run], ["auto"], [])[0])


def _compare_labels(run: Path, words: Words) -> Any:
    return repr(compare_multilabel([str(run), f"{run}:probe"], False)[0])


MULTILABEL_VERBS: dict[str, Verb] = {
    "evaluate": _evaluate_labels,
    "ensemble": _ensemble_labels,
    "compare": _compare_labels,
    **{name: VERBS[name] for name in ("report", "predict", "export", "train", "score again")},
}

RESUME_VERBS: dict[str, Verb] = {"train": _resume}
"""The verb that reads an interrupted run."""


# Copies


def copy_run(made: Path, target: Path, damaged: str) -> Path:
    """Copy a run by hard links, with a copy of the file that is to be damaged.

    threefold replaces files and never writes into one, so the links stay as they are.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(made, target, copy_function=os.link, symlinks=True)
    path = target / damaged
    if path.is_file():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    return target


def list_files(run: Path) -> list[str]:
    """Names of the files of a run, without its locks, which are empty."""
    paths = sorted(path for path in run.rglob("*") if path.is_file() and path.suffix != ".lock")
    paths = [path for path in paths if path.name != ".lock"]
    return [path.relative_to(run).as_posix() for path in paths]


@contextmanager
def another_user(uid: int, *folders: Path) -> Iterator[None]:
    """Act as a user without rights to what root alone may read; as another than root do nothing."""
    if os.geteuid() != 0:
        yield
        return
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, uid, uid, follow_symlinks=False)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
