"""`pip install threefold` is enough to load and predict; what needs more says which command installs it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from serving import UNCERTAIN, card, picture, write_model
from test_surface import SURFACE

import threefold
from threefold import extras
from threefold.errors import MissingExtraError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

from threefold.extras import PACKAGES
sys.meta_path.insert(0, Absent())
"""
COMMAND = BARE + "from threefold.entry import main\nmain()"


def bare(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own to which the extras' packages are not installed."""
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, a red image, and a file that is none."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "red.png").write_bytes(picture((200, 30, 30)))
    (folder / "bad.png").write_bytes(b"x")
    return (
        write_model(folder / "m.onnx", told=card(**UNCERTAIN)),
        folder / "red.png",
        folder / "bad.png",
    )


def test_three_packages_are_required() -> None:
    names = {re.split(r"[>=\[]", line)[0] for line in PROJECT["dependencies"]}
    assert names == {"numpy", "pillow", "onnxruntime"}


def test_load_and_predict_need_nothing_else(files: tuple[Path, Path, Path]) -> None:
    model, red, _ = files
    code = BARE + "import threefold\nm = threefold.load(sys.argv[1])\n"
    code += "print(m.predict(sys.argv[2:]), m.predict_sets(sys.argv[2:]), m.is_unknown(sys.argv[2:]), m.predict_proba(sys.argv[2:]).tolist())"
    done = bare(code, str(model), str(red))
    assert done.stderr == ""
    loaded = threefold.load(model)
    expected = (
        loaded.predict([red]),
        loaded.predict_sets([red]),
        loaded.is_unknown([red]),
        loaded.predict_proba([red]).tolist(),
    )
    assert done.stdout.strip() == " ".join(map(str, expected))


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"], ["--top", "1"]])
def test_predict_answers_as_with_everything_installed(
    files: tuple[Path, Path, Path], form: list[str]
) -> None:
    words = ["predict", *map(str, files), *form]
    whole = subprocess.run(
        [sys.executable, "-m", "threefold", *words], capture_output=True, text=True, check=False
    )
    found = bare(COMMAND, *words)
    assert found.stdout == whole.stdout != ""
    assert found.stderr == whole.stderr
    assert found.returncode == whole.returncode == 1
    assert "bad.png" in found.stderr


def test_predict_has_the_same_flags_and_codes(files: tuple[Path, Path, Path]) -> None:
    told = bare(COMMAND, "predict", "--help").stdout
    assert set(re.findall(r"--\w+", told)) == SURFACE["predict"] | {"--help"}
    model, red, _ = map(str, files)
    for words, code in (
        ([model, red], 0),
        ([red, red], 1),
        ([model], 2),
        ([model, red, "--top", "0"], 2),
    ):
        assert bare(COMMAND, "predict", *words).returncode == code
    assert bare(COMMAND, "predict", red, red).stderr.count("\n") == 1


@pytest.mark.parametrize("verb", [*extras.VERBS, "", "--help"])
def test_every_other_verb_says_what_to_install(verb: str) -> None:
    if verb == "predict":
        return
    done = bare(COMMAND, *filter(None, [verb]), "--out", "x")
    extra = extras.VERBS.get(verb, "cli")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(
        rf"error threefold ?\w* needs packages that are not installed; got no typer; fix: pip install 'threefold\[{extra}\]'\n",
        done.stderr,
    )


def test_a_verb_whose_own_packages_are_missing_says_so(files: tuple[Path, Path, Path]) -> None:
    """With the command line's packages there and others not."""
    code = COMMAND.replace(
        "PACKAGES\n",
        "PACKAGES as ALL\nPACKAGES = ALL - {'typer', 'rich', 'pydantic', 'pydantic_core'}\n",
    )
    for words, line in (
        (
            ["serve", str(files[0])],
            r"serve needs .*; got no \w+; fix: pip install 'threefold\[serve\]'",
        ),
        (["evaluate", "x.npz"], r"evaluate needs .*; fix: pip install 'threefold\[report\]'"),
        (["train", "demo", "--out", "x"], r"train needs .*; fix: pip install 'threefold\[train\]'"),
        (
            ["list", "backbones"],
            r"list needs .*; got no timm; fix: pip install 'threefold\[train\]'",
        ),
    ):
        done = bare(code, *words)
        assert re.fullmatch(rf"error threefold {line}\n", done.stderr), done.stderr
        assert done.returncode == 1
    assert bare(code, "--help").returncode == 0


def test_public_names_say_it_too() -> None:
    code = (
        BARE
        + "import threefold\ntry:\n    threefold.fit\nexcept ImportError as error:\n    print(type(error).__name__, error)"
    )
    done = bare(code)
    assert done.stdout.startswith(
        "MissingExtraError threefold.fit needs packages that are not installed; got no "
    )
    assert "fix: pip install 'threefold[train]'" in done.stdout


def test_an_error_of_our_own_is_not_taken_for_a_missing_package() -> None:
    assert extras.explained(ModuleNotFoundError("x", name="threefold.nothing"), "all", "it") is None
    found = extras.explained(ModuleNotFoundError("x", name="torch.nn"), "train", "it")
    assert isinstance(found, MissingExtraError)
    assert isinstance(found, ImportError)


def requirements(extra: str) -> set[str]:
    """Distributions that an extra asks for, through the extras that it includes."""
    found: set[str] = set()
    for line in PROJECT["optional-dependencies"][extra]:
        if inner := re.fullmatch(r"threefold\[(\w+)\]", line):
            found |= requirements(inner[1])
        else:
            found.add(re.split(r"[>=]", line)[0])
    return found


def test_every_verb_has_an_extra_and_every_package_of_an_extra_is_known() -> None:
    assert set(extras.VERBS) == {name.partition(" ")[0] for name in SURFACE}
    assert {*extras.VERBS.values(), *extras.MODULES.values()} <= set(
        PROJECT["optional-dependencies"]
    )
    assert (
        requirements("all")
        == requirements("train") | requirements("serve")
        >= requirements("report")
    )
    modules: dict[str, set[str]] = {}
    for module, names in packages_distributions().items():
        for name in names:
            modules.setdefault(name.lower().replace("_", "-"), set()).add(module)
    for name in requirements("all"):
        assert modules[name.replace("_", "-")] & extras.PACKAGES, name


@pytest.mark.slow
def test_the_wheel_in_a_fresh_environment(tmp_path: Path, files: tuple[Path, Path, Path]) -> None:
    """Built, installed with what it requires and no more, used."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv on the path")

    def run(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*map(str, words)], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == code, (words, done.stderr)
        return done

    run(uv, "build", "--wheel", "--out-dir", tmp_path, ROOT)
    run(uv, "venv", "--python", sys.executable, tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(uv, "pip", "install", "--python", python, *tmp_path.glob("*.whl"))
    installed = {
        line["name"]
        for line in json.loads(
            run(uv, "pip", "list", "--python", python, "--format", "json").stdout
        )
    }
    assert {"numpy", "pillow", "onnxruntime", "threefold"} <= installed
    assert not installed & {*requirements("all"), "pydantic"}
    model, red, _ = files
    asked = "import sys, threefold; print(threefold.load(sys.argv[1]).predict_proba(sys.argv[2:]).tolist())"
    answer: Any = json.loads(run(python, "-c", asked, model, red).stdout)
    assert answer == threefold.load(model).predict_proba([red]).tolist()
    command = tmp_path / "env" / "bin" / "threefold"
    assert run(command, "predict", model, red).stdout.startswith(f"{red}: red ")
    line = "error threefold train needs packages that are not installed; got no typer; fix: pip install 'threefold[train]'"
    assert run(command, "train", "demo", "--out", "x", code=1).stderr.strip() == line
    run(uv, "pip", "install", "--python", python, f"{next(tmp_path.glob('*.whl'))}[cli]")
    assert run(command, "predict", model, red).stdout.startswith(f"{red}: red ")
    assert "threefold[serve]" in run(command, "serve", model, code=1).stderr
