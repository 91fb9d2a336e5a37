"""Export the metrics of a running stage to Prometheus, through the exporter that every Ray node runs anyway.

`train/loss` of run demo becomes `ray_scldm_train_loss{Pipeline="demo", Stage="train_vae", StageVersion="1a2b3c4d5e6f"}`
on the metrics port of the node whose process sets it. Outside Ray (under torchrun, in tests of a loop) nothing is
exported. `cluster/grafana/scldm.json` draws the metrics.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
TAGS = ("Pipeline", "Stage", "StageVersion")  # Ray uses the name Version itself


class PrometheusGauges:
    """The gauges of one stage version, created when they are first set.

    Args:
        folder: The stage's folder, `<pipeline>/<stage>/<version>`.
    """

    def __init__(self, folder: Path):
        folder = folder.absolute()
        values = (folder.parent.parent.name, folder.parent.name, folder.name)
        self.tags = dict(zip(TAGS, values, strict=True))
        self._gauges: dict[str, Any] = {}
        self._broken = False

    def set(self, values: Mapping[str, float]) -> None:
        """Set gauges to finite values. A failure is logged and never raised: monitoring must not stop a run."""
        ray = sys.modules.get("ray")  # a process under Ray has it loaded; no other should load it for this
        if self._broken or ray is None or not ray.is_initialized():
            return
        try:
            for key, value in values.items():
                if math.isfinite(value):
                    self._gauge(key).set(float(value), tags=self.tags)
        except Exception as error:
            self._broken = True
            log.warning("metrics of %s are not exported to Prometheus: %s", "/".join(self.tags.values()), error)

    def _gauge(self, key: str) -> Any:
        if key not in self._gauges:
            from ray.util.metrics import Gauge

            self._gauges[key] = Gauge(gauge_name(key), description=f"{key} of a stage of scLDM", tag_keys=TAGS)
        return self._gauges[key]


def gauge_name(key: str) -> str:
    """Return a name in Prometheus' alphabet, without Ray's own prefix: `perf/step_s` becomes `scldm_perf_step_s`."""
    return "scldm_" + re.sub(r"[^a-zA-Z0-9_]", "_", key)
