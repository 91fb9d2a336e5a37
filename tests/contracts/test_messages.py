"""Commands, settings and job files that a message names exist: what a user is told to do must work."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import typer

from pipeline.cli.app import app
from pipeline.config.io.errors import all_paths
from pipeline.config.job import Job
from pipeline.core.fault_points import POINTS

ROOT = Path(__file__).resolve().parents[2]
FILES = [*sorted((ROOT / "pipeline").rglob("*.py")), *sorted((ROOT / "scldm").rglob("*.py"))]
PATHS = {path for model in get_args(get_args(Job)[0]) for path in all_paths(model)}
SECTIONS = ("ingest", "train_vae", "encode", "train_flow", "generate", "evaluate", "train", "resources", "checkpoints",
            "tracking", "inputs", "genes", "split", "source")  # fmt: skip
SETTING = re.compile(rf"(?<![\w./<-])((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)")
COMMAND = re.compile(r"\bscldm ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?")
JOB_FILE = re.compile(r"\bjobs/[\w/]+\.yaml\b")
FILE_ENDINGS = (".json", ".tsv", ".parquet", ".h5ad", ".arrow", ".csv", ".txt")
PROSE = {"on", "reads", "wrote", "is", "and", "needs"}  # words that follow the name of the package in sentences
WRITTEN_BY_THE_USER = {"jobs/mine.yaml", "jobs/NAME.yaml"}
NOT_OURS = ROOT / "scldm" / "checkpoints" / "upstream"  # names settings of upstream's


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string of a module that is not a docstring."""
    tree = ast.parse(path.read_text())
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, holders)]
    docstrings = {id(b.value) for body in bodies for b in body if isinstance(b, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


@cache
def exists(setting: str) -> bool:
    """Whether a dotted name is a setting, a section, or the end of one."""
    return any(f".{setting}." in f".{path}." for path in PATHS)


def unknown_settings(text: str) -> list[str]:
    found = [m[1] for m in SETTING.finditer(text)]
    return [s for s in found if s not in POINTS and not s.endswith(FILE_ENDINGS) and not exists(s)]


@cache
def commands() -> dict[str, set[str]]:
    """Command -> its subcommands; none for a plain command."""
    group = typer.main.get_command(app)
    return {name: set(getattr(command, "commands", ())) for name, command in group.commands.items()}


def unknown_commands(text: str) -> list[str]:
    known = commands()
    wrong = []
    for match in COMMAND.finditer(text):
        first, second = match[1], match[2]
        if first in PROSE:
            continue
        if first not in known or (known[first] and second not in known[first]):
            wrong.append(match[0])
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_message_names_exists(path):
    wrong = []
    for line, text in texts(path):
        wrong += [f"{line}: no command: {c}" for c in unknown_commands(text)]
        if NOT_OURS not in path.parents:
            wrong += [f"{line}: no setting: {s}" for s in unknown_settings(text)]
        wrong += [
            f"{line}: no job file: {job}"
            for job in JOB_FILE.findall(text)
            if not (ROOT / job).is_file() and job not in WRITTEN_BY_THE_USER
        ]
    assert wrong == []


def test_names_that_do_not_exist_are_found():
    assert unknown_commands("check them with `scldm data validate`") == ["scldm data validate"]
    assert unknown_commands("run `scldm cluster restart`") == ["scldm cluster restart"]
    assert unknown_commands("`scldm validate-data cells.h5ad` or `scldm runs compare`") == []
    assert unknown_settings("set ingest.presence=true") == ["ingest.presence"]
    assert unknown_settings("set ingest.genes.presence=true or train.max_steps") == []
