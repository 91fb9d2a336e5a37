"""Compares what a job requests from Ray with what the cluster has: Ray itself would wait for ever, without a word."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from pipeline.config.job import ResourcesConfig

log = logging.getLogger(__name__)
TRAINING = ("train_vae", "train_flow", "distil")
IN_THE_DRIVER = ("ingest", "evaluate", "predict_error")  # stages without workers or actors
FIRST_WORD = 10.0  # seconds until a job that waits says so
EVERY = 60.0


def request_problems(resources: ResourcesConfig, stages: Collection[str], have: Mapping[str, float]) -> list[str]:
    """Return the requests of a job that a cluster of these resources cannot meet.

    Args:
        stages: Names of the stages that are to run.
        have: As `ray.cluster_resources()`: the total, used or not.
    """
    units = [resources.workers.min] if any(s in TRAINING for s in stages) else []
    units += [resources.actors_min] if any(s not in (*TRAINING, *IN_THE_DRIVER) for s in stages) else []
    if not units:
        return []
    what = "training workers" if any(s in TRAINING for s in stages) and units[0] == max(units) else "actors"
    requests = {
        "GPU": ("GPUs", "gpus_per_worker", resources.gpus_per_worker),
        "CPU": ("CPUs", "cpus_per_worker", resources.cpus_per_worker),
    }
    problems = []
    for name, (text, setting, each) in requests.items():
        needed, there = max(units) * each, have.get(name, 0.0)
        if needed > there + 1e-6:
            problems.append(
                f"the job asks for {needed:g} {text} ({max(units)} {what} with resources.{setting}={each:g}) and there "
                f"are {math.floor(there * 100) / 100:g}"
            )
    return problems


@contextmanager
def speaks_while_waiting(
    resources: ResourcesConfig,
    stages: Collection[str],
    have: Callable[[], Mapping[str, float]],
    *,
    first: float = FIRST_WORD,
    every: float = EVERY,
) -> Iterator[None]:
    """Say in the log, after 10 s and then every minute, which requests a joined cluster cannot meet yet.

    A cluster that adds nodes on request may meet them later, so that this is no error.
    """
    ended = threading.Event()

    def watch() -> None:
        wait = first
        while not ended.wait(wait):
            wait = every
            try:
                problems = request_problems(resources, stages, have())
            except Exception as error:  # any: the cluster may be stopping, and the job reports that itself
                log.debug("the cluster does not say what it has: %s", error)
                return
            if not problems:
                return
            for problem in problems:
                log.warning(
                    "waiting: %s; it goes on when nodes with them join, or submit it to a cluster that has them",
                    problem,
                )

    thread = threading.Thread(target=watch, name="waiting for resources", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
