"""Build the MLflow tags that describe a run: a new one is added here.

`pipeline_tags` are set on every run of a pipeline, `stage_tags` and `lineage_tags` on the run of a stage when it is
created, and `data_tags` also when the stage has finished. Tags that tell what happened to a run are set where it does:
scldm.attempt (`mlflow_runs.runs`), scldm.changed_params (`mlflow_runs.delivery`), scldm.skipped_metrics (`tracker`),
scldm.world_size and scldm.resumed_from_step (`pipeline.training`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.core.files import file_digest
from pipeline.tracking.provenance import Inputs, read_ids
from scldm.errors import DISTRIBUTION


def pipeline_tags(key: str, source: str) -> dict[str, str]:
    """Return the tags of every run of a pipeline.

    Args:
        key: Identifies the pipeline in its folder.
        source: Job file and settings of the command line.
    """
    return {"scldm.pipeline": key, "mlflow.source.name": source, **code_tags()}


def parent_tags(name: str) -> dict[str, str]:
    """Return the tags of a pipeline's own run, besides `pipeline_tags`."""
    return {"mlflow.runName": name, "scldm.stage": "pipeline"}


def stage_tags(
    stage: str, stage_version: str, *, pipeline: str, seed: int, config: Mapping[str, Any], folder: Path
) -> dict[str, str]:
    """Return the tags of a stage's run that are known before the server is contacted.

    Args:
        pipeline: Name of the pipeline.
        config: Settings of the stage.
        folder: Where its output is.
    """
    return {
        "mlflow.runName": f"{stage}-{pipeline}-{stage_version[:8]}-s{seed}",
        "scldm.stage": stage,
        "scldm.version": stage_version,
        "scldm.seed": str(seed),
        "scldm.config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12],
        "scldm.output_uri": str(folder),
    }


def lineage_tags(inputs: Inputs) -> dict[str, str]:
    """Return tags with versions and run ids of a stage's inputs, the digest of its data and of the VAE's weights.

    The ids are read from the input's folder: a quick stage may write its manifest before its run exists.
    """
    tags = {}
    for stage, given in inputs.items():
        tags[f"scldm.{stage}_version"] = str(given["version"])
        if run_id := read_ids(Path(given["folder"])).get("run_id") or given.get("run_id"):
            tags[f"scldm.{stage}_run_id"] = str(run_id)
    data, vae = inputs.get("ingest", {}), inputs.get("train_vae", {})
    tags |= data_tags({"digest": data.get("digest"), "census_version": data.get("census")})
    if "scldm.train_vae_run_id" in tags:
        tags["scldm.vae_run_id"] = tags["scldm.train_vae_run_id"]
    if vae.get("model"):
        with contextlib.suppress(OSError):
            tags["scldm.vae_ckpt_sha256"] = file_digest(Path(vae["folder"]) / vae["model"] / "model.safetensors")
    return tags


def data_tags(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return tags that identify the data, from the facts of ingest; empty for facts of another stage."""
    tags = {"scldm.data_digest": facts.get("digest"), "scldm.census_version": facts.get("census_version")}
    return {key: str(value) for key, value in tags.items() if value}


def code_tags() -> dict[str, str]:
    """Return tags that tell which code runs, and in which Ray job. Waits for git, at most 10 s."""
    tags = {}
    for tag, package in (("code_version", DISTRIBUTION), ("ray_version", "ray"), ("torch_version", "torch")):
        with contextlib.suppress(PackageNotFoundError):
            tags[f"scldm.{tag}"] = version(package)
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=5)
        if sha.returncode == 0:
            tags |= {"scldm.git_sha": sha.stdout.strip(), "scldm.git_dirty": str(bool(dirty.stdout.strip())).lower()}
    with contextlib.suppress(ValueError, AttributeError):
        job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
        if job.get("job_submission_id"):
            tags["scldm.ray_submission_id"] = str(job["job_submission_id"])
    return tags
