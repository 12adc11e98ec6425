"""Draw the packages of threefold and their imports, from the source code.

    python scripts/draw_packages.py [--out FILE]

The picture is an arc diagram: packages from the top layer down, and an arc from each package to
every package that it imports, as thick as the imports are many. Arcs to the root modules, which
every package imports, are left out. A test keeps docs/packages.svg current.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "threefold"
ORDER = (
    "(root)",
    "recipe",
    "data",
    "predictions",
    "stats",
    "ensembles",
    "evaluation",
    "runtime",
    "report",
    "saved_run",
    "models",
    "training",
    "exporting",
    "serving",
    "api",
    "classifier",
    "search",
    "paper",
    "cli",
)
"""Packages in import order: each imports only those before it."""

_ROW, _TOP, _LEFT, _BOX, _WIDTH = 34, 24, 24, 150, 640


def package_of(module: str) -> str:
    """Return the package of a full module name; modules beside the packages are (root)."""
    parts = module.split(".")
    if parts[-1] == "__main__":
        return "cli"
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "(root)"


def imported_modules(path: Path) -> set[str]:
    """Return the full names of the threefold modules that a file imports, lazily or not."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in modules if name.startswith("threefold.")}


def count_imports() -> Counter[tuple[str, str]]:
    """Count the files of each package that import each other package."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in sorted(SOURCE.rglob("*.py")):
        if path == SOURCE / "__init__.py":  # offers the public names of the other packages
            continue
        relative = path.relative_to(SOURCE).with_suffix("")
        importer = package_of(".".join(("threefold", *relative.parts)))
        imported = {package_of(name) for name in imported_modules(path)}
        for package in imported - {importer}:
            counts[importer, package] += 1
    return counts


def draw(counts: Counter[tuple[str, str]]) -> str:
    """Return the diagram as SVG text."""
    height = _TOP * 2 + _ROW * len(ORDER)
    centre = {name: _TOP + _ROW * row + _ROW // 2 for row, name in enumerate(reversed(ORDER))}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="14" role="img">',
        "<title>Packages of threefold; arcs point from a package to those it imports</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    right = _LEFT + _BOX
    arcs = {pair: count for pair, count in counts.items() if pair[1] != "(root)"}
    for (importer, imported), count in sorted(arcs.items()):
        start, end = centre[importer], centre[imported]
        start += 5  # below the arrowheads of arcs that end here
        reach = right + 24 + abs(end - start) * 0.85
        width = 0.6 + 0.35 * min(count, 10)
        lines.append(
            f'<path d="M{right} {start} C{reach:.0f} {start} {reach:.0f} {end} {right + 7} {end}" '
            f'fill="none" stroke="#5b7aa8" stroke-opacity="0.55" stroke-width="{width:.1f}">'
            f"<title>{importer} imports {imported} in {count} files</title></path>"
        )
    for name, y in centre.items():
        lines.append(
            f'<rect x="{_LEFT}" y="{y - 12}" width="{_BOX}" height="24" rx="4" fill="#eef2f8" '
            'stroke="#5b7aa8"/>'
        )
        if any(imported == name for _, imported in arcs):
            lines.append(
                f'<path d="M{right + 8} {y - 4} L{right + 1} {y} L{right + 8} {y + 4} Z" '
                'fill="#5b7aa8"/>'
            )
        lines.append(
            f'<text x="{_LEFT + _BOX // 2}" y="{y + 5}" text-anchor="middle" fill="#1d2b3f">'
            f"{name}</text>"
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "packages.svg")
    options = parser.parse_args()
    options.out.write_text(draw(count_imports()), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
