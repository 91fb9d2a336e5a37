"""Locates and loads the models of a job on real cells: folders that it names, or what this pipeline trained."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config.apply import ModelNames, PerturbConfig, RealCellsConfig
from pipeline.config.context import StageContext
from scldm.api.folders import Weights, find_model, is_remote
from scldm.data.vocabulary import UnknownNameError, Vocabulary
from scldm.errors import InputError
from scldm.generation.pair import pair_problems

if TYPE_CHECKING:
    import torch

    from scldm.checkpoints.native import LoadedFlow, LoadedVAE
    from scldm.nn.config import VAEConfig

SHARED_MODELS = ".models"  # in the output folder


@dataclass(frozen=True)
class ModelPaths:
    """Absolute model folders."""

    vae: str
    flow: str | None = None


def locate_models(config: RealCellsConfig, context: StageContext) -> ModelPaths:
    """Return the model folders of a job."""
    if config.model is not None:
        weights: Weights = config.flow.weights if config.uses_flow else "ema"  # type: ignore[attr-defined]
        return named_models(config.model, output=context.output, weights=weights)
    vae = context.inputs["train_vae"].path("model")
    if not config.uses_flow:
        return ModelPaths(str(vae.resolve()))
    flow_stage = context.inputs["train_flow"]
    own = flow_stage.facts.get("vae")  # of a flow that was trained together with its VAE
    if own is not None:
        vae = Path(flow_stage.folder) / own[config.flow.weights]  # type: ignore[attr-defined]
    return ModelPaths(str(vae.resolve()), str(flow_stage.path("model").resolve()))


def named_models(model: ModelNames, *, output: Path | None = None, weights: Weights = "ema") -> ModelPaths:
    """Return the model folders that a job names.

    Args:
        output: As for `model_on_every_node`.

    Raises:
        InputError: No such model is there.
    """
    vae = model_on_every_node(model.vae, "vae", output, weights=weights)
    flow = None if model.flow is None else model_on_every_node(model.flow, "flow", output, weights=weights)
    return ModelPaths(str(vae), None if flow is None else str(flow))


def model_on_every_node(
    name: str, kind: Literal["vae", "flow"], output: Path | None, *, weights: Weights = "ema"
) -> Path:
    """Return the absolute folder of a model that a job names, where workers can read it.

    A model that was fetched from elsewhere is copied once from this machine's cache to the output folder, which every
    node sees, under its digest.

    Args:
        output: Root folder of outputs; None: only this process reads the model.
    """
    folder = find_model(name, kind, weights=weights).resolve()
    if output is None or not is_remote(name):
        return folder
    from scldm.checkpoints.native import folder_digest

    shared = output / SHARED_MODELS / folder_digest(folder)[:24]
    if not shared.is_dir():
        staging = shared.with_name(f".{shared.name}.{uuid.uuid4().hex[:8]}")
        shutil.copytree(folder, staging)
        try:
            staging.rename(shared)
        except OSError:  # another job was sooner
            shutil.rmtree(staging, ignore_errors=True)
            if not shared.is_dir():
                raise
    return shared.resolve()


def model_problems(config: RealCellsConfig) -> list[str]:
    """Return problems with the models that a job names, found from their small files."""
    problems = []
    named = {} if config.model is None else {"vae": config.model.vae, "flow": config.model.flow}
    for kind, place in named.items():
        if place is None:
            continue
        try:
            folder = find_model(place, kind)  # type: ignore[arg-type]
        except InputError as error:
            problems.append(f"model.{kind}: {error}")
            continue
        if kind == "vae" and isinstance(config, PerturbConfig):
            problems += _target_problems(config, Vocabulary.load(folder / "vocabulary.json"))
    return problems


def load_models(
    models: ModelPaths, device: torch.device, *, weights: str = "ema", decodes: bool = True
) -> tuple[LoadedVAE, LoadedFlow | None]:
    """Load the VAE, and the flow if there is one, to the device.

    Args:
        decodes: Whether the job decodes cells, which an adaLN decoder does under condition vectors only.

    Raises:
        InputError: the models do not belong together, or cannot do what the job needs.
    """
    from scldm.checkpoints.native import load_flow, load_vae
    from scldm.errors import CheckpointError

    try:
        vae = load_vae(Path(models.vae), device=device)
        flow = None if models.flow is None else load_flow(Path(models.flow), weights=weights, device=device)
    except CheckpointError as error:
        raise InputError(f"model: {error}") from error
    problems = []
    if decodes and vae.vae.config.adaln:
        problems.append(_adaln_problem(vae.vae.config))
    if flow is not None:
        problems += _pair_problems(Path(models.vae), Path(str(models.flow)))
    if problems:
        raise InputError("\n".join(problems))
    return vae, flow


def check_folders(models: ModelPaths) -> None:
    """Check that a VAE and a flow belong together, by their small files.

    Raises:
        InputError: Their latents or vocabularies differ.
    """
    assert models.flow is not None
    if problems := _pair_problems(Path(models.vae), Path(models.flow)):
        raise InputError("\n".join(problems))


def _adaln_problem(config: VAEConfig) -> str:
    from scldm.generation.decoder_condition import DecoderConditionError, refuse_adaln

    try:
        refuse_adaln(config, "this job")
    except DecoderConditionError as error:
        return f"model.vae: {error}"
    raise AssertionError("only of an adaLN decoder")


def vae_config(folder: str | Path) -> VAEConfig:
    """Return the settings of the VAE in a model folder."""
    from scldm.nn.config import VAEConfig

    return VAEConfig.model_validate(_config(folder))


def _pair_problems(vae: Path, flow: Path) -> list[str]:
    tokens, width = json.loads((flow / "config.json").read_text())["latent_shape"]
    return pair_problems(
        vae_latents=latent_shape(vae),
        flow_latents=(int(tokens), int(width)),
        vae=Vocabulary.load(vae / "vocabulary.json"),
        flow=Vocabulary.load(flow / "vocabulary.json"),
    )


def latent_shape(folder: str | Path) -> tuple[int, int]:
    """Return (m, e) of the VAE in a model folder."""
    config = _config(folder)
    return int(config["n_latent_tokens"]), int(config["latent_width"])


def latent_width(folder: str) -> int:
    """Return m * e of the VAE in a model folder."""
    tokens, width = latent_shape(folder)
    return tokens * width


def _config(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())["config"]
    return found


def draws_counts(folder: str | Path) -> bool:
    """Return whether the VAE in a model folder draws counts; a Gaussian head draws log1p CP10k values."""
    return bool(_config(folder).get("head") != "gaussian")


def check_likelihood(folder: str) -> None:
    """Raise InputError if counts have no likelihood under the VAE in a model folder."""
    if not draws_counts(folder):
        raise InputError(
            f"{folder} has a gaussian head: it models log1p CP10k values, and counts have no likelihood under it; "
            "log_likelihood needs a VAE with head nb_shared or nb_cell"
        )


def check_target(config: PerturbConfig, vocabulary: Vocabulary) -> None:
    """Raise InputError unless the model knows the requested labels and classes."""
    if problems := _target_problems(config, vocabulary):
        raise InputError("\n".join(problems))


def target_class(vocabulary: Vocabulary, name: str, value: str | None) -> str | None:
    """Return the class that cells are moved to, which need not be one of the data; None: without that label.

    Raises:
        UnknownNameError: There is no such label or class.
    """
    label = vocabulary.label(name)
    return None if value is None else label.asked(value)


def _target_problems(config: PerturbConfig, vocabulary: Vocabulary) -> list[str]:
    problems = []
    for name, value in config.to.items():
        try:
            target_class(vocabulary, name, value)
        except UnknownNameError as error:
            problems.append(f"to.{name}: {error}")
    if isinstance(config.guidance, dict):
        known = {x.name for x in vocabulary.labels}
        problems += [f"guidance.{k}: the model knows no such label" for k in sorted(set(config.guidance) - known)]
        problems += [f"guidance has no scale for the label {k}" for k in sorted(known - set(config.guidance))]
    return problems
