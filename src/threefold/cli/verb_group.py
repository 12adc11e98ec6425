"""The class of the command line's groups: what to type where a path takes the place of a verb."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from typer.core import TyperGroup


class VerbGroup(TyperGroup):
    """The verbs of `threefold`."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a verb; a path that exists ends the program with the verb that was meant."""
        command = super().get_command(ctx, cmd_name)
        # os.path.exists answers for names that no file can have, where Path.exists raises.
        if command is None and not ctx.resilient_parsing and os.path.exists(cmd_name):
            ctx.fail(f"{cmd_name} is no verb; {self.advice(Path(cmd_name))}")
        return command

    def advice(self, path: Path) -> str:
        """Say what can be done with a file or a folder."""
        if path.suffix.lower() == ".toml":
            return f"to train this recipe: threefold train {path}"
        if path.suffix.lower() == ".onnx":
            return f"to classify images with it: threefold predict {path} IMAGES"
        return f"to train on it: threefold fit {path}"


class DataVerbGroup(VerbGroup):
    """The verbs of `threefold data`."""

    def advice(self, path: Path) -> str:
        """Say what can be done with a data set."""
        return f"to check it: threefold data check {path}"
