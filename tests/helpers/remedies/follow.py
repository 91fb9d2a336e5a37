"""Follows advice: makes the case that prints it, takes the setting or the command out of the message, and applies it.

A remedy is a function that does this for one case, registered with the texts that it is about. It takes names and
values from the message, so that a wrong name in a message fails.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import typer
import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config.context import StageContext
from pipeline.config.io.loader import load_job
from pipeline.config.resources import ResourcesConfig
from pipeline.stages import ingest as ingest_stage
from pipeline.workflow.preflight import check_settings
from scldm.errors import InputError


@dataclass(frozen=True)
class Case:
    """What a remedy is followed in.

    Args:
        folder: Empty, and the current folder.
        shared: For what is made once for several remedies.
    """

    folder: Path
    shared: Path
    patch: pytest.MonkeyPatch

    def once(self, name: str, make: Callable[[Path], Any]) -> Path:
        """Return a folder under `shared` that `make` filled once."""
        folder = self.shared / name
        if not folder.exists():
            folder.mkdir()
            make(folder)
        return folder

    def read_here(self) -> None:
        """Let `scldm init` and `scldm validate-data` read cells in this process: a child takes seconds to start."""
        from pipeline.cli.init.inspect import inspect_source
        from pipeline.data.inspection import sandbox
        from pipeline.data.inspection.examine import Question, examine

        def ask(question: dict[str, Any], memory_gib: float, child: str = "") -> Any:
            lists = {k: tuple(v) for k, v in question.items() if isinstance(v, list)}
            asked = Question(**{**question, **lists})
            return inspect_source(asked) if child else [{**x.to_json(), "text": x.text()} for x in examine(asked)]

        self.patch.setattr(sandbox, "ask", ask)
        self.patch.setattr("pipeline.cli.data.ask", ask)


@dataclass(frozen=True)
class Remedy:
    """Advice that a test follows.

    Args:
        texts: (module, part of the text) of what this remedy is about.
    """

    texts: tuple[tuple[str, str], ...]
    follow: Callable[[Case], None]


REMEDIES: list[Remedy] = []


def follows(*texts: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a function as the one that follows some texts, each given as `module: part of the text`."""

    def register(follow: Callable[[Case], None]) -> Callable[[Case], None]:
        pairs = (text.partition(": ") for text in texts)
        REMEDIES.append(Remedy(tuple((module, part) for module, _, part in pairs), follow))
        return follow

    return register


# ---- the program ---------------------------------------------------------------------------------------------------
def run(*words: object) -> tuple[int, str]:
    """Run `scldm` in this process. Returns the exit code, and all that was printed."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def refused(*words: object) -> str:
    """Run `scldm`, which must exit with 2. Returns what it said."""
    code, said = run(*words)
    assert code == 2, f"exit code {code}: {said}"
    return said


def done(*words: object) -> str:
    """Run `scldm`, which must exit with 0. Returns what it said."""
    code, said = run(*words)
    assert code == 0, f"exit code {code}: {said}"
    return said


def parse(*words: str) -> None:
    """Let the program parse a command as its own, without running it."""
    parse_with(typer.main.get_command(app), words)


def parse_with(command: click.Command, words: tuple[str, ...]) -> None:
    """Parse words with a click program, through its groups."""
    rest = list(words)
    context = click.Context(command)
    while isinstance(command, click.Group):
        assert rest, f"{' '.join(words)}: a sub-command is missing"
        assert rest[0] in command.commands, f"{' '.join(words)}: there is no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
        context = click.Context(command, parent=context, info_name=words[0])
    command.make_context("it", rest, parent=context)


# ---- jobs ----------------------------------------------------------------------------------------------------------
def write_job(path: Path, **content: Any) -> Path:
    """Write a job file; `kind` is `pipeline`, `name` demo and `output` runs unless given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"kind": "pipeline", "name": "demo", "output": "runs", **content}))
    return path


def pipeline_on(case: Case, source: dict[str, Any], **ingest: Any) -> Path:
    """Write a pipeline on a source."""
    ingest = {"source": source, "labels": ["cell_type"], **ingest}
    return write_job(case.folder / "job.yaml", ingest=ingest, generate={"like": "train"})


def ingest(job: Path, *settings: str) -> dict[str, Any]:
    """Ingest the cells of a job, with settings as on the command line. Returns the facts of the stage."""
    loaded: Any = load_job(job, settings)
    check_settings(loaded)
    folder = Path(tempfile.mkdtemp(dir=job.parent, prefix="ingest-"))
    tracker: Any = SimpleNamespace()
    return ingest_stage.run(
        loaded.ingest, StageContext(folder, {}, 0, ResourcesConfig(), tracker, output=job.parent / "runs")
    )


def message(call: Callable[..., Any], *given: Any, **named: Any) -> str:
    """Return the message of a call that must be refused."""
    with pytest.raises((InputError, ValueError)) as error:
        call(*given, **named)
    return str(error.value)


# ---- messages ------------------------------------------------------------------------------------------------------
def setting(said: str, name: str) -> str:
    """Return a setting of a message with its value, as the command line takes it: `key=value`."""
    value = r"(?:=|: )(\{.*?\}|\[[^\]]*\]|[^\s;,)`]+)"
    found = re.search(rf"(?<![\w.]){re.escape(name)}{value}", said)
    assert found, f"the message gives {name} no value: {said}"
    return f"{name}={found[1].removesuffix('.')}"


def named(said: str, name: str) -> str:
    """Return a name that a message must hold."""
    assert re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", said), f"the message does not name {name}: {said}"
    return name


def command(said: str, start: str) -> list[str]:
    """Return the words after `scldm` of a command in a message that begins with `start`; it ends at a quote or line."""
    found = re.search(rf"{re.escape(start)}[^`\n]*", said)
    assert found, f"the message names no command {start}: {said}"
    return shlex.split(found[0])[1:]


def other(before: str, after: str) -> str:
    """Return a message that came after advice was followed, which must not be the same one again."""
    again = [line for line in before.splitlines() if line in after.splitlines() and not line.endswith(":")]
    assert again == [], f"said again: {after}"
    return after
