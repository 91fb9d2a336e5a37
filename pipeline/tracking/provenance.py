"""Describe the origin of a result for MLflow (tags, note, data sets): which code ran, and what its inputs came from."""

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

from pipeline.core.manifest import Manifest, read_manifest
from scldm.api.model_card import plain_line

IDS = "tracking.json"
Inputs = Mapping[str, Mapping[str, Any]]  # stage -> version, folder, tracking, facts, config; plain data
CONTEXTS = {
    "ingest": ("train", "validation", "test"),
    "train_vae": ("train", "validation"),
    "encode": ("train", "validation"),
    "train_flow": ("train", "validation"),
}  # the splits that a stage reads; evaluate reads the one in its settings


def inputs_of(manifests: Mapping[str, Manifest]) -> dict[str, dict[str, Any]]:
    """Return what the tags need of the inputs' manifests, as plain data."""
    return {
        stage: {
            "version": m.version, "folder": str(m.folder), "run_id": m.tracking.get("run_id"),
            "digest": m.facts.get("digest"), "census": m.facts.get("census_version"), "model": m.facts.get("model"),
        }
        for stage, m in manifests.items()
    }  # fmt: skip


def lineage(inputs: Inputs) -> dict[str, str]:
    """Return tags with versions and run ids of a stage's inputs, the digest of its data and of the VAE's weights.

    The ids are read from the input's folder: a quick stage may write its manifest before its run exists.
    """
    tags = {}
    for stage, given in inputs.items():
        tags[f"scldm.{stage}_version"] = str(given["version"])
        if run_id := read_ids(Path(given["folder"])).get("run_id") or given.get("run_id"):
            tags[f"scldm.{stage}_run_id"] = str(run_id)
    data, vae = inputs.get("ingest", {}), inputs.get("train_vae", {})
    if data.get("digest"):
        tags["scldm.data_digest"] = str(data["digest"])
    if data.get("census"):
        tags["scldm.census_version"] = str(data["census"])
    if "scldm.train_vae_run_id" in tags:
        tags["scldm.vae_run_id"] = tags["scldm.train_vae_run_id"]
    if vae.get("model"):
        with contextlib.suppress(OSError):
            weights = (Path(vae["folder"]) / vae["model"] / "model.safetensors").open("rb")
            with weights:
                tags["scldm.vae_ckpt_sha256"] = hashlib.file_digest(weights, "sha256").hexdigest()
    return tags


def settings_behind(inputs: Mapping[str, Manifest]) -> dict[str, Mapping[str, Any]]:
    """Return the settings of a stage's inputs and of theirs, by stage: they make runs of `evaluate` comparable."""
    found: dict[str, Mapping[str, Any]] = {}
    todo = list(inputs.values())
    while todo:
        manifest = todo.pop()
        if manifest.stage in found:
            continue
        found[manifest.stage] = manifest.config
        for stage, input_version in manifest.inputs.items():
            folder = Path(manifest.folder).parent.parent / stage / input_version
            if stage not in found and (parent := read_manifest(folder)) is not None:
                todo.append(parent)
    return found


def note(tags: Mapping[str, str], inputs: Inputs, *, experiment_id: str) -> str:
    """Return five lines of Markdown for the top of a run's page, with links to the runs of its inputs."""
    made_from = [
        f"[{stage}](#/experiments/{experiment_id}/runs/{tags[f'scldm.{stage}_run_id']})"
        if f"scldm.{stage}_run_id" in tags
        else f"{stage} `{given['version']}`"
        for stage, given in inputs.items()
    ]
    data = tags.get("scldm.data_digest", "")[:12]
    census = f", Census {plain_line(tags['scldm.census_version'])}" if "scldm.census_version" in tags else ""
    dirty = " and changes that are not committed" if tags.get("scldm.git_dirty") == "true" else ""
    lines = [
        f"**{tags['scldm.stage']}** `{tags['scldm.version']}` of [{tags.get('scldm.pipeline', 'a pipeline')}]"
        f"(#/experiments/{experiment_id}/runs/{tags.get('mlflow.parentRunId', '')})",
        f"Made from: {', '.join(made_from) or 'nothing before it'}",
        f"Data: {f'`{data}`{census}' if data else 'see the run of ingest'}",
        f"Code: {tags.get('scldm.code_version', '?')} `{tags.get('scldm.git_sha', 'no git')[:10]}`{dirty}",
        f"Output: `{plain_line(tags.get('scldm.output_uri', '?'))}`; its config.yaml is the whole job",
    ]
    return "\n\n".join(lines)


def datasets(stage: str, config: Mapping[str, Any], ingest: Manifest, name: str) -> list[dict[str, str]]:
    """Describe the data sets of a run for MLflow, without reading any.

    Args:
        config: Settings of the stage; `evaluate` names its split there.
        ingest: Manifest of ingest.
        name: Name of the pipeline.
    """
    facts = ingest.facts
    splits = CONTEXTS.get(stage, ()) if stage != "evaluate" else (str(config["split"]),)
    if not facts.get("digest"):
        return []
    source = {k: facts[k] for k in ("source", "soma_uri", "census_version", "value_filter") if facts.get(k)}
    columns = [{"name": str(x), "type": "string", "required": True} for x in facts.get("labels", ())]
    return [
        {
            "name": f"{name}/{split}",
            "digest": str(facts["digest"])[:16],
            "source_type": str(dict(ingest.config.get("source") or {}).get("type", "soma")),
            "source": json.dumps({**source, "split": split, "ingest": ingest.version}),
            "schema": json.dumps({"mlflow_colspec": columns}),
            "profile": json.dumps({"num_rows": n, "num_elements": n * int(facts.get("n_genes", 0))}),
            "context": split if stage != "evaluate" else "reference",
        }
        for split in splits
        if (n := int(dict(facts.get("n_cells", {})).get(split, 0)))
    ]


def code_versions() -> dict[str, str]:
    """Return tags that tell which code runs, and in which Ray job."""
    tags = {}
    for package in ("scldm", "ray", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            tags[f"scldm.{package}_version" if package != "scldm" else "scldm.code_version"] = version(package)
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


def read_ids(folder: Path) -> dict[str, Any]:
    """Return the ids of the MLflow runs that a stage's folder names; empty if it names none."""
    try:
        return json.loads((folder / IDS).read_text())
    except (OSError, ValueError):
        return {}
