"""The README and CONTRIBUTING: short, and their commands and Python work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.command_line import SURFACE
from support.paths import ROOT

import threefold
from threefold.training.run import Run

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_short_and_its_commands_exist() -> None:
    assert len(README.splitlines()) < 200
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 60

    assert "pip install uv && uv run threefold demo" in README
    assert "pip install uv && uv run pytest" in README
    for verb in re.findall(r"^threefold (\w+)", README, re.MULTILINE):
        assert verb in SURFACE, verb


def test_readme_python_runs(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's Python, on the tiny run in place of the demo's."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    assert finished.sources.test is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(finished.recipe.data.root)
    image = Path(finished.recipe.data.root) / finished.sources.test.ids[0]
    (tmp_path / "cat.png").write_bytes(image.read_bytes())
    monkeypatch.setattr(threefold, "fit", lambda *_, **__: finished, raising=False)

    for block in blocks:
        exec(compile(block, "README", "exec"), {})
