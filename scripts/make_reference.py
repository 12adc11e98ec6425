"""Write docs/reference/cli.md from the Typer app.

`uv run python scripts/make_reference.py` writes the page; a test compares it with the app.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from threefold.cli.app import app

PAGE = Path(__file__).parents[1] / "docs/reference/cli.md"
INTRODUCTION = """# Command line

Written by `scripts/make_reference.py` from the program itself; do not edit.

Exit codes: 0 done, 1 an error that you can fix (one line on standard error), 2 wrong usage,
130 interrupted. `threefold --version` prints the version; `threefold --install-completion` sets up
completion in your shell.
"""


def cli_page() -> str:
    """Return the reference of all verbs as Markdown."""
    root = typer.main.get_command(app)
    sections = [INTRODUCTION]
    for name, command in commands_of(root):
        sections.append(section(f"threefold {name}", command))
    return "\n".join(sections)


def commands_of(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every verb with its full name, those of groups included."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def section(name: str, command: Any) -> str:
    """Return the section of one verb: its usage, its purpose, its arguments and options."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [
        p for p in command.params if p.param_type_name == "option" and "--help" not in p.opts
    ]
    usage = " ".join([name, *(["[OPTIONS]"] if options else []), *map(placeholder, arguments)])
    lines = [f"## {name}", "", "```", usage, "```", "", command.help.strip(), ""]
    if command.params:
        lines += ["| argument or option | default | meaning |", "|---|---|---|"]
        lines += [row(f"`{argument_name(p)}`", p) for p in arguments]
        lines += [row(f"`{option_name(p)}`", p) for p in options]
        lines.append("")
    return "\n".join(lines)


def row(name: str, parameter: Any) -> str:
    """Return the table row of one argument or option."""
    meaning = (parameter.help or "").replace("|", "\\|").replace("*", "\\*")
    if parameter.envvar:
        meaning += f" Environment variable: `{parameter.envvar}`."
    return f"| {name} | {default_of(parameter)} | {meaning} |"


def default_of(parameter: Any) -> str:
    """Return a parameter's default for the table; flags and empty defaults have none."""
    if parameter.required:
        return "required"
    default = parameter.default
    if default is None or default is False or default == "" or callable(default):
        return ""
    return f"`{default.as_posix() if isinstance(default, Path) else default}`"


def argument_name(parameter: Any) -> str:
    """Return the name of an argument as the usage shows it."""
    return str(parameter.metavar or parameter.name.upper())


def placeholder(parameter: Any) -> str:
    """Return an argument as the usage shows it: optional in brackets, repeated with dots."""
    name = argument_name(parameter)
    if parameter.nargs == -1:
        name += "..."
    return name if parameter.required else f"[{name}]"


def option_name(parameter: Any) -> str:
    """Return an option with a word for its value."""
    flag = max(parameter.opts, key=len)
    if parameter.is_flag:
        return str(flag)
    return f"{flag} {parameter.metavar or flag.lstrip('-').upper()}"


if __name__ == "__main__":
    PAGE.write_text(cli_page(), encoding="utf-8")
