"""The documents say what the program does: the help text, the file map, the commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import typer.main

import cli

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ROOT / "docs" / "commands.md"
TITLE = """# Commands

The help text of every command, as `rolora COMMAND --help` prints it. Written by

    ROLORA_UPDATE_DOCS=1 python -m pytest tests/test_readme.py
"""


def command_names() -> list[str]:
    return sorted(typer.main.get_group(cli.app).commands)


def help_text(*command: str) -> str:
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run(
        [sys.executable, "cli.py", *command, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.rstrip() for line in result.stdout.strip("\n").splitlines()]
    return "\n".join(lines).replace("cli.py", "rolora").strip("\n")


def render_commands() -> str:
    sections = [
        f"## rolora {name}\n\n```text\n{help_text(name)}\n```\n" for name in command_names()
    ]
    return "\n".join([TITLE, *sections])


def test_the_command_reference_is_what_help_prints() -> None:
    rendered = render_commands()
    if os.environ.get("ROLORA_UPDATE_DOCS"):
        COMMANDS.write_text(rendered, encoding="utf-8")
    assert COMMANDS.read_text(encoding="utf-8") == rendered, (
        "docs/commands.md is stale: ROLORA_UPDATE_DOCS=1 python -m pytest tests/test_readme.py"
    )


def test_the_file_map_lists_every_module_and_nothing_else() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    ((?:deploy|reslora|rolora)/\w+\.py) ", readme, re.MULTILINE)
    listed = set(lines)
    assert len(lines) == len(listed), "a room is listed twice"
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("deploy", "reslora", "rolora")
        for path in (ROOT / package).glob("*.py")
        if path.name != "__init__.py"
    }
    assert listed == modules


def test_every_purpose_in_the_file_map_is_short() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    purposes = re.findall(r"^    (?:deploy|reslora|rolora)/\w+\.py +(.+)$", readme, re.MULTILINE)
    assert [purpose for purpose in purposes if not 2 <= len(purpose.split()) <= 8] == []


def test_the_readme_names_only_commands_and_options_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    group = typer.main.get_group(cli.app)
    calls = re.findall(r"(?:^|bin/)\s*rolora ([a-z-]+)((?: .*)?)$", text, re.MULTILINE)
    assert calls
    for name, rest in calls:
        assert name in group.commands
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        known |= {option for p in group.commands[name].params for option in p.secondary_opts}
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", rest):
            assert option in known | {"--help"}, f"rolora {name} has no {option}"


def test_makefile_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"^    make ([a-z-]+)", readme, re.MULTILINE)) <= targets
