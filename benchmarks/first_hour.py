"""The README followed to the letter on a machine without anything: a transcript, with the time of every command.

    python benchmarks/first_hour.py . --cells pbmc3k_full.h5ad --out transcript.md
    python benchmarks/first_hour.py . --instead 'make demo' 'make venv' --skip 'scldm runs? '     # without Ray

An empty folder, an empty HOME, no virtual environment, no cache, and the python that runs this first on the PATH. The
commands are those of the README's first sections, in their order, as they stand there, in one shell; only ADDRESS, the
repository to clone, is given. A command that serves (`make ui`) is asked for its page and then ended. It stops at the
first command that fails, and exits with its code.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("Two commands", "What just happened", "Your own cells", "Compare runs")
FENCE = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
SERVES = {"make ui": "http://127.0.0.1:5000"}  # command -> where it answers
SERVE_SECONDS = 300
# What a shell has on a fresh machine; and what says where packages are, which is the machine's, not the user's.
KEPT = re.compile(r"PATH|LANG|LC_.*|TERM|USER|LOGNAME|SHELL|TZ|(PIP|UV|SSL|REQUESTS|CURL)_.*|.*_proxy|.*_PROXY")


@dataclass(frozen=True)
class Done:
    command: str
    section: str
    seconds: float
    code: int | None  # None: not run
    output: str


class Shell:
    """One bash in which commands follow one another: the folder and the environment go from each to the next."""

    def __init__(self, folder: Path, environment: Mapping[str, str]):
        self.folder, self.environment = folder, dict(environment)

    def run(self, command: str) -> tuple[int, str]:
        """Exit code and output, stdout and stderr as a terminal shows them."""
        with tempfile.TemporaryDirectory() as kept:
            where, what = Path(kept) / "where", Path(kept) / "what"
            after = f'code=$?; pwd >"{where}"; env -0 >"{what}"; exit $code'
            done = subprocess.run(
                ["bash", "-c", f"{command}\n{after}"], cwd=self.folder, env=self.environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
            self.folder = Path(where.read_text().strip())
            pairs = (x.partition("=") for x in what.read_text().split("\0") if x)
            self.environment = {name: value for name, _, value in pairs}
        return done.returncode, done.stdout

    def serve(self, command: str, address: str) -> tuple[int, str]:
        """Start it, ask for its page, end it: 0 if the page came."""
        with tempfile.TemporaryFile("w+") as log:
            started = subprocess.Popen(
                ["bash", "-c", command], cwd=self.folder, env=self.environment, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                answer = _answer(address, started)
            finally:
                if started.poll() is None:
                    os.killpg(started.pid, signal.SIGTERM)
                started.wait(60)
            log.seek(0)
            said = log.read()
        return (0, f"{said}\n[{address} answered {answer}; ended]") if answer else (1, said)


def _answer(address: str, started: subprocess.Popen[bytes]) -> int | None:
    """HTTP status of a page, or None if none came in time."""
    for _ in range(SERVE_SECONDS):
        if started.poll() is not None:
            return None
        try:
            with urllib.request.urlopen(address, timeout=5) as page:
                return int(page.status)
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    return None


def commands(readme: str, sections: tuple[str, ...] = SECTIONS) -> Iterator[tuple[str, str]]:
    """(section, command) of the shell blocks of some sections, in order; comments left out.

    Raises:
        ValueError: if a section is not there, so that a README that was turned round is noticed.
    """
    titles = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", readme, re.MULTILINE))
    for section in sections:
        if section not in titles:
            raise ValueError(f"the README has no section {section!r}; there are: {', '.join(titles)}")
        for block in FENCE.findall(titles[section]):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s+#\s.*$", "", line).strip()
                if command and not command.startswith("#"):
                    yield section, command


def follow(
    repository: Path,
    folder: Path,
    *,
    cells: Path | None = None,
    skip: str | None = None,
    instead: Mapping[str, str] = {},
) -> Iterator[Done]:
    """Do what the README says in an empty folder.

    Args:
        cells: Becomes cells.h5ad where a command first names it.
        skip: Pattern of commands that are not run.
        instead: Command of the README -> what is run in its place.
    """
    (folder / "home").mkdir()
    kept = {k: v for k, v in os.environ.items() if KEPT.fullmatch(k)}
    path = [p for p in kept["PATH"].split(":") if not (Path(p).parent / "pyvenv.cfg").exists()]
    kept["PATH"] = ":".join([str(Path(sys.base_prefix) / "bin"), *path])
    shell = Shell(folder, {**kept, "HOME": str(folder / "home")})
    for section, command in commands((repository / "README.md").read_text()):
        if skip and re.search(skip, command):
            yield Done(command, section, 0.0, None, "")
            continue
        if cells is not None and "cells.h5ad" in command and not (shell.folder / "cells.h5ad").exists():
            shutil.copy(cells, shell.folder / "cells.h5ad")
        started = time.monotonic()
        command = instead.get(command, command)
        typed = command.replace("ADDRESS", str(repository))
        code, output = shell.serve(typed, SERVES[command]) if command in SERVES else shell.run(typed)
        yield Done(command, section, time.monotonic() - started, code, output)
        if code:
            return


def page(done: list[Done], about: str) -> str:
    """The transcript as Markdown: a table of times, then what each command said."""
    lines = ["# The first hour: a transcript", "", about, "", "| section | command | time | exit code |"]
    lines.append("|---|---|---|---|")
    for d in done:
        command, ran = d.command.replace("|", "\\|"), d.code is not None
        lines.append(
            f"| {d.section} | `{command}` | {_time(d.seconds) if ran else 'not run'} | {d.code if ran else '–'} |"
        )
    lines += ["", f"In all {_time(sum(d.seconds for d in done))}."]
    for d in (d for d in done if d.code is not None):
        lines += ["", f"## `{d.command}`", "", f"{_time(d.seconds)}, exit code {d.code}", ""]
        lines += ["````", _shown(d.output), "````"]
    return "\n".join(lines) + "\n"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _shown(output: str, most: int = 120) -> str:
    """As a terminal leaves it: what a line wrote over itself is gone; the middle of what is very long is left out."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.splitlines()]
    if len(lines) > most:
        lines = [*lines[: most // 2], f"[… {len(lines) - most} lines …]", *lines[-most // 2 :]]
    return "\n".join(lines).strip("\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="a repository with a README.md; what is committed is cloned")
    parser.add_argument("--cells", type=Path, help=".h5ad of your own, which becomes cells.h5ad")
    parser.add_argument("--skip", metavar="REGEX", help="commands that are not run")
    parser.add_argument("--instead", nargs=2, action="append", default=[], metavar=("COMMAND", "OTHER"))
    parser.add_argument("--out", type=Path, default=Path("transcript.md"))
    given = parser.parse_args()
    repository = given.repository.resolve()
    with tempfile.TemporaryDirectory(prefix="first-hour-") as folder:
        done = []
        for step in follow(repository, Path(folder), cells=given.cells, skip=given.skip, instead=dict(given.instead)):
            said = "not run" if step.code is None else f"{_time(step.seconds)}, exit code {step.code}"
            print(f"{step.command}\n    {said}", flush=True)
            done.append(step)
    about = (
        f"`{shlex.join(['python', *sys.argv])}` on {time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores, "
        f"Python {sys.version.split()[0]}; an empty folder and HOME, no environment, "
        "no cache. What is not run was skipped on purpose."
    )
    given.out.write_text(page(done, about))
    print(given.out)
    return next((d.code for d in done if d.code), 0)


if __name__ == "__main__":
    sys.exit(main())
