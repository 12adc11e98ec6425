"""The documentation: generated pages are current, links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import ROOT

import threefold

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
EXTENDING = ROOT / "docs/extending.md"
ARCHITECTURE = ROOT / "docs/architecture.md"
SOURCE = ROOT / "src/threefold"
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def script(name: str) -> ModuleType:
    """Import a script that is not part of the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line_reference_is_current() -> None:
    make_reference = script("make_reference")

    page = make_reference.PAGE.read_text(encoding="utf-8")

    assert page == make_reference.cli_page(), "run scripts/make_reference.py"


def test_the_python_reference_has_every_public_name() -> None:
    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")

    names = re.findall(r"^::: threefold\.(\w+)$", page, re.MULTILINE)

    assert sorted(names) == sorted(threefold.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_to_files(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))

    missing = [link for link in links if not (page.parent / link).exists()]

    assert not missing


def definitions(path: Path) -> set[str]:
    """Return what a module defines: functions, classes, constants, and `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


CHANGES = dict(
    re.findall(
        r"^\| (an? [^|]+) \| ([^|]+ \| [^|]+) \|$",
        EXTENDING.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
)
"""The table of extending.md: what to add -> the cells of files and of names."""


@pytest.mark.parametrize(
    "change",
    [
        "a head",
        "a data source",
        "a metric",
        "an ensemble",
        "an export target",
        "a verb or a flag",
        "a report section",
        "a server limit",
        "a recipe key",
        "a table of the paper",
    ],
)
def test_extending_has_the_usual_changes(change: str) -> None:
    assert change in CHANGES


@pytest.mark.parametrize("change", CHANGES)
def test_extending_names_files_and_what_they_define(change: str) -> None:
    file_cell, name_cell = CHANGES[change].split(" | ")
    files = re.findall(r"`([\w/]+\.(?:py|toml|html\.j2))`", file_cell.replace("NAME", "demo"))
    modules = [SOURCE / name for name in files if name.endswith(".py")]

    missing_files = [name for name in files if not (SOURCE / name).is_file()]
    defined = {name for module in modules for name in definitions(module)}
    missing_names = set(re.findall(r"`(\w+)`", name_cell)) - defined

    assert files or change == "a backbone, a stage"
    assert not missing_files
    assert not missing_names


def test_extending_names_tests_that_exist() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))

    names = re.findall(r"`(test_\w+)`", EXTENDING.read_text(encoding="utf-8"))

    assert names
    assert not [name for name in names if f"def {name}(" not in tests]


def walk_steps() -> list[tuple[str, str]]:
    """Return the file and the function of each step of architecture.md."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    return re.findall(r"`([\w/]+\.py): ([\w.]+)`", text)


@pytest.mark.parametrize(("file", "name"), walk_steps())
def test_architecture_names_functions_that_exist(file: str, name: str) -> None:
    assert name in definitions(SOURCE / file)


def test_architecture_has_three_walks() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")

    steps = [len(re.findall(r"^\d+\. `", walk, re.MULTILINE)) for walk in text.split("\n## ")[1:]]

    assert len(steps) == 3
    assert min(steps) >= 10
    assert max(steps) <= 20


def test_architecture_lists_the_packages_in_import_order() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8").partition("| in `training` |")[0]

    packages = re.findall(r"^\| (`\w+`|\(root\)) \|", text, re.MULTILINE)

    assert tuple(name.strip("`") for name in packages) == script("draw_packages").ORDER


def test_the_example_ensemble_of_extending_works() -> None:
    block = re.findall(r"```python\n(.*?)```", EXTENDING.read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, Any] = {}
    probs = np.random.default_rng(0).dirichlet(np.ones(4), size=(3, 5))

    exec(compile(block, str(EXTENDING), "exec"), names)
    ensemble = names["GeometricEnsemble"]()
    combined = ensemble.predict_proba(probs)

    module = ensemble.to_module()
    in_torch = module(torch.from_numpy(probs.transpose(1, 0, 2))).numpy()
    assert np.allclose(combined.sum(-1), 1)
    assert np.allclose(combined, in_torch)
