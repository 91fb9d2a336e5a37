"""Times calls on a device and reads its peak memory and its peak speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.training.throughput import peak_flops

MOST = 50  # calls of a measurement
SMALLEST = 3


@dataclass(frozen=True)
class Timed:
    seconds: float  # median of a call
    fastest: float
    slowest: float
    n: int
    peak_bytes: int | None  # of the allocator, None on a CPU


def timed(call: Callable[[], object], device: torch.device, *, seconds: float, warm: int = 2) -> Timed:
    """Time a call repeatedly, for about as many seconds as asked; calls before that warm the device up.

    Args:
        seconds: 0 times one call, for a rehearsal.
        warm: Calls before.
    """
    for _ in range(warm if seconds else 1):
        call()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    while len(times) < (SMALLEST if seconds else 1) or (sum(times) < seconds and len(times) < MOST):
        started = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Timed(statistics.median(times), min(times), max(times), len(times), peak)


def wait(device: torch.device) -> None:
    """Wait until a device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mfu_of(flops: float, seconds: float, device: torch.device, precision: str) -> float | None:
    """Return the share of the device's peak in a precision; None if the peak is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = peak_flops(name, precision)
    return None if peak is None else flops / (seconds * peak)


def free(device: torch.device) -> None:
    """Give cached memory back, so that the next model starts on an empty device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
