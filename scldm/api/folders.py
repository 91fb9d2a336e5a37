"""Find the models that a name stands for: a model folder, a pair, a finished stage, a pipeline, or a place elsewhere.

    models/dentate/vae                        config.json of a VAE
    models/dentate                            vae/ and, perhaps, flow/ (`scldm convert`, `Model.save_pretrained`)
    runs/demo/train_flow/1a2b3c4d5e6f         a stage: its manifest names the versions that it was made from
    runs/demo/train_vae                       the newest version of a stage
    runs/demo                                 a pipeline: its newest flow, or its newest VAE
    models:/NAME@ALIAS, hf://ORG/NAME@REVISION, s3://BUCKET/FOLDER    fetched once into a cache, by the pipeline package

The VAE of a stage is the one whose version its manifest names; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from scldm.api.hub.download import fetch_from_hub, is_hub_name
from scldm.errors import CheckpointError

MANIFEST, CONFIG = "manifest.json", "config.json"
STAGE_FORMAT = 1  # of a stage's manifest and of what it describes; a manifest without one, as of 0.1, has this one
Weights = Literal["ema", "raw"]
FETCHERS = "scldm.models"  # entry points: functions from a name to a folder of this machine


@dataclass(frozen=True)
class ModelFolders:
    """The folders of a VAE and, optionally, a flow."""

    vae: Path
    flow: Path | None


def find_model(name: str | Path, kind: Literal["vae", "flow"], *, weights: Weights = "ema") -> Path:
    """Return the model folder of one kind that a name stands for, as in `find_models`.

    Raises:
        CheckpointError: No such model is there.
    """
    place = Path(name).expanduser()
    if (place / CONFIG).is_file():
        found = _json(place / CONFIG).get("kind")
        if found != kind:
            raise CheckpointError(f"{name} holds a {found}, expected a {kind}")
        return _whole(place, kind)
    models = find_models(name, weights=weights)
    folder = models.vae if kind == "vae" else models.flow
    if folder is None:
        raise CheckpointError(f"{name} has a VAE and no flow; name a train_flow, or a folder with vae/ and flow/")
    return _whole(folder, kind)


def is_remote(name: str | Path) -> bool:
    """Return whether a name is that of a model elsewhere."""
    text = str(name)
    return bool(re.match(r"^[a-z][a-z0-9]+:/", text) or (is_hub_name(text) and not Path(text).exists()))


def _fetched(name: str) -> Path:
    """Return a folder of this machine with the model of a name."""
    fetchers = list(entry_points(group=FETCHERS))
    if not fetchers and is_hub_name(name):
        return fetch_from_hub(name)
    if not fetchers:
        raise CheckpointError(
            f"{name} is not on this machine, and what fetches it is not installed (the pipeline extra)"
        )
    folder: Path = fetchers[0].load()(name)
    return folder


def _whole(folder: Path, kind: str) -> Path:
    if lacking := [n for n in (CONFIG, "vocabulary.json", "model.safetensors") if not (folder / n).is_file()]:
        raise CheckpointError(f"{folder} is no whole model of a {kind}: {', '.join(lacking)} is missing; copy it again")
    return folder


def find_models(folder: str | Path, *, weights: Weights = "ema") -> ModelFolders:
    """Return the models that a name stands for.

    Args:
        weights: Which weights of the flow are used. A VAE that was trained with the flow is taken with the same kind.

    Raises:
        CheckpointError: No model is there, or a required one is missing.
    """
    place = _fetched(str(folder)) if is_remote(folder) else Path(folder).expanduser()
    if not place.is_dir():
        hub = f", or hf://{folder} for the hub" if str(folder).count("/") == 1 and not place.parent.is_dir() else ""
        raise CheckpointError(
            f"{folder} is no folder (from {Path.cwd()}); name a model folder, a finished stage or a pipeline, for "
            f"example runs/demo{hub}"
        )
    if (place / CONFIG).is_file():
        return _of_model(place)
    if (place / "vae" / CONFIG).is_file():
        return ModelFolders(place / "vae", place / "flow" if (place / "flow" / CONFIG).is_file() else None)
    if (place / MANIFEST).is_file():
        return _of_stage(place, weights)
    return _of_pipeline(place, weights)


def _of_model(folder: Path) -> ModelFolders:
    kind = _json(folder / CONFIG).get("kind")
    if kind == "vae":
        return ModelFolders(folder, None)
    vae = folder.parent / "vae"
    if kind == "flow" and (vae / CONFIG).is_file():
        return ModelFolders(vae, folder)
    if kind == "flow":
        stage = folder.parent  # <pipeline>/train_flow/<version>/model
        if (stage / MANIFEST).is_file():
            return _of_stage(stage, "ema")
        raise CheckpointError(f"{folder} holds a flow, and there is no vae/ next to it: name the folder of both")
    raise CheckpointError(f"{folder / CONFIG} says kind {kind!r}; expected vae or flow")


def _of_stage(folder: Path, weights: Weights) -> ModelFolders:
    """Return the models of a finished stage: those that it trained or used."""
    manifest = _json(folder / MANIFEST)
    require_known_format(manifest, folder / MANIFEST)
    stage, facts, inputs = manifest.get("stage"), manifest.get("facts", {}), manifest.get("inputs", {})
    if stage == "train_vae":
        return ModelFolders(_inside(folder, facts["model"]), None)
    if stage == "train_flow":
        own = facts.get("vae")  # of a flow that was trained with its VAE
        vae = _inside(folder, own[weights]) if own else _stage_model(folder, "train_vae", inputs)
        return ModelFolders(vae, _inside(folder, facts["model"]))
    if stage == "distil":
        own = facts.get("vae")  # copied from a flow that the job named, or that was trained with its VAE
        if own is None and "train_vae" not in inputs:
            raise CheckpointError(
                f"{folder} was distilled from a flow that the job named without a VAE; name both: "
                f"scldm.load(vae_folder, flow={str(_inside(folder, facts['model']))!r})"
            )
        vae = _inside(folder, own[weights]) if own else _stage_model(folder, "train_vae", inputs)
        return ModelFolders(vae, _inside(folder, facts["model"]))
    for made_by in ("distil", "train_flow"):
        if made_by in inputs:
            return _of_stage(_stage_folder(folder, made_by, inputs), weights)
    if "train_vae" in inputs:
        return ModelFolders(_stage_model(folder, "train_vae", inputs), None)
    raise CheckpointError(
        f"{folder} is a stage {stage}, which has no model; name train_vae, train_flow or the pipeline"
    )


def _of_pipeline(folder: Path, weights: Weights) -> ModelFolders:
    """Return the models of a pipeline, or of the newest version of a stage."""
    for pattern in ("train_flow/*", "distil/*", "train_vae/*", "*"):
        finished = [(_json(p).get("finished_at", 0.0), p.parent) for p in folder.glob(f"{pattern}/{MANIFEST}")]
        if finished:
            return _of_stage(max(finished)[1], weights)
    holds = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    raise CheckpointError(
        f"{folder} has no config.json and no vae/, and no finished train_vae or train_flow (it holds {holds}); name a "
        "model folder, a folder with vae/ and flow/, a finished stage, or a pipeline (runs/demo)"
    )


def require_known_format(manifest: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if a newer version of scldm wrote a stage's manifest."""
    found = manifest.get("format", STAGE_FORMAT)
    if not isinstance(found, int) or found > STAGE_FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer version of scldm (format {found}, this version reads {STAGE_FORMAT}); "
            "upgrade scldm, or take another output folder"
        )


def _stage_folder(folder: Path, stage: str, inputs: Any) -> Path:
    version = inputs.get(stage)
    found = folder.parent.parent / stage / str(version)
    if version is None or not (found / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} was made with {stage} {version}, and {found} is not there; name the folders: "
            "scldm.load(vae_folder, flow=flow_folder)"
        )
    return found


def _stage_model(folder: Path, stage: str, inputs: Any) -> Path:
    found = _stage_folder(folder, stage, inputs)
    return _inside(found, _json(found / MANIFEST)["facts"]["model"])


def _inside(folder: Path, name: str) -> Path:
    """Return a folder that a manifest names; refuse one outside, which an untrusted manifest could name."""
    found = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{folder / MANIFEST} names {name!r}, which is outside the folder; it is not ours")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a dictionary; it holds a {type(found).__name__}")
    return found
