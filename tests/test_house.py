"""House rules: import order, sizes, docstrings, no pickle, no names of machines."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import runpy
from pathlib import Path

import pytest
from support.paths import ROOT

SOURCE = ROOT / "src" / "threefold"
SOURCES = sorted(SOURCE.rglob("*.py"))
PYTHON = [
    *SOURCES,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "bench").glob("*.py")),
    *sorted((ROOT / "scripts").glob("*.py")),
]
DRAWING = runpy.run_path(str(ROOT / "scripts" / "draw_packages.py"))
ORDER = DRAWING["ORDER"]
TORCH_PACKAGES = {"models", "training", "exporting"}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_level_imports(path: Path) -> set[str]:
    """Return the packages that a file imports when it is imported itself."""
    names = set()
    for node in parse(path).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


MODULES = {module_name(path): path for path in SOURCES}
IMPORTS = {
    name: DRAWING["imported_modules"](path) & set(MODULES) - {name, "threefold"}
    for name, path in MODULES.items()
    if name != "threefold"
}


def package_of(module: str) -> str:
    return str(DRAWING["package_of"](module))


def test_packages_import_only_packages_before_them() -> None:
    for module, imported in IMPORTS.items():
        rank = ORDER.index(package_of(module))
        later = {name for name in imported if ORDER.index(package_of(name)) > rank}
        assert not later, f"{module} imports {later}"


def test_no_modules_import_each_other() -> None:
    tuple(graphlib.TopologicalSorter(IMPORTS).static_order())


def test_only_three_packages_import_torch_at_the_top() -> None:
    for module, path in MODULES.items():
        if package_of(module) not in TORCH_PACKAGES:
            assert not top_level_imports(path) & {"torch", "timm", "torchvision"}, module
        if package_of(module) != "exporting":
            assert not top_level_imports(path) & {"onnx", "onnxscript", "onnx_ir"}, module


def test_serving_imports_the_runtime_and_the_ground_only() -> None:
    allowed = {"threefold.data.images", "threefold.data.sources.archives"}
    for module, imported in IMPORTS.items():
        if package_of(module) == "serving":
            others = {n for n in imported if package_of(n) not in ("serving", "runtime", "(root)")}
            assert {n for n in others if n not in ("threefold.data", "threefold.data.sources")} <= (
                allowed
            ), module


def test_no_private_name_crosses_packages() -> None:
    for path in PYTHON:
        own = package_of(module_name(path)) if path in SOURCES else ""
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("threefold."):
                if own and package_of(node.module or "") == own:
                    continue
                private = {alias.name for alias in node.names if re.match("_[^_]", alias.name)}
                assert not private, f"{path.name} imports {private} from {node.module}"


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500

    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name


def test_test_names_are_short() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert len(node.name) <= 60, f"{path.name}: {node.name}"


def test_every_public_name_has_a_docstring() -> None:
    for path in SOURCES:
        tree = parse(path)
        assert ast.get_docstring(tree), path.name
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            assert ast.get_docstring(node), f"{path.name}: {node.name}"
            for part in node.body if isinstance(node, ast.ClassDef) else []:
                public = isinstance(part, ast.FunctionDef) and not part.name.startswith("_")
                if public and part.name != "forward":
                    assert ast.get_docstring(part), f"{path.name}: {node.name}.{part.name}"


def test_nothing_loads_pickle() -> None:
    for path in SOURCES:
        assert not top_level_imports(path) & {"pickle", "joblib", "dill", "cloudpickle"}, path.name
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import):
                assert not {a.name for a in node.names} & {"pickle", "joblib", "dill"}, path.name
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                arguments = {k.arg: ast.unparse(k.value) for k in node.keywords}
                function = ast.unparse(node.func)
                if function == "torch.load":
                    assert arguments.get("weights_only") == "True", path.name
                if function == "np.load":
                    assert arguments.get("allow_pickle") == "False", path.name


def test_the_repository_names_no_registry_and_no_machine() -> None:
    forbidden = re.compile(
        "pypi" + r"\.org|files\." + "pythonhosted|/" + r"work/|/root/[.\w]|\.whl\b.*https?:"
    )
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        *ROOT.glob("*.yml"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob(".github/**/*.yml"),
        *(path for path in ROOT.glob("scripts/*") if path.is_file()),
        *PYTHON,
    ]:
        if path.name != "test_house.py":
            assert not forbidden.search(path.read_text(encoding="utf-8")), path.name


def test_the_picture_of_the_packages_is_current() -> None:
    svg = (ROOT / "docs" / "packages.svg").read_text(encoding="utf-8")

    assert svg == DRAWING["draw"](DRAWING["count_imports"]()), (
        "run: python scripts/draw_packages.py"
    )
