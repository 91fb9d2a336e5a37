"""Locates and loads the models of a job on real cells: folders that it names, or what this pipeline trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.apply import PerturbConfig, RealCellsConfig
from pipeline.config.context import StageContext
from scldm.data.vocabulary import UnknownNameError, Vocabulary
from scldm.errors import InputError

if TYPE_CHECKING:
    import torch

    from scldm.checkpoints.native import LoadedFlow, LoadedVAE


@dataclass(frozen=True)
class ModelPaths:
    """Absolute model folders."""

    vae: str
    flow: str | None = None


def locate_models(config: RealCellsConfig, context: StageContext) -> ModelPaths:
    """Return the model folders of a job."""
    if config.model is not None:
        flow = config.model.flow
        return ModelPaths(_absolute(config.model.vae), None if flow is None else _absolute(flow))
    vae = context.inputs["train_vae"].path("model")
    if not config.uses_flow:
        return ModelPaths(str(vae.resolve()))
    flow_stage = context.inputs["train_flow"]
    own = flow_stage.facts.get("vae")  # of a flow that was trained together with its VAE
    if own is not None:
        vae = Path(flow_stage.folder) / own[config.flow.weights]  # type: ignore[attr-defined]
    return ModelPaths(str(vae.resolve()), str(flow_stage.path("model").resolve()))


def model_problems(config: RealCellsConfig) -> list[str]:
    """Return problems with the model folders that a job names, found from their small files."""
    problems = []
    named = {} if config.model is None else {"vae": config.model.vae, "flow": config.model.flow}
    for kind, place in named.items():
        if place is None:
            continue
        folder = Path(place).expanduser()
        try:
            found = json.loads((folder / "config.json").read_text()).get("kind")
        except (OSError, ValueError, AttributeError):
            problems.append(f"model.{kind}: {place} is no model folder (no config.json that can be read); it is what "
                            "training leaves in model/, or what `scldm convert` writes")  # fmt: skip
            continue
        if found != kind:
            problems.append(f"model.{kind}: {place} holds a {found}, expected a {kind}")
        elif not (folder / "model.safetensors").is_file() or not (folder / "vocabulary.json").is_file():
            problems.append(f"model.{kind}: {place} is not whole: model.safetensors or vocabulary.json is missing")
        elif kind == "vae" and isinstance(config, PerturbConfig):
            problems += _target_problems(config, Vocabulary.load(folder / "vocabulary.json"))
    return problems


def load_models(
    models: ModelPaths, device: torch.device, *, weights: str = "ema"
) -> tuple[LoadedVAE, LoadedFlow | None]:
    """Load the VAE, and the flow if there is one, to the device.

    Raises:
        InputError: the models do not belong together, or cannot do what the job needs.
    """
    from scldm.checkpoints.native import CheckpointError, load_flow, load_vae

    try:
        vae = load_vae(Path(models.vae), device=device)
        flow = None if models.flow is None else load_flow(Path(models.flow), weights=weights, device=device)
    except CheckpointError as error:
        raise InputError(f"model: {error}") from error
    problems = []
    if vae.vae.config.adaln:
        problems.append("model.vae has an adaLN decoder, which needs a condition, and this job has none")
    if flow is not None:
        own = (vae.vae.config.n_latent_tokens, vae.vae.config.latent_width)
        if own != (flow.n_latent_tokens, flow.latent_width):
            problems.append(f"the VAE's latents are {own}, the flow's {(flow.n_latent_tokens, flow.latent_width)}")
        if vae.vocabulary.digest != flow.vocabulary.digest:
            problems.append("the VAE and the flow were trained with different vocabularies")
    if problems:
        raise InputError("\n".join(problems))
    return vae, flow


def latent_width(folder: str) -> int:
    """Return m * e of the VAE in a model folder."""
    config = json.loads((Path(folder) / "config.json").read_text())["config"]
    return int(config["n_latent_tokens"]) * int(config["latent_width"])


def draws_counts(folder: str | Path) -> bool:
    """Return whether the VAE in a model folder draws counts; a Gaussian head draws log1p CP10k values."""
    config = json.loads((Path(folder) / "config.json").read_text())["config"]
    return bool(config.get("head") != "gaussian")


def check_likelihood(folder: str) -> None:
    """Raise InputError if counts have no likelihood under the VAE in a model folder."""
    if not draws_counts(folder):
        raise InputError(
            f"{folder} has a gaussian head: it models log1p CP10k values, and counts have no likelihood under it; "
            "log_likelihood needs a VAE with head nb_shared or nb_cell"
        )


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().resolve())


def check_target(config: PerturbConfig, vocabulary: Vocabulary) -> None:
    """Raise InputError unless the model knows the requested labels and classes."""
    if problems := _target_problems(config, vocabulary):
        raise InputError("\n".join(problems))


def _target_problems(config: PerturbConfig, vocabulary: Vocabulary) -> list[str]:
    problems = []
    for name, value in config.to.items():
        try:
            vocabulary.label(name).encode([value])
        except UnknownNameError as error:
            problems.append(f"to.{name}: {error}")
    if isinstance(config.guidance, dict):
        known = {x.name for x in vocabulary.labels}
        problems += [f"guidance.{k}: the model knows no such label" for k in sorted(set(config.guidance) - known)]
        problems += [f"guidance has no scale for the label {k}" for k in sorted(known - set(config.guidance))]
    return problems
