"""The base install loads and predicts; every other verb names the extra it needs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.command_line import SURFACE
from support.paths import ROOT
from support.server import UNCERTAIN, card, picture, write_model

import threefold
from threefold import extras
from threefold.errors import MissingExtraError
from threefold.extras import install_command

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

from threefold.extras import OPTIONAL_PACKAGES
ABSENT = OPTIONAL_PACKAGES
sys.meta_path.insert(0, Absent())
"""
COMMAND = BARE + "from threefold.cli.main import main\nmain()"
VERBS = f"""{BARE}
import contextlib, io, json
from threefold.cli.main import main
outcomes, stdout = {{}}, sys.stdout
for verb, words in json.loads(sys.argv[1]).items():
    sys.argv = ["threefold", verb, *words]
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    texts = []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    outcomes[verb] = [code, *texts]
print(json.dumps(outcomes), file=stdout)
"""
NO_COMMAND_LINE = BARE + "ABSENT = OPTIONAL_PACKAGES | {'typer', 'rich', 'pydantic'}\n"
WORDS = {
    "demo": ["--out", "x"],
    "fit": ["photos"],
    "plan": ["."],
    "train": ["demo", "--out", "x"],
    "export": ["runs/x"],
    "distill": ["runs/x", "--student", "y"],
    "embed": ["resnet18", "."],
    "explain": [".", "x.png"],
    "reproduce": ["table1"],
    "list": ["heads"],
    "data": ["check", "demo"],
    "ensemble": ["x.npz"],
    "evaluate": ["x.npz"],
    "compare": ["x.npz", "y.npz"],
    "report": ["runs/x"],
    "serve": ["model.onnx"],
    "push": ["runs/x", "user/name"],
    "ui": [],
    "lr-find": ["demo"],
    "search": ["demo", "--out", "x", "--space", "train.batch_size=8,16"],
}
"""Arguments with which each verb passes the command line's own checks."""


def bare(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process that cannot import the extras' packages."""
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, a red image, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "red.png").write_bytes(picture((200, 30, 30)))
    (folder / "bad.png").write_bytes(b"x")
    return (
        write_model(folder / "m.onnx", model_card=card(**UNCERTAIN)),
        folder / "red.png",
        folder / "bad.png",
    )


def test_the_base_install_requires_eight_packages() -> None:
    names = {re.split(r"[>=\[]", line)[0] for line in PROJECT["dependencies"]}

    libraries = {"numpy", "pillow", "onnxruntime", "pydantic", "filelock"}
    assert names == libraries | {"tomli-w", "typer", "rich"}


def test_load_and_predict_import_three_packages(files: tuple[Path, Path, Path]) -> None:
    model, red, _ = files
    loaded = threefold.load(model)
    code = (
        f"{NO_COMMAND_LINE}import threefold\n"
        "m, images = threefold.load(sys.argv[1]), sys.argv[2:]\n"
        "print(m.predict(images), m.predict_sets(images), m.is_unknown(images),"
        " m.predict_proba(images).tolist())"
    )

    done = bare(code, str(model), str(red))

    expected = (
        loaded.predict([red]),
        loaded.predict_sets([red]),
        loaded.is_unknown([red]),
        loaded.predict_proba([red]).tolist(),
    )
    assert done.stderr == ""
    assert done.stdout.strip() == " ".join(map(str, expected))


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"], ["--top", "1"]])
def test_predict_answers_as_with_everything_installed(
    files: tuple[Path, Path, Path], form: list[str]
) -> None:
    words = ["predict", *map(str, files), *form]

    whole = subprocess.run(
        [sys.executable, "-m", "threefold", *words], capture_output=True, text=True, check=False
    )
    base = bare(COMMAND, *words)

    assert base.stdout == whole.stdout != ""
    assert base.stderr == whole.stderr
    assert base.returncode == whole.returncode == 1
    assert "bad.png" in base.stderr


@pytest.mark.slow
def test_predict_has_the_same_flags_and_codes(files: tuple[Path, Path, Path]) -> None:
    model, red, _ = map(str, files)

    help_text = bare(COMMAND, "predict", "--help").stdout

    assert set(re.findall(r"--[a-z]+", help_text)) == SURFACE["predict"] | {"--help"}
    for words, code in (
        ([model, red], 0),
        ([red, red], 1),
        ([model], 2),
        ([model, red, "--top", "0"], 2),
    ):
        assert bare(COMMAND, "predict", *words).returncode == code
    assert bare(COMMAND, "predict", red, red).stderr.count("\n") == 1


@pytest.mark.parametrize(("word", "expected"), [("--version", "threefold "), ("--help", "predict")])
def test_version_and_help_work_in_the_base_install(word: str, expected: str) -> None:
    done = bare(COMMAND, word)

    assert done.returncode == 0
    assert expected in done.stdout


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[int, str, str]]:
    """Exit code, output and errors of every verb, in one process: each fails before it works."""
    done = bare(VERBS, json.dumps({verb: WORDS[verb] for verb in extras.VERB_EXTRAS}))
    return {verb: tuple(outcome) for verb, outcome in json.loads(done.stdout).items()}


@pytest.mark.parametrize("verb", extras.VERB_EXTRAS)
def test_every_other_verb_says_what_to_install(
    outcomes: dict[str, tuple[int, str, str]], verb: str
) -> None:
    code, printed, errors = outcomes[verb]

    assert code == 1
    assert printed == ""
    assert re.fullmatch(
        rf"error threefold {verb} needs packages that are not installed; got no \w+; "
        rf"fix: {re.escape(install_command(extras.VERB_EXTRAS[verb]))}\n",
        errors,
    )


def test_public_names_say_it_too() -> None:
    code = (
        f"{BARE}import threefold\n"
        "try:\n    threefold.fit\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )

    done = bare(code)

    assert done.stdout.startswith(
        "MissingExtraError threefold.fit needs packages that are not installed; got no "
    )
    assert f"fix: {install_command('train')}" in done.stdout


def test_the_command_adds_to_the_same_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record: dict[str, Any] = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
    installed = SimpleNamespace(read_text=lambda name: json.dumps(record))
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: installed)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert install_command("hf") == f"uv pip install -e '{tmp_path}[hf]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("ray,train") == "uv pip install -e '.[ray,train]'"
    record["dir_info"] = {}
    assert install_command("hf") == "uv pip install '.[hf]'"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert install_command("hf") == "pip install '.[hf]'"


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"url": 3}', '{"url": "file:///absent", "dir_info": {}}']
)
def test_without_a_folder_the_name_is_installed(
    text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = SimpleNamespace(read_text=lambda name: text)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: installed)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

    assert install_command("hf") == "pip install 'threefold[hf]'"


def test_only_optional_packages_count_as_missing() -> None:
    ours = extras.missing_extra(ModuleNotFoundError("x", name="threefold.nothing"), "all", "it")
    torch = extras.missing_extra(ModuleNotFoundError("x", name="torch.nn"), "train", "it")

    assert ours is None
    assert isinstance(torch, MissingExtraError)
    assert isinstance(torch, ImportError)


def requirements(extra: str) -> set[str]:
    """The distributions that an extra installs, with those of the extras it includes."""
    names: set[str] = set()
    for line in PROJECT["optional-dependencies"][extra]:
        if inner := re.fullmatch(r"threefold\[(\w+)\]", line):
            names |= requirements(inner[1])
        else:
            names.add(re.split(r"[>=]", line)[0])
    return names


def test_extras_cover_all_verbs_and_packages() -> None:
    modules: dict[str, set[str]] = {}
    for module, names in packages_distributions().items():
        for name in names:
            modules.setdefault(name.lower().replace("_", "-"), set()).add(module)

    modules_and_packages = {path.stem for path in (ROOT / "src/threefold").iterdir()}
    assert set(extras.PACKAGE_EXTRAS) <= modules_and_packages
    assert {*extras.VERB_EXTRAS, "predict", "pull", "doctor", "clean"} == {
        name.partition(" ")[0] for name in SURFACE
    }
    assert {*extras.VERB_EXTRAS.values(), *extras.PACKAGE_EXTRAS.values()} <= set(
        PROJECT["optional-dependencies"]
    )
    assert requirements("all") == requirements("train") | requirements("serve")
    assert requirements("train") >= requirements("report")
    for name in requirements("all"):
        assert modules[name.replace("_", "-")] & extras.OPTIONAL_PACKAGES, name


@pytest.mark.slow
def test_the_wheel_in_a_fresh_environment(tmp_path: Path, files: tuple[Path, Path, Path]) -> None:
    """Build the wheel, install it with its requirements and no more, and use it."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv on the path")
    model, red, _ = files
    python, command = (tmp_path / "env/bin" / name for name in ("python", "threefold"))

    def run(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*map(str, words)], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == code, (words, done.stderr)
        return done

    run(uv, "build", "--wheel", "--out-dir", tmp_path, ROOT)
    run(uv, "venv", "--python", sys.executable, tmp_path / "env")
    run(uv, "pip", "install", "--python", python, *tmp_path.glob("*.whl"))

    packages = run(uv, "pip", "list", "--python", python, "--format", "json")
    installed = {line["name"] for line in json.loads(packages.stdout)}
    assert {"numpy", "pillow", "onnxruntime", "typer", "rich", "threefold"} <= installed
    assert not installed & requirements("all")
    code = (
        "import sys, threefold\n"
        "print(threefold.load(sys.argv[1]).predict_proba(sys.argv[2:]).tolist())"
    )
    answer: Any = json.loads(run(python, "-c", code, model, red).stdout)
    assert answer == threefold.load(model).predict_proba([red]).tolist()
    assert run(command, "predict", model, red).stdout.startswith(f"{red}: red ")
    assert run(command, "--version").stdout == f"threefold {threefold.__version__}\n"
    error = run(command, "train", "demo", "--out", "x", code=1).stderr
    assert error.startswith("error threefold train needs packages that are not installed; got no ")
    (wheel,) = tmp_path.glob("*.whl")
    assert error.endswith(f"; fix: uv pip install '{wheel}[train]'\n")
    assert f"'{wheel}[serve]'" in run(command, "serve", model, code=1).stderr
