"""Every `scldm`, `make` and job command in the README and in docs/ exists, and its settings validate."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from pipeline.cli.app import app
from pipeline.config.io.loader import apply_overrides, read_raw, validate
from scldm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MADE_BY_INIT = "jobs/mine.yaml"
STANDS_FOR = {"SEED": "0"}  # where a page shows an option's form


def commands(page: Path) -> Iterator[str]:
    """Commands of a page: lines of fenced shell blocks, continued lines joined, comments left out."""
    for block in FENCE.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.strip()
            if words and not words.startswith("#"):
                yield words


def split(command: str) -> list[str]:
    shown = re.sub(r"\[(--[^\]]*)\]", r"\1", command.removeprefix("$ "))  # [--option VALUE]
    words = [STANDS_FOR.get(w, w) for w in shlex.split(shown, comments=True)]
    if words and words[0] in (".venv/bin/scldm", "scldm"):
        return ["scldm", *words[1:]]
    return words


def found(program: str) -> list[Any]:
    cases = [(p, c) for p in PAGES for c in commands(p) if split_safely(c)[:1] == [program]]
    return [pytest.param(c, id=f"{p.name}: {c[:60]}") for p, c in dict.fromkeys(cases)]


def split_safely(command: str) -> list[str]:
    try:
        return split(command)
    except ValueError:  # a shell construct over several lines
        return []


@cache
def cli() -> click.Group:
    return typer.main.get_command(app)  # type: ignore[return-value]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The sub-command and its parameters, as the program itself parses them; nothing runs."""
    command, name = cli(), ""
    context = click.Context(command, info_name="scldm")
    rest = list(words)
    while hasattr(command, "commands"):
        assert rest, f"scldm {name} needs a sub-command"
        name = f"{name} {rest[0]}".strip()
        assert rest[0] in command.commands, f"scldm has no command {name!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    context = command.make_context(name, rest, parent=context, resilient_parsing=False)
    return name, context.params


@pytest.fixture(scope="module")
def made_by_init(tmp_path_factory):
    """A job as `scldm init screen.h5ad --label cell_type --label cytokine` writes it."""
    from pipeline.cli.init.defaults import choose
    from pipeline.cli.init.inspect import SourceSummary
    from pipeline.cli.init.labels import choose_labels
    from pipeline.cli.init.render import job_text

    profile = {"kind": "classes", "n_missing": 0, "n_classes": 3, "smallest": 50, "middle": 90, "largest": 100}
    columns = {name: {**profile, "same_as": None} for name in ("cell_type", "cytokine")}
    looked = SourceSummary("screen.h5ad", "h5ad", 1, 240, 2000, None, None, None, "raw counts", 999, columns)
    labels = choose_labels(columns, 240, ["cell_type", "cytokine"])
    text = job_text(looked, labels, choose(looked, labels, gpus=0, cpus=2), name="mine", cells={}, command="",
                    source={"type": "h5ad", "path": "screen.h5ad"}, path=MADE_BY_INIT)  # fmt: skip
    path = tmp_path_factory.mktemp("jobs") / "mine.yaml"
    path.write_text(text)
    return path


def check_job(job: str, overrides: list[str], made_by_init: Path) -> None:
    """The file exists and takes the settings. A line that shows a mistake on purpose must be one."""
    path = made_by_init if job == MADE_BY_INIT else ROOT / job
    assert path.is_file(), f"{job} is not in the repository"
    raw = read_raw(path)
    apply_overrides(raw, overrides)
    validate(raw)


@pytest.mark.parametrize("command", found("scldm"))
def test_a_command_is_one_that_the_program_takes(command, made_by_init):
    words = split(command)[1:]
    if words == ["--help"] or words[-1:] == ["--help"]:
        words = words[:-1]
    name, params = parsed(words)
    if name not in ("run", "validate", "plan", "submit", "doctor") or params.get("job") is None:
        return
    overrides = list(params.get("overrides") or [])
    if "did you mean" in command:
        with pytest.raises(InputError, match="did you mean"):
            check_job(str(params["job"]), overrides, made_by_init)
        return
    check_job(str(params["job"]), overrides, made_by_init)


@pytest.mark.parametrize("command", found("ray"))
def test_a_job_that_is_submitted_exists_and_takes_its_settings(command, made_by_init):
    words = split(command)
    if words[:3] != ["ray", "job", "submit"] or "$" in command:
        return
    jobs = [w for w in words[3:] if w.endswith(".yaml")]
    assert len(jobs) == 1, command
    check_job(jobs[0], [w for w in words[words.index(jobs[0]) + 1 :] if "=" in w], made_by_init)


@pytest.mark.parametrize("command", found("make"))
def test_a_make_target_exists(command):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in split(command)[1:]:
        assert "=" in word or word in targets, f"make has no target {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_of_the_repository_that_a_page_names_are_there(page):
    text = page.read_text()
    named = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    named += re.findall(
        r"(?<![\w/.<])((?:tests|benchmarks|jobs|cluster|pipeline|scldm)/[\w./-]+\.(?:py|yaml|md|sh))", text
    )
    for link in named:
        if link == MADE_BY_INIT:
            continue
        beside, below = (page.parent / link).resolve(), ROOT / link
        assert beside.exists() or below.exists(), f"{page.name} names {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_page_that_uses_the_pipeline_mine_has_it_named_so(page):
    """`scldm init` names a pipeline after the file of cells; `name=mine` would then find nothing."""
    makes = [c for c in commands(page) if "scldm init" in c and MADE_BY_INIT in c]
    if makes and re.search(r"name=mine|runs/mine", page.read_text()):
        assert all("--name mine" in c for c in makes), makes


def test_errors_that_the_questions_quote_are_in_the_source():
    text = " ".join(p.read_text() for d in ("scldm", "pipeline") for p in sorted((ROOT / d).rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", text)
    quoted = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 10
    for error in quoted:
        for part in (p.strip() for p in error.split("…")):
            assert part in source, f"no error says {part!r}"


def test_every_page_is_in_the_contents():
    listed = (ROOT / "docs" / "index.md").read_text().partition("```{toctree}")[2].split()
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages - set(listed) == set()


def test_help_swallows_no_placeholder():
    """Help is Markdown, where <name> is an HTML tag that nobody sees."""

    def texts(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
        yield path, command.help or ""
        for param in command.params:
            yield f"{path} {param.name}", getattr(param, "help", None) or ""
        for name, part in getattr(command, "commands", {}).items():
            yield from texts(part, f"{path} {name}")

    assert [where for where, text in texts(cli(), "scldm") if re.search(r"(?<!`)<[a-z]+>", text)] == []
