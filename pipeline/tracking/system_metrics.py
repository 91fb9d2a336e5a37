"""What a machine does while it trains: CPU, memory, network, GPUs, under the names that MLflow's own page reads.

MLflow's monitor sends by itself and waits for the server; this one hands its numbers to the spooled tracker. One
process of each machine takes them, that of local rank 0; machines but the first carry their number in the name.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.tracking.tracker import NullTracker, StageTracker

INTERVAL = 15.0  # seconds
MB = 1e6


@contextmanager
def node_metrics(
    spec: Mapping[str, Any], tracker: NullTracker, *, rank: int, interval: float = INTERVAL
) -> Iterator[None]:
    """Sample this machine in the background, if this process is the one that does.

    Args:
        spec: Of the stage's tracker; empty where nothing is tracked.
        tracker: The one of rank 0, which is used on its machine.
    """
    if not spec or int(os.environ.get("LOCAL_RANK", rank)) != 0:
        yield
        return
    node = int(os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", 0)))
    own = tracker if rank == 0 else StageTracker.attach(spec, who=f"node-{node}")
    ended = threading.Event()
    thread = threading.Thread(
        target=_sample_until, args=(ended, own, "" if rank == 0 else f"node-{node}/", interval),
        name="system metrics", daemon=True,
    )  # fmt: skip
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2.0)
        if own is not tracker:
            own.close()


def _sample_until(ended: threading.Event, tracker: NullTracker, prefix: str, interval: float) -> None:
    machine = Machine()
    while not ended.wait(interval):
        tracker.system({f"system/{prefix}{name}": value for name, value in machine.sample().items()})


class Machine:
    """Counters of this machine, sampled as often as you like."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self._process = psutil.Process()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first answer is of no interval
        self._gpus = list(_gpus())

    def sample(self) -> dict[str, float]:
        """Name -> value since the last sample (rates) or now (sizes)."""
        memory, network = self._psutil.virtual_memory(), self._psutil.net_io_counters()
        found = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_usage_megabytes": self._process.memory_info().rss / MB,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / MB,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / MB,
        }
        self._network = network
        for i, handle in enumerate(self._gpus):
            with contextlib.suppress(Exception):  # a driver that does not know a counter
                found |= {f"gpu_{i}_{k}": v for k, v in _gpu_sample(handle).items()}
        return found


def _gpus() -> Iterator[Any]:
    """Handles of NVIDIA's library; none without it or without a GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
        for i in range(pynvml.nvmlDeviceGetCount()):
            yield pynvml.nvmlDeviceGetHandleByIndex(i)
    except Exception:
        return


def _gpu_sample(handle: Any) -> dict[str, float]:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "memory_usage_megabytes": memory.used / MB,
        "memory_usage_percentage": 100.0 * memory.used / memory.total,
        "utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000.0,
    }
