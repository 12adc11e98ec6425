"""House rules: sizes, direction of imports, docstrings, no pickle, README's code runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src/threefold").glob("*.py"))
# A module may import those before it only.
ORDER = [
    "errors",
    "extras",
    "files",
    "recipe_schema",
    "recipe",
    "training__watcher",
    "backbones",
    "scales",
    "paper_items",
    "data__natural_order",
    "images",
    "listing",
    "archives",
    "pickled",
    "data__published",
    "arrays",
    "photos",
    "tables",
    "data__leakage",
    "datasets",
    "fetch",
    "samples",
    "splits",
    "predictions__records",
    "predictions__results_schema",
    "ledger",
    "containers",
    "columns",
    "predictions__checks",
    "predictions",
    "predictions__run_folder",
    "joining",
    "parts",
    "adapters",
    "formats",
    "choice",
    "combiners",
    "crossfit",
    "ensembles__averaging",
    "loglinear",
    "stacked",
    "scaling",
    "calibration",
    "ensembles__registry",
    "diversity",
    "resampling",
    "weighted",
    "stats",
    "conformal",
    "uncertainty",
    "audit",
    "datacheck",
    "paired",
    "cascade",
    "savings",
    "optimism",
    "scoring",
    "evaluate",
    "saved",
    "compare",
    "models__resize",
    "models__views",
    "models__recurrent",
    "heads",
    "models__member",
    "cost",
    "models__pipeline",
    "gradcam",
    "training__augment",
    "training__optimizers",
    "pixels",
    "softloss",
    "training__checkpoints",
    "catalogue",
    "stages",
    "provenance",
    "run",
    "training__distillation",
    "assembly",
    "training__diagnostics",
    "jobs",
    "results",
    "parity",
    "precision",
    "bundle",
    "modelfile",
    "runtime",
    "cascading",
    "exporting",
    "targets",
    "exporting__export",
    "answers",
    "limits",
    "webruntime",
    "webfolder",
    "gauges",
    "batching",
    "intake",
    "replies",
    "guard",
    "serve",
    "svg",
    "charts",
    "pictures",
    "render",
    "reportview",
    "report__pages",
    "plan",
    "api",
    "reproduce",
    "paper_figures",
    "terminal",
    "console",
    "cli_saved",
    "cli_data",
    "cli__options",
    "cli__output",
    "cli__demo",
    "catalogue",
    "cli",
    "entry",
    "__init__",
    "__main__",
]
TORCH = {
    "heads",
    "cost",
    "pixels",
    "training__checkpoints",
    "stages",
    "provenance",
    "jobs",
    "exporting",
    "plan",
    "gradcam",
    "softloss",
    "targets",
    "models__resize",
    "models__views",
    "models__recurrent",
    "models__member",
    "models__pipeline",
    "training__augment",
    "training__optimizers",
}
PUBLIC = re.compile(r"^[^_]")


def trees() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES]


def imports(tree: ast.AST, top_level: bool = False) -> set[str]:
    """Full names of imported modules, without those for type checking only."""
    nodes = tree.body if top_level and isinstance(tree, ast.Module) else ast.walk(tree)  # type: ignore[assignment]
    skipped = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in ast.walk(node)
    }
    found = set()
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{alias.name}" if node.module == "threefold" else node.module
                for alias in node.names
            }
    return found


@pytest.mark.parametrize(
    "path",
    sorted(
        [
            *SOURCES,
            *(ROOT / "tests").glob("*.py"),
            *(ROOT / "bench").glob("*.py"),
            *(ROOT / "scripts").glob("*.py"),
        ]
    ),
    ids=lambda p: p.name,
)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 580
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, f"{path.name}: {node.name}"


def test_every_module_has_its_place_and_imports_only_point_down() -> None:
    assert {path.stem for path in SOURCES} == set(ORDER)
    for path, tree in trees():
        ours = {name.split(".")[1] for name in imports(tree) if name.startswith("threefold.")}
        above = {name for name in ours if ORDER.index(name) >= ORDER.index(path.stem)}
        assert not above, f"{path.name} imports {above}"


def test_the_array_half_and_the_runtime_half_do_not_import_torch() -> None:
    for path, tree in trees():
        if path.stem not in TORCH:
            assert not {name.split(".")[0] for name in imports(tree, top_level=True)} & {
                "torch",
                "timm",
            }, path.name
    by_name = {path.stem: imports(tree) for path, tree in trees()}
    for name in ("ensembles__registry", "stats"):
        assert "threefold.models.member" not in by_name[name]
    assert {n for n in by_name["serve"] if n.startswith("threefold")} <= {
        f"threefold.{name}"
        for name in (
            "errors",
            "runtime",
            "limits",
            "gauges",
            "batching",
            "intake",
            "replies",
            "guard",
        )
    }


def test_every_public_name_has_a_docstring() -> None:
    for path, tree in trees():
        assert ast.get_docstring(tree), path.name
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and PUBLIC.match(node.name):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
            if isinstance(node, ast.ClassDef) and PUBLIC.match(node.name):
                for part in node.body:
                    if (
                        isinstance(part, ast.FunctionDef)
                        and PUBLIC.match(part.name)
                        and part.name != "forward"
                    ):
                        assert ast.get_docstring(part), f"{path.name}: {node.name}.{part.name}"


def test_nothing_loads_pickle() -> None:
    for path, tree in trees():
        assert not imports(tree) & {"pickle", "joblib", "dill", "cloudpickle"}, path.name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                words = {k.arg: ast.unparse(k.value) for k in node.keywords}
                called = ast.unparse(node.func)
                if called == "torch.load":
                    assert words.get("weights_only") == "True", path.name
                if called == "np.load":
                    assert words.get("allow_pickle") == "False", path.name


def test_the_repository_names_no_registry_and_no_machine() -> None:
    forbidden = re.compile(
        "pypi" + r"\.org|files\." + "pythonhosted|/" + r"work/|/root/|\.whl\b.*https?:"
    )
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("scripts/*"),
        *ROOT.glob("bench/*.py"),
        *SOURCES,
    ]:
        assert not forbidden.search(path.read_text(encoding="utf-8")), path.name


def test_readme_is_short_and_its_commands_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    assert "pip install uv && uv run threefold demo" in text
    assert "pip install uv && uv run pytest" in text
    from test_surface import SURFACE

    for line in re.findall(r"^threefold (\w+)", text, re.MULTILINE):
        assert line in SURFACE, line
    for name in re.findall(r"^(\w+\.py)\s", text, re.MULTILINE):
        assert (ROOT / "src/threefold" / name).exists(), name
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 60


def test_readme_python_runs(
    finished: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's Python, on the tiny run in place of the demo's."""
    from threefold.training.run import Run

    assert isinstance(finished, Run)
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert blocks
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(finished.recipe.data.root)
    image = Path(finished.recipe.data.root) / finished.sources.test.ids[0]  # type: ignore[union-attr]
    (tmp_path / "cat.png").write_bytes(image.read_bytes())
    import threefold

    monkeypatch.setattr(threefold, "fit", lambda *_, **__: finished, raising=False)
    for block in blocks:
        exec(compile(block, "README", "exec"), {})
