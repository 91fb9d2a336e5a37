"""Logging of one process: a line per event on stdout, with time, stage and rank.

    12:03:44 train_vae[1] step 1200/50000 | loss 0.4132 | 18.4k cells/s
    12:03:51 train_vae[0] WARNING checkpoint passed over: step-00000800-w2-1f…: state.pt is missing

Modules log through `logging.getLogger(__name__)`. A process calls `setup_logging` once it knows what it is; without
that call, Python's default applies: warnings and errors go to stderr, everything else is dropped.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

PACKAGES = ("pipeline", "scldm")  # the only loggers that are configured
STOPPED = "stopped as requested"  # `scldm stop` finds the driver's last message by it


def setup_logging(*, stage: str, rank: int | None = None, level: int = logging.INFO) -> None:
    """Send the log of this project to stdout, each line with time, stage and rank.

    The driver calls it when a stage begins, and again for the next stage; a worker calls it when its process group is
    up. A second call replaces stage and rank. Other libraries' loggers and the root logger are left alone.

    Args:
        stage: The stage that this process runs, for example `train_vae`.
        rank: The worker's rank; None on the driver. A worker's records do not propagate to the root logger, because
            Ray Train puts a handler of its own there, which would print each line again.
        level: The lowest level that is written.
    """
    prefix = stage if rank is None else f"{stage}[{rank}]"
    for name in PACKAGES:
        logger = logging.getLogger(name)
        handler = next((h for h in logger.handlers if isinstance(h, StdoutHandler)), None)
        if handler is None:
            handler = StdoutHandler()
            logger.addHandler(handler)
        handler.setFormatter(LineFormatter(prefix))
        logger.setLevel(level)
        logger.propagate = rank is None


class StdoutHandler(logging.StreamHandler[TextIO]):
    """Write to whatever `sys.stdout` is when a record arrives, so that a replaced stdout is followed; and flush."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # a plain attribute in the base class
        return sys.stdout


class LineFormatter(logging.Formatter):
    """Format a record as `<time> <prefix> <message>`, with the level's name before the message from WARNING on."""

    def __init__(self, prefix: str):
        super().__init__(datefmt="%H:%M:%S")
        self.prefix = prefix

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname} " if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record, self.datefmt)} {self.prefix} {level}{record.message}"
