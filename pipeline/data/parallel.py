"""Maps a function over parts of the data in order: as Ray tasks if a cluster is up, else in this process.

For passes whose results are small compared with what they read (statistics, shards of the cache). Results arrive in the
order of the parts, so that nothing depends on timing.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")

TASKS_PER_CPU = 2  # in flight: one runs, one waits
RETRIES = 3  # of a task whose worker died; an exception of the task is raised


def cluster_is_up() -> bool:
    """Whether this process is connected to a Ray cluster; never starts one or imports Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def each_in_order(
    function: Callable[[Any, Part], Result], shared: Any, parts: Iterable[Part], *, parallel: bool
) -> Iterator[Result]:
    """Yield `function(shared, part)` for every part.

    Args:
        function: Importable by name on every node; uses paths that every node sees.
        shared: First argument of every call; sent once.
        parts: Consumed lazily: at most a few more than are in flight.
        parallel: Whether to run over Ray, which must be up. False runs one call at a time in this process.
    """
    if not parallel:
        for part in parts:
            yield function(shared, part)
        return
    import ray

    task = ray.remote(num_cpus=1, max_retries=RETRIES)(function)
    sent = ray.put(shared)
    most = max(2, int(ray.cluster_resources().get("CPU", 1)) * TASKS_PER_CPU)
    running: deque[Any] = deque()
    try:
        for part in parts:
            running.append(task.remote(sent, part))
            if len(running) >= most:
                yield ray.get(running.popleft())
        while running:
            yield ray.get(running.popleft())
    finally:
        for task_left in running:
            ray.cancel(task_left)
