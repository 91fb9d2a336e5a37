"""The command `scldm open`: the newest report of a pipeline, in a browser."""

from __future__ import annotations

import os
import shlex
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import reported
from pipeline.core.manifest import Manifest, read_manifest
from scldm.errors import InputError

REPORT = "report"  # fact of a stage that wrote a page
Folder = Annotated[
    Path, typer.Argument(metavar="OUTPUT/NAME", help="A pipeline, for example runs/demo, or one of its stages.")
]
Print = Annotated[bool, typer.Option("--print", help="Print the page's path, and open nothing.")]


def open_report(folder: Folder, only_print: Print = False) -> None:
    """Open the newest report of a pipeline in a browser. Where there is none, its path is printed.

    Example: `scldm open runs/demo`
    """
    with reported():
        page = newest_page(folder.expanduser())
        typer.echo(str(page))
        if only_print:
            return
        browser = browser_here()
        if browser is None:
            typer.echo("no browser is on this machine: copy the file, which is all of the report", err=True)
        else:
            browser.open(page.absolute().as_uri())


def newest_page(folder: Path) -> Path:
    """Return the page of the stage, or of the newest stage that wrote one.

    Raises:
        InputError: There is none.
    """
    from pipeline.workflow.history import finished_manifests

    own = read_manifest(folder) if folder.is_dir() else None
    made: list[Manifest] = [own] if own is not None else finished_manifests(folder)
    pages = [
        page for m in made if REPORT in m.facts and (page := folder_of(m, folder) / str(m.facts[REPORT])).is_file()
    ]
    if pages:
        return pages[-1]
    job = ["scldm", "run", "jobs/evaluate.yaml", f"output={folder.parent}", f"name={folder.name}"]
    if own is not None:
        raise InputError(
            f"{folder} is a stage {own.stage}, which wrote no report; name the pipeline, {folder.parent.parent}"
        )
    raise InputError(f"{folder} has no report: its generated cells were not compared with real ones. {shlex.join(job)}")


def folder_of(manifest: Manifest, given: Path) -> Path:
    """Return the folder of a stage below the one that was given, which may have been moved since."""
    if read_manifest(given) is not None:
        return given
    return given / manifest.stage / manifest.version


def browser_here() -> webbrowser.BaseBrowser | None:
    """Return the browser of this machine; None if it has none, or only one that would take over the terminal."""
    screen = {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"} & os.environ.keys()
    if sys.platform.startswith("linux") and not screen:
        return None
    try:
        return webbrowser.get()
    except webbrowser.Error:
        return None
