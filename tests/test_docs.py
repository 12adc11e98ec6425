"""The documentation: generated pages are current, links lead somewhere."""

from __future__ import annotations

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
MOVED = (ROOT / "src/threefold/ensembles").is_dir()
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


@pytest.mark.skipif(not MOVED, reason="the page names modules by package")
def test_extending_names_files_and_definitions_that_exist() -> None:
    text = EXTENDING.read_text(encoding="utf-8")
    rows = re.findall(r"^\| an? [^|]+\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    files = {name for cell, _ in rows for name in re.findall(r"`([\w/]+\.(?:py|html\.j2))`", cell)}
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "src/threefold").rglob("*.py")
    )

    missing_files = [name for name in files if not (ROOT / "src/threefold" / name).is_file()]
    names = {name for _, cell in rows for name in re.findall(r"`(\w+)`", cell)}
    missing_names = [
        name
        for name in names
        if not re.search(rf"^(?:(?:class|def) )?{name}\b(?:[:(]| =|: )", sources, re.MULTILINE)
    ]

    assert len(rows) >= 10
    assert not missing_files
    assert not missing_names


@pytest.mark.skipif(not MOVED, reason="the page names modules by package")
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
