"""The commands of `full_disk.py`, and how the file of each is opened afterwards."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from threefold.cli.app import app  # that of `threefold.cli.app` is replaced by an action
from threefold.errors import ThreefoldError

UNRECORDED: Final = "the run does not record this export"
"""Words of the note where a file was exported and the run cannot be written."""


class Command(NamedTuple):
    """A command of the trials.

    Attributes:
        words: after `threefold`, with paths relative to the trial's folder.
        state: what the folder holds before; key of STATES.
        action: run in place of the words, if given.
        before: prepares the folder further.
        check: raises unless what was there before the command can still be read.
        repeats: whether it may be given again once it is done; otherwise it refuses to.
        varies: beginnings of the names of files that are others each time, such as measured plans.
        admits: words of a note which says that a file was not written; the command has then not
            said that it is.
        codes: exit codes of a failure that is told; 74 is that of a process which cannot write.
    """

    words: str
    state: str = "finished"
    action: Callable[[], object] | None = None
    before: Callable[[], object] | None = None
    check: Callable[[], object] | None = None
    repeats: bool = True
    varies: tuple[str, ...] = ()
    admits: str = ""
    codes: tuple[int, ...] = (1,)


def commands() -> dict[str, Command]:
    """Return every command by its name."""
    image = "images/test/red/0.png"
    export = "export run --out"
    found = {
        "train": Command("train recipe.toml --out run", "images"),
        "finish": Command("fit images --out run", "trained"),
        "zip": Command("", "images", action=_unzip, before=_zip),
        "report": Command("report run --out page.html"),
        "ensemble": Command("ensemble run --reopen-test --html page.html"),
        "evaluate": Command("evaluate run/model.onnx --data images/test --html page.html"),
        "explain run": Command(f"explain run {image} --out heat.png"),
        "explain file": Command(f"explain run/model.onnx {image} --out heat.png"),
        "heat": Command("predict run/model.onnx images/test/red --heat heats"),
        "embed npz": Command("embed run images/test --out f.npz"),
        "embed parquet": Command("embed run images/test --out f.parquet"),
        "predict csv": Command("predict run/model.onnx images/test --out a.csv"),
        "predict jsonl": Command("predict run/model.onnx images/test --out a.jsonl"),
        "predict parquet": Command("predict run/model.onnx images/test --out a.parquet"),
        "review": Command("", action=_review),
        "data export": Command(
            "data export images --format labelstudio --out s.json",
            before=_drop_export,
            repeats=False,
        ),
        "memory": Command("", "images", action=_store),
        "lr-find": Command("lr-find run --steps 20 --out lr.svg"),
        "search": Command(
            "search recipe.toml --out found --trials 2 --space train.batch_size=4,8", "images"
        ),
        "distill": Command(
            "distill run --student test_resnet --out student --set members.student.weights=none "
            "--set members.student-head.weights=none",
            varies=("student/targets/",),  # which note how long they took
        ),
        "log": Command(
            "train recipe.toml --out run --log tensorboard", "images", varies=("run/tensorboard/",)
        ),
        "ui check": Command(
            "", "images", action=partial(_work, "check"), before=_make_ui, codes=(1, 74)
        ),
        "ui plan": Command(
            "",
            "images",
            action=partial(_work, "plan"),
            before=_make_ui,
            varies=("runs/images/recipe.toml", "runs/.ui/images/plan.json"),
            codes=(1, 74),
        ),
        "upload": Command("", "images", action=_upload),
        "gather": Command("", action=_gather),
        "card": Command("export run --out other.onnx --card README.md", admits=UNRECORDED),
        "web": Command("export run/model.onnx --web site --web-runtime ort", action=_web),
        "clean": Command("clean --yes"),
    }
    for suffix in ("onnx", "pt2", "xml", "mlpackage", "tflite"):
        found[f"export {suffix}"] = Command(
            f"{export} m.{suffix}", f"with {suffix}", check=intact, admits=UNRECORDED
        )
    found["export int8"] = Command(
        f"{export} m.onnx --precision int8", "with onnx", check=intact, admits=UNRECORDED
    )
    return found


def intact() -> None:
    """Check that the model files in this folder can be read; they may be old ones or new."""
    from threefold.exporting import targets
    from threefold.files import sha256
    from threefold.runtime.model import load

    for path in [*Path().glob("m.*"), *Path().glob("run/model.onnx")]:
        if path.suffix == ".onnx":
            load(path)
        elif path.suffix in (".pt2", ".xml", ".tflite"):
            targets.load(path)
    for line in (line for path in Path().glob("m.*.sha256") for line in path.open()):
        digest, name = line.split()
        assert sha256(Path(name)) == digest, name


def _zip() -> None:
    shutil.make_archive("images", "zip", "images")
    shutil.rmtree("images")


def _unzip() -> None:
    from threefold.data.sources.unpacked import unpacked_folder

    unpacked_folder(Path("images.zip"))


def _drop_export() -> None:
    Path("s.json").unlink(missing_ok=True)


def _review() -> None:
    from threefold.evaluation.review import open_review
    from threefold.evaluation.review_state import ReviewState

    found = open_review("images", "", ("data.source=folder",))
    state = ReviewState(found, Path("reviewed.csv"))
    for item in found.items[:2]:
        before = dict(state.decisions)
        try:
            state.decide(item.id, "drop")
        except ThreefoldError:
            assert state.decisions == before
            raise


def _store() -> None:
    from threefold.data.in_memory import store_data

    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    store_data(images, ["a", "b", "a"], Path("memory"))
    store_data([*images], ["a", "b", "b"], Path("memory"))


def _make_ui() -> None:
    from threefold.json_files import write_json

    settings = {"budget": "0", "quality": "fast", "skip_bad": True}
    tree = {"data": str(Path("images").resolve()), "created": 0.0, "settings": settings}
    write_json(Path("runs/.ui/images/state.json"), tree)


def _work(task: str) -> None:
    """Run the child process of `threefold ui`, and say what its page would."""
    from threefold.cli.console import print_error
    from threefold.cli.ui_worker import main
    from threefold.serving.ui_jobs import parse_events

    folder = Path("runs/.ui/images")
    sys.argv = ["ui_worker", task, str(folder), "runs/images"]
    main()
    events = list(parse_events((folder / "events.jsonl").read_bytes()))
    (folder / "events.jsonl").unlink()
    if events[-1]["event"] == "failed":
        print_error(ThreefoldError(events[-1]["message"]))
        raise SystemExit(1)
    if events[-1]["event"] != "done":
        raise AssertionError(f"the page would not say how it ended: {events[-1]}")


def _upload() -> None:
    from threefold.cli.console import print_error
    from threefold.serving.limits import Refusal
    from threefold.serving.ui_uploads import Uploads

    uploads = Uploads(Path("uploads"))
    shutil.rmtree("uploads", ignore_errors=True)
    try:
        name = uploads.begin()
        for number in (0, 3, 6):
            uploads.write(name, "a/b.txt", number, b"abc")
        print(uploads.finish(name).name)
    except Refusal as error:
        print_error(ThreefoldError(str(error) or error.message))
        raise SystemExit(1) from None
    finally:
        shutil.rmtree("uploads", ignore_errors=True)


def _gather() -> None:
    from threefold.exporting.hub_upload import gather
    from threefold.predictions.run_folder import RunFolder

    shutil.rmtree("pushed", ignore_errors=True)
    Path("pushed").mkdir()
    gather(RunFolder.open("run"), Path("pushed"), "user/name")


def _web() -> None:
    """Write the folder for browsers with files that stand for the real runtime."""
    from threefold.serving import onnxruntime_web

    content = b"// runs the model"
    digest = hashlib.sha256(content).hexdigest()
    files = {n: f._replace(sha256=digest) for n, f in onnxruntime_web.FILES.items()}
    onnxruntime_web.FILES = files  # type: ignore[misc]
    for file in files.values():
        path = Path("ort/dist", file.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    app()
