"""Describe the origin of a result for MLflow: what its inputs came from, its data sets, and the note on its page."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.manifest import Manifest, read_manifest
from scldm.errors import InputError
from scldm.text import plain_line

IDS = "tracking.json"
MAX_FILES = 20  # that are listed with a data set
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


def settings_behind(inputs: Mapping[str, Manifest]) -> dict[str, Mapping[str, Any]]:
    """Return the settings of a stage's inputs and of theirs, by stage: they make runs of `evaluate` comparable.

    Inputs whose manifest cannot be read are left out.
    """
    found: dict[str, Mapping[str, Any]] = {}
    todo = list(inputs.values())
    while todo:
        manifest = todo.pop()
        if manifest.stage in found:
            continue
        found[manifest.stage] = manifest.config
        for stage, input_version in manifest.inputs.items():
            folder = Path(manifest.folder).parent.parent / stage / input_version
            if stage not in found:
                with contextlib.suppress(OSError, InputError):
                    parent = read_manifest(folder)
                    todo += [] if parent is None else [parent]
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
    if replay := facts.get("replay"):
        source["replay"] = {k: replay[k] for k in ("source", "n_cells", "share", "seed")}
    columns = [{"name": str(x), "type": "string", "required": True} for x in facts.get("labels", ())]
    return [
        {
            "name": f"{name}/{split}",
            "digest": str(facts["digest"])[:16],
            "source_type": str(dict(ingest.config.get("source") or {}).get("type", "soma")),
            "source": json.dumps({**source, "split": split, "ingest": ingest.version, **_files(ingest)}),
            "schema": json.dumps({"mlflow_colspec": columns}),
            "profile": json.dumps({"num_rows": n, "num_elements": n * int(facts.get("n_genes", 0))}),
            "context": split if stage != "evaluate" else "reference",
        }
        for split in splits
        if (n := int(dict(facts.get("n_cells", {})).get(split, 0)))
    ]


def _files(ingest: Manifest) -> dict[str, Any]:
    """Return the files that the cells came from, with the digest of each; of many, their number and one digest."""
    files = ingest.contents.get("source", {})
    if len(files) <= MAX_FILES:
        return {"files": dict(files)} if files else {}
    together = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
    return {"files": len(files), "files_digest": together}


def read_ids(folder: Path) -> dict[str, Any]:
    """Return the ids of the MLflow runs that a stage's folder names; empty if it names none."""
    try:
        return json.loads((folder / IDS).read_text())
    except (OSError, ValueError):
        return {}
