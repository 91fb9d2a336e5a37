"""Locates and loads the models of a job on real cells: folders that it names, or what this pipeline trained."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config.apply import LogLikelihoodConfig, ModelNames, PerturbConfig, RealCellsConfig
from pipeline.config.context import StageContext
from pipeline.config.job import GenerateConfig
from scldm.api.folders import Weights, find_model, is_remote
from scldm.data.vocabulary import UnknownNameError, Vocabulary
from scldm.errors import InputError
from scldm.flow.config import ControlStart, Distilled
from scldm.generation.pair import pair_problems
from scldm.generation.request_table import TOGETHER

if TYPE_CHECKING:
    import torch

    from scldm.checkpoints.native import LoadedFlow, LoadedVAE
    from scldm.nn.config import VAEConfig

SHARED_MODELS = ".models"  # in the output folder
POOLS_COUNTS = (
    "method: pooled adds and removes molecules, and the VAE has a gaussian head, which models log1p CP10k values; set "
    "method=flow"
)


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
        if kind == "flow" and isinstance(config, PerturbConfig):
            problems += _flow_problems(config, folder, draws=_draws(config))
        if kind == "flow" and isinstance(config, LogLikelihoodConfig):
            problems += likelihood_problems(flow_start(folder), distilled_of(folder))
    return problems


def flow_start(folder: str | Path) -> ControlStart | None:
    """Return what the flow in a model folder was trained from beside noise."""
    about = json.loads((Path(folder) / "config.json").read_text()).get("start")
    return None if about is None else ControlStart.model_validate(about)


def distilled_of(folder: str | Path) -> Distilled | None:
    """Return how the flow in a model folder was distilled; None if it was not."""
    about = json.loads((Path(folder) / "config.json").read_text()).get("distilled")
    return None if about is None else Distilled.model_validate(about)


def distilled_generation_problems(distilled: Distilled | None, config: GenerateConfig) -> list[str]:
    """Return what a job of generation asks of a distilled flow that it cannot do; nothing for other flows."""
    if distilled is None:
        return []
    from scldm.flow.distilled import sampler_problems, whole_flow_problem  # imports torch

    by_way = whole_flow_problem(distilled, "generate: start (control)") if config.start == "control" else None
    found = sampler_problems(distilled, config.sampler, "generate.sampler")
    return found if by_way is None else [by_way, *found]


def likelihood_problems(start: ControlStart | None, distilled: Distilled | None = None) -> list[str]:
    """Return why latents have no likelihood under a flow."""
    if distilled is not None:
        from scldm.flow.distilled import whole_flow_problem  # imports torch

        return [str(whole_flow_problem(distilled, "flow: the likelihood of latents"))]
    if start is None or start.share < 1:
        return []
    return [
        "flow: the likelihood of latents is that of the noise they come from, and this flow was trained from control "
        "cells only (train_flow.start.share=1); leave flow out, or train with a share below 1"
    ]


def _draws(config: PerturbConfig) -> bool:
    """Return whether the VAE that a job names draws counts; True if there is none to ask, which is said elsewhere."""
    try:
        return config.model is None or draws_counts(find_model(config.model.vae, "vae"))
    except InputError:
        return True


def _flow_problems(config: PerturbConfig, folder: str | Path, *, draws: bool) -> list[str]:
    """Return what a perturbation needs of a flow that the one in a model folder does not have."""
    from scldm.flow.guidance import guidance_terms  # imports torch
    from scldm.generation.perturbed import perturb_problems

    problems = perturb_problems(
        config.to, config.start, flow_start(folder), counts=config.counts, draws_counts=draws,
        distilled=distilled_of(folder),
    )  # fmt: skip
    if config.method == "pooled" and not draws:
        problems.append(POOLS_COUNTS)
    labels = [x.name for x in Vocabulary.load(Path(folder) / "vocabulary.json").labels]
    if not isinstance(config.guidance, dict) or not (
        TOGETHER in config.guidance or set(labels) <= set(config.guidance)
    ):
        return problems  # labels without a scale are named elsewhere
    strategy = json.loads((Path(folder) / "config.json").read_text())["config"]["strategy"]
    try:
        guidance_terms(labels, config.guidance, strategy=strategy)
    except ValueError as error:
        problems.append(str(error))
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


def check_target(
    config: PerturbConfig, vocabulary: Vocabulary, flow: str | Path | None = None, *, draws_counts: bool = True
) -> None:
    """Raise InputError unless the model knows the requested labels and classes, and can start where it should.

    Args:
        flow: The flow; None if the method uses none.
        draws_counts: Whether the VAE draws counts.
    """
    problems = _target_problems(config, vocabulary)
    if flow is not None:
        problems += _flow_problems(config, flow, draws=draws_counts)
    if problems:
        raise InputError("\n".join(problems))


def target_classes(config: PerturbConfig, vocabulary: Vocabulary) -> dict[str, str | None]:
    """Return the classes that cells are moved to, as the model calls them; they need not be classes of the data.

    Raises:
        UnknownNameError: There is no such label or class.
    """
    return {k: None if v is None else vocabulary.label(k).asked(v) for k, v in config.to.items()}


def _target_problems(config: PerturbConfig, vocabulary: Vocabulary) -> list[str]:
    problems = []
    for name, value in config.to.items():
        try:
            label = vocabulary.label(name)
            if value is None or config.method != "flow":  # which is learned from cells
                label.encode([value])
            else:
                label.asked(value)
        except UnknownNameError as error:
            problems.append(f"to.{name}: {error}")
    if isinstance(config.guidance, dict):
        known = {x.name for x in vocabulary.labels}
        named = set(config.guidance) - {TOGETHER}
        problems += [f"guidance.{k}: the model knows no such label" for k in sorted(named - known)]
        if TOGETHER not in config.guidance:
            problems += [f"guidance has no scale for the label {k}" for k in sorted(known - named)]
    return problems
