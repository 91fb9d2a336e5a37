"""The Grafana board: a JSON that Grafana can load, which draws numbers that are there."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "cluster" / "grafana"
BOARD = json.loads((FOLDER / "scldm.json").read_text())
EXPRESSIONS = [t["expr"] for p in BOARD["panels"] for t in p["targets"]]


def drawn(prefix: str) -> set[str]:
    return {name for e in EXPRESSIONS for name in re.findall(rf"\b{prefix}[a-z_]*", e)}


def test_every_number_of_rays_own_is_one_that_its_reporter_exports():
    ray = Path(importlib.util.find_spec("ray").origin).parent  # read, not imported: this takes seconds
    reporter = (ray / "dashboard" / "modules" / "reporter" / "reporter_agent.py").read_text()
    exported = {f"ray_{name}" for name in re.findall(r'"((?:node|cluster)_[a-z_]+)": Gauge', reporter)}
    mine = drawn("ray_node_") | drawn("ray_cluster_")
    assert mine
    assert mine <= exported


def test_panels_have_numbers_places_and_titles_of_their_own():
    assert len({p["id"] for p in BOARD["panels"]}) == len(BOARD["panels"])
    assert len({p["title"] for p in BOARD["panels"]}) == len(BOARD["panels"])
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in BOARD["panels"]}) == len(BOARD["panels"])


def test_prometheus_looks_where_ray_writes_its_nodes():
    scrape = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    assert scrape[0]["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
