"""One line on stdout for each event, with time, stage and rank."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from pipeline.core.logs import PACKAGES, StdoutHandler, setup_logging

log = logging.getLogger("pipeline.training.example")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave the process's loggers as they were."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


def test_a_line_has_time_stage_and_rank_and_from_a_warning_on_the_level(capsys):
    setup_logging(stage="train_vae", rank=1)
    log.info("step 1200/50000")
    log.warning("a slow worker")
    log.debug("not shown")
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d train_vae\[1\] step 1200/50000", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d train_vae\[1\] WARNING a slow worker", second)


def test_a_second_call_replaces_the_stage_and_prints_nothing_twice(capsys):
    setup_logging(stage="ingest")
    setup_logging(stage="encode")
    log.info("12 shards")
    assert re.fullmatch(r"\d\d:\d\d:\d\d encode 12 shards\n", capsys.readouterr().out)


def test_other_loggers_are_left_alone(capsys):
    root, other = logging.getLogger(), logging.getLogger("some.library")
    before = (list(root.handlers), root.level, list(other.handlers), other.level)
    setup_logging(stage="train_vae", rank=0)
    other.warning("not ours")
    assert (list(root.handlers), root.level, list(other.handlers), other.level) == before
    assert "not ours" not in capsys.readouterr().out


def test_a_workers_lines_do_not_reach_the_handlers_that_ray_puts_on_the_root_logger(capsys):
    root, ray = logging.getLogger(), logging.StreamHandler()
    root.addHandler(ray)
    try:
        setup_logging(stage="train_vae", rank=0)
        log.warning("once")
    finally:
        root.removeHandler(ray)
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("once") == 1
    assert any(isinstance(h, StdoutHandler) for h in logging.getLogger("pipeline").handlers)
