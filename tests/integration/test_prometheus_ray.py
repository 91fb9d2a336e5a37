"""Metrics of a stage reach the metrics port of a Ray node, under the names that the Grafana board draws."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline.core.prometheus import PrometheusGauges

pytestmark = [pytest.mark.integration]


def test_a_gauge_that_a_worker_sets_is_served_to_prometheus_with_its_run(ray_cluster):
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self):
            self.gauges = PrometheusGauges(Path("/runs/demo/train_vae/1a2b3c"))

        def report(self, loss: float) -> None:
            self.gauges.set({"train/loss": loss, "val/loss": float("nan")})

    worker = Worker.remote()
    ray.get(worker.report.remote(12.5))
    lines = served("ray_scldm_train_loss{", ray.nodes()[0])
    assert len(lines) == 1
    assert lines[0].endswith(" 12.5")
    for tag in ('Pipeline="demo"', 'Stage="train_vae"', 'StageVersion="1a2b3c"'):
        assert tag in lines[0]
    assert "scldm_val_loss" not in page(ray.nodes()[0]), "what is not a number is left out"


def test_setting_a_gauge_does_not_load_ray():
    program = (
        "import sys; from pathlib import Path; from pipeline.core.prometheus import PrometheusGauges; "
        "g = PrometheusGauges(Path('/runs/demo/train_vae/1')); g.set({'train/loss': 1.0}); "
        "print(g._gauges, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["{}", "False"]


def page(node: dict) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
        return answer.read().decode()


def served(start: str, node: dict) -> list[str]:
    """Return the lines with a prefix; a worker's gauges arrive every ten seconds."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if lines := [line for line in page(node).splitlines() if line.startswith(start)]:
            return lines
        time.sleep(1)
    raise AssertionError(f"no line starts with {start}")
