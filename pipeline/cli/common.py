"""Shared by all commands: the job-file arguments, loading a job, and errors as messages with exit codes."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.config.job import JobBase

from scldm.errors import InputError

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="Job file, for example jobs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]…", help="Settings to change, parsed as YAML.")
]


@contextmanager
def reported() -> Iterator[None]:
    """Print errors as one message and exit with the code that goes with each kind."""

    try:
        yield
    except InputError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    except (typer.Exit, SystemExit):
        raise
    except Exception as error:
        _say_failure(error)
        raise typer.Exit(1) from None


def _say_failure(error: Exception) -> None:
    log = getattr(error, "log", None)
    text = str(error)
    if log is None:
        with tempfile.NamedTemporaryFile("w", prefix="scldm-error-", suffix=".log", delete=False) as f:
            f.write(traceback.format_exc())
        log, text = f.name, f"{type(error).__name__}: {(text.splitlines() or ['no message'])[0]}"
    typer.echo(f"{text}\n  log: {log}", err=True)


def load(job: Path, overrides: list[str] | None) -> JobBase:
    """Load a job file and check its settings, without looking at inputs and outputs.

    Raises:
        InputError: The job is invalid.
    """
    from pipeline.config.io.loader import load_job
    from pipeline.workflow.preflight import check_settings

    loaded = load_job(job, overrides or [])
    check_settings(loaded)
    return loaded
