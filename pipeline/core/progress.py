"""Report the progress of a stage from the worker to the driver's terminal, through one small file.

The worker writes `progress.json` by rename, at most once a second. The driver polls it and shows a bar on a terminal
or in a notebook, or one line every few seconds in a log. Nothing depends on the file or waits for it.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from pipeline.core.prometheus import PrometheusGauges
from pipeline.core.text import compact, duration

log = logging.getLogger(__name__)

PROGRESS = "progress.json"


class ProgressWriter:
    """Worker side: write progress.json and set the gauges.

    Args:
        folder: The stage's folder.
        every_seconds: Shortest time between two writes, but for the last step.
        clock: Current time in seconds.
    """

    def __init__(self, folder: str | Path, every_seconds: float = 1.0, clock: Callable[[], float] = time.monotonic):
        self.path = Path(folder) / PROGRESS
        self.every_seconds = every_seconds
        self.clock = clock
        self.gauges = PrometheusGauges(Path(folder))
        self._written = float("-inf")

    def update(self, step: int, total: int, **fields: float) -> None:
        """Report how far the stage is. Fields are shown in their order: loss, lr, cells_per_s, …"""
        now = self.clock()
        if now - self._written < self.every_seconds and step < total:
            return
        self._written = now
        self.gauges.set(
            {"progress/step": step, "progress/total": total, **{f"progress/{k}": v for k, v in fields.items()}}
        )
        tmp = self.path.with_name(f".{PROGRESS}.tmp")
        try:
            tmp.write_text(json.dumps({"step": step, "total": total, "at": time.time(), "fields": fields}))
            tmp.replace(self.path)
        except OSError:
            return  # a full disk must fail where it matters, not in a progress line


class ProgressReader:
    """Driver side: show progress.json while a block runs.

    Example: `with ProgressReader(folder, "train_vae", 5.0): trainer.fit()`

    Args:
        every_seconds: Time between two lines in a log; a bar on a terminal follows immediately.
        stream: Where it is shown; default: a bar if standard output is a terminal or a notebook's, else lines in the
            log.
    """

    def __init__(
        self,
        folder: str | Path,
        stage: str,
        every_seconds: float = 5.0,
        *,
        stream: TextIO | None = None,
        poll_seconds: float = 0.5,
    ):
        self.path = Path(folder) / PROGRESS
        self.stage = stage
        self.every_seconds = every_seconds
        self.poll_seconds = min(poll_seconds, every_seconds)
        self.stream = stream
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"progress of {stage}", daemon=True)
        self._began = time.time()
        self._first: tuple[float, int] | None = None
        self._last = 0
        self._shown = -1

    def __enter__(self) -> Self:
        self._began = time.time()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _follow(self) -> None:
        stream = self.stream or sys.stdout
        if getattr(stream, "isatty", bool)():
            self._follow_bar(stream)
        elif self.stream is None and in_notebook():
            self._follow_notebook_bar()
        else:
            self._follow_lines()

    def _follow_lines(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(self.poll_seconds):
            now = time.monotonic()
            if now >= due and self._show(self._read()):
                due = now + self.every_seconds
        self._show(self._read())

    def _show(self, progress: Mapping[str, Any] | None) -> bool:
        """Write a line unless there is nothing new. Returns whether it did."""
        if progress is None or progress["step"] == self._shown:
            return False
        self._shown = progress["step"]
        if self.stream is not None:
            print(progress_line(self.stage, progress, self._eta(progress)), file=self.stream, flush=True)
        else:
            detail = self.stage.partition(" ")[2]  # the log names the stage itself
            log.info("%s", progress_line(detail, progress, self._eta(progress)).removeprefix(" | "))
        return True

    def _follow_bar(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.fields[stage]}"), BarColumn(30), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(file=stream)) as bar:
            task = bar.add_task("starting", stage=self.stage, total=None)
            running = True
            while running:
                running = not self._stop.wait(self.poll_seconds)
                if (progress := self._read()) is not None:
                    text = progress_line("", progress, self._eta(progress)).removeprefix(" | ")
                    bar.update(task, completed=progress["step"], total=progress["total"], description=text)

    def _follow_notebook_bar(self) -> None:
        from tqdm import tqdm

        width = "{desc} {percentage:3.0f}%|{bar:30}| {postfix}"
        with tqdm(total=0, desc=self.stage, file=sys.stdout, bar_format=width) as bar:
            running = True
            while running:
                running = not self._stop.wait(self.poll_seconds)
                if (progress := self._read()) is not None:
                    bar.total, bar.n = progress["total"], progress["step"]
                    text = progress_line("", progress, self._eta(progress)).removeprefix(" | ")
                    bar.set_postfix_str(text, refresh=True)

    def _read(self) -> dict[str, Any] | None:
        """Return the progress; None if there is none or it was written before this attempt."""
        try:
            progress = json.loads(self.path.read_text())
            fresh = self.path.stat().st_mtime >= self._began - 1
        except (OSError, ValueError):
            return None
        return progress if fresh else None

    def _eta(self, progress: Mapping[str, Any]) -> float | None:
        """Return the seconds left, at the mean speed of this attempt (a resumed run does not start at step 0)."""
        at, step = progress["at"], progress["step"]
        if self._first is None or step < self._last:  # a restart goes back to its checkpoint
            self._first = (at, step)
        self._last = step
        began, first_step = self._first
        if step <= first_step or at <= began:
            return None
        return (progress["total"] - step) * (at - began) / (step - first_step)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose output is no terminal and shows carriage returns."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


def progress_line(stage: str, progress: Mapping[str, Any], eta: float | None) -> str:
    """Return a line such as `train_vae | step 120/600 | loss 412.3 | lr 1.0e-3 | 184 cells/s | eta 1m20s`.

    Args:
        progress: Contents of progress.json: step, total, fields.
        eta: Seconds left.
    """
    parts = [stage, f"step {progress['step']}/{progress['total']}"]
    parts += [_field(name, value) for name, value in progress["fields"].items()]
    if eta is not None and progress["step"] < progress["total"]:
        parts.append(f"eta {duration(eta)}")
    return " | ".join(parts)


def _field(name: str, value: Any) -> str:
    if not isinstance(value, (int, float)):
        return f"{name} {value}"
    if name.endswith("_per_s"):
        return f"{compact(value)} {name.removesuffix('_per_s')}/s"
    if name == "lr":
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"lr {mantissa}e{int(exponent)}" if value == value and abs(value) != float("inf") else f"lr {value}"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
