"""Runs the tiles of a small model side by side on a CPU, each on one thread.

The products of a small model's tile are too small for more than one thread each: the others spend their time waiting
for each other, and beside other busy processes a tile then takes four times as long. Several tiles at once use the
cores without that, and every number is that of one thread, whatever the machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import nn

Item = TypeVar("Item")
Result = TypeVar("Result")

SMALL = 30_000_000  # parameters; the products of larger networks are worth all threads of torch
AHEAD = 2  # tiles begun for each thread before the first one is taken


def each_tile(
    work: Callable[[Item], Result], tiles: Iterable[Item], networks: Iterable[nn.Module | None]
) -> Iterator[Result]:
    """Yield `work(tile)` for every tile, in order.

    Args:
        work: Sets its own inference mode, which belongs to a thread; must not change the networks.
        tiles: Consumed a few at a time.
        networks: What it computes with. Small ones on a CPU run as many tiles at once as torch has threads
            (`torch.set_num_threads`); others run a tile after the other with all threads.
    """
    parameters = [p for network in networks if network is not None for p in network.parameters()]
    small = all(p.device.type == "cpu" for p in parameters) and sum(p.numel() for p in parameters) <= SMALL
    if not small:
        yield from map(work, tiles)
        return
    with one_thread() as threads:
        left = iter(tiles)
        first = list(islice(left, 2))
        if threads == 1 or len(first) < 2:
            yield from map(work, chain(first, left))
        else:
            yield from _side_by_side(work, chain(first, left), threads)


@contextmanager
def one_thread() -> Iterator[int]:
    """Let torch compute on one thread; yields how many it had, and gives them back at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _side_by_side(work: Callable[[Any], Result], tiles: Iterator[Any], threads: int) -> Iterator[Result]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tile", initializer=torch.set_num_threads, initargs=(1,))
    try:
        running: deque[Future[Result]] = deque()
        for tile in tiles:
            running.append(pool.submit(work, tile))
            if len(running) >= AHEAD * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
