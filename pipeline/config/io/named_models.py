"""Settings that name a model instead of describing one: written in full before a job is validated.

model: runs/census                    of a job on trained models: {vae: runs/census, flow: runs/census}
start_from: runs/census               {model: runs/census}; sizes that are not set are those of the model
train_vae: {model: runs/census, train: false}
                                      {pretrained: runs/census}; and ingest takes the genes of the model
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pipeline.config.io.yaml import KeyPath, dotted
from pipeline.config.paths.expand import expand_path
from pipeline.config.paths.working_folder import beside_outputs
from scldm.api.folders import find_model
from scldm.errors import InputError
from scldm.nn.config import DiTConfig, VAEConfig

Place = Callable[[KeyPath], str]
Kind = Literal["vae", "flow"]
NAMES = (
    "model",
    "vae",
    "flow",
    "pretrained",
    "start_from",
    "vocabulary",
    "pipeline",
    "of",
)  # settings that may name a model
WITH_FLOW = ("generate", "perturb")  # kinds of job that use a flow; log_likelihood does if `flow` is given


def write_out_named_models(data: dict[str, Any], place: Place) -> None:
    """Write settings that name a model in full, in place.

    Args:
        data: The job as plain data.
        place: path -> where it was written, `file:line`.

    Raises:
        InputError: There is no such model, or its sizes are set to other values.
    """
    kind = data.get("kind")
    _find_beside_outputs(data)
    sections: dict[str, tuple[KeyPath, Any]] = {
        stage: ((stage,), data.get(stage)) if kind == "pipeline" else ((), data if kind == stage else None)
        for stage in ("train_vae", "train_flow")
    }
    for stage, network in (("train_vae", "vae"), ("train_flow", "flow")):
        path, section = sections[stage]
        if isinstance(section, dict):
            if stage == "train_vae":
                _use_as_it_is(section, path, place)
                _take_genes(data, section)
            _take_sizes(section, path, place, network)  # type: ignore[arg-type]
    if (
        isinstance(kind, str)
        and kind not in ("train_vae", "distil", "pipeline")
        and isinstance(name := data.get("model"), str)
    ):
        uses_flow = kind in WITH_FLOW or (kind == "log_likelihood" and data.get("flow") is not None)
        data["model"] = {"vae": name, "flow": name if uses_flow else None}


def _find_beside_outputs(data: dict[str, Any]) -> None:
    """Make relative names of models absolute where only the working folder has them, see `beside_outputs`."""
    for key, value in data.items():
        if isinstance(value, dict):
            _find_beside_outputs(value)
        elif key in NAMES and isinstance(value, str):
            data[key] = beside_outputs(value)


def _use_as_it_is(section: dict[str, Any], path: KeyPath, place: Place) -> None:
    """Read `model: NAME, train: false`."""
    name, model = section.get("model"), (*path, "model")
    if section.get("train") is False:
        if not isinstance(name, str):
            raise InputError(
                f"{place((*path, 'train'))}: {dotted((*path, 'train'))}: false uses a trained model as it is: name it, "
                f"{dotted(model)}: runs/census"
            )
        del section["train"], section["model"]
        section["pretrained"] = name
    elif isinstance(name, str):
        raise InputError(
            f"{place(model)}: {dotted(model)}: {name} names a trained model; to use it as it is, set "
            f"{dotted((*path, 'train'))}: false as well; to train on from its weights, set "
            f"{dotted((*path, 'start_from'))}: {name} instead"
        )


def _take_genes(data: dict[str, Any], section: Mapping[str, Any]) -> None:
    """Let ingest take the genes of a VAE that is used as it is, unless its genes are set."""
    name, ingest = section.get("pretrained"), data.get("ingest")
    if isinstance(name, str) and isinstance(ingest, dict):
        genes = ingest["genes"] = ingest.get("genes") or {}
        if isinstance(genes, dict):
            genes.setdefault("vocabulary", name)


def _take_sizes(section: dict[str, Any], path: KeyPath, place: Place, kind: Kind) -> None:
    """Fill the settings of a network, and of a flow's path, that are not set with those of the model it starts from."""
    start = section.get("start_from")
    if isinstance(start, str):
        start = section["start_from"] = {"model": start}
    pretrained = section.get("pretrained")
    setting = "start_from" if start is not None else "pretrained"
    name = start.get("model") if isinstance(start, dict) else pretrained
    given = section.get("model") or {}
    if not isinstance(name, str) or not isinstance(given, dict) or _is_complete(given, kind):
        return
    try:
        about = json.loads((find_model(expand_path(name), kind) / "config.json").read_text())
    except ValueError as error:  # a CheckpointError is one too
        raise InputError(f"{place((*path, setting))}: {dotted((*path, setting))}: {error}") from error
    own = about["config"]
    if setting == "pretrained" and (other := [k for k, v in given.items() if own.get(k) != v]):
        wrong = (*path, "model", other[0])
        raise InputError(f"{place(wrong)}: {dotted(wrong)} is that of {name} and cannot be set; leave it out")
    section["model"] = {**own, **given}
    if kind == "flow":
        section.setdefault("flow", about["path"])


def _is_complete(given: Mapping[str, Any], kind: Kind) -> bool:
    """Return whether all sizes are written out already, as in the record of a run: its model may be gone."""
    config = VAEConfig if kind == "vae" else DiTConfig
    return set(config.model_fields) - {"decoder"} <= set(given)
