"""Check a job before it starts, so that an error shows at once and not after hours of training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.apply import PerturbConfig, RealCellsConfig
from pipeline.config.checks import feed_problems, gpu_problems
from pipeline.config.deepspeed import read_options
from pipeline.config.input_paths import ingest_of
from pipeline.config.job import (
    DistilConfig,
    EvaluateConfig,
    GenerateConfig,
    IngestConfig,
    JobBase,
    PredictErrorConfig,
    ResourcesConfig,
    TrainConfig,
    TrainFlowConfig,
    TrainVaeConfig,
    stage_configs,
)
from pipeline.config.stages import LibrarySizesOf
from pipeline.core.manifest import Manifest
from scldm.errors import InputError
from scldm.flow.config import Distilled
from scldm.generation.request import Request
from scldm.text import choices_hint

if TYPE_CHECKING:
    from pipeline.config.stages import StartFlowConfig
    from scldm.config import StrictModel
    from scldm.data.vocabulary import Vocabulary


def check_settings(job: JobBase) -> None:
    """Check that the settings of a job fit together.

    Raises:
        InputError: Settings contradict each other; all problems are listed.
    """
    problems: list[str] = []
    configs = stage_configs(job)
    problems += gpu_problems([s for s, c in configs.items() if _trains(c)], job.resources)
    for stage, config in configs.items():
        where = f"{stage}." if job.kind == "pipeline" else ""
        if (train := getattr(config, "train", None)) is not None:
            problems += feed_problems(train, job.resources, where)
            problems += [*_deepspeed_problems(train), *_decoder_problems(train, job.resources, where)]
            problems += _cautious_problems(train, job.resources, where)
            problems += [*_adapter_problems(config, where), *_gene_table_problems(config, where)]
        if isinstance(config, IngestConfig) and config.label_values:
            from pipeline.data.ingest.label_values import read_tables

            try:
                read_tables(config)
            except InputError as error:
                problems.append(str(error))
        if isinstance(config, IngestConfig) and config.replay is not None and config.replay.pipeline is not None:
            try:
                ingest_of(config.replay.pipeline)
            except FileNotFoundError:
                problems.append(
                    f"ingest.replay.pipeline: {config.replay.pipeline} is not there; name a pipeline's folder"
                )
            except InputError as error:
                problems.append(f"ingest.replay.pipeline: {error}")
        if isinstance(config, IngestConfig) and config.replay is not None and config.replay.model is not None:
            from pipeline.inference.replay import old_model_problems

            problems += old_model_problems(config.replay.model)
        if isinstance(config, GenerateConfig):
            from pipeline.inference.request import check_choice

            ingest = configs.get("ingest") if config.model is None else None  # which decides the model's labels
            labels = ingest.labels if isinstance(ingest, IngestConfig) else None
            problems += check_choice(config, labels) or _named_model_problems(config)
            problems += _gaussian_problems(config, configs.get("train_vae"))
            problems += _decoder_condition_problems(config, configs.get("train_vae"))
            problems += _flow_problems(config, configs.get("train_flow"))
            problems += _distilled_problems(config, configs.get("distil"))
            if isinstance(config.library_size, LibrarySizesOf) and config.model is None:
                from pipeline.data.sources.library_sizes import library_size_problems

                problems += library_size_problems(config.library_size.of, None)
        if isinstance(config, DistilConfig):
            problems += _teacher_problems(config, configs.get("train_flow"), configs.get("ingest"))
        if isinstance(config, TrainFlowConfig) and config.start_from is not None:
            problems += _start_problems(config.start_from, where)
        problems += _control_problems(config, configs.get("ingest"))
        problems += _precision_problems(config, job.resources, where)
        if isinstance(config, PredictErrorConfig) and getattr(configs.get("train_vae"), "model", None) is not None:
            problems += _gaussian_predictions(configs["train_vae"])
        if isinstance(config, RealCellsConfig):
            from pipeline.inference.models import model_problems

            problems += model_problems(config)
    if problems:
        raise InputError("\n".join(problems))


def _trains(config: StrictModel) -> bool:
    """Return whether a stage with these settings trains on workers; a VAE that is used as it is does not."""
    return hasattr(config, "train") and getattr(config, "pretrained", None) is None


def _control_problems(config: StrictModel, ingest: StrictModel | None) -> list[str]:
    """Return the labels of control cells that the ingest of the same job does not have."""
    if not isinstance(ingest, IngestConfig):
        return []
    named: dict[str, Iterable[str]] = {}
    if isinstance(config, TrainFlowConfig) and config.start is not None:
        named["train_flow.start.control"] = config.start.control
    if isinstance(config, EvaluateConfig) and config.control is not None:
        named["evaluate.control"] = config.control
    return [
        f"{where}: ingest.labels has no label {name!r} ({choices_hint(name, ingest.labels, 'there are')})"
        for where, names in named.items()
        for name in names
        if name not in ingest.labels
    ]


def _named_model_problems(config: GenerateConfig) -> list[str]:
    """Return what the models that a job of generation names cannot do."""
    if config.model is None:
        return []
    from pipeline.data.sources.library_sizes import library_size_problems
    from pipeline.inference.models import (
        check_folders,
        distilled_generation_problems,
        distilled_of,
        draws_counts,
        flow_start,
        named_models,
        vae_config,
    )
    from pipeline.inference.request import read_request, values_problems, vectors_of
    from scldm.data.vocabulary import Vocabulary
    from scldm.flow.transport import generation_start_problem

    try:
        named = named_models(config.model, weights=config.sampler.weights)
        check_folders(named)
        vocabulary = Vocabulary.load(Path(str(named.flow)) / "vocabulary.json")
        if problem := generation_start_problem(flow_start(str(named.flow)), config.start):
            raise InputError(problem)
        if problems := distilled_generation_problems(distilled_of(str(named.flow)), config):
            raise InputError("\n".join(problems))
        if config.like is None:  # else the composition is known when ingest is
            request = read_request(config, vocabulary, {})
            vectors_of(config, request, vae_config(named.vae))
        else:
            request = Request(())
        if not draws_counts(named.vae):
            return values_problems(config, request)
    except InputError as error:
        return [f"generate.model: {error}"]
    if not isinstance(config.library_size, LibrarySizesOf):
        return []
    return library_size_problems(config.library_size.of, vocabulary)


def _gaussian_problems(config: GenerateConfig, vae: Any, request: Request | None = None) -> list[str]:
    """Return what a job of generation asks for that a Gaussian head of its own VAE cannot give.

    Args:
        request: The rows that are asked for; None if they are not known yet.
    """
    if config.model is not None or not isinstance(vae, TrainVaeConfig) or vae.model.head != "gaussian":
        return []
    from pipeline.inference.request import values_problems

    return values_problems(config, request or Request(()))


def _gaussian_predictions(vae: Any) -> list[str]:
    if vae.model.head != "gaussian":
        return []
    from pipeline.stages.unseen.asked import GAUSSIAN

    return [f"predict_error: the VAE of this job {GAUSSIAN}"]


def _decoder_condition_problems(config: GenerateConfig, vae: Any) -> list[str]:
    if config.model is not None or config.decoder_condition is None or not isinstance(vae, TrainVaeConfig):
        return []
    return ["generate: decoder_condition: the VAE's decoder takes none (adaln is false); leave it out"]


def _flow_problems(config: GenerateConfig, flow: Any) -> list[str]:
    """Return what a job of generation asks for that the flow which it trains will not have."""
    if config.model is not None or not isinstance(flow, TrainFlowConfig):
        return []
    from scldm.flow.guidance import JOINT, ONE_AT_A_TIME
    from scldm.flow.transport import generation_start_problem

    problem = generation_start_problem(flow.controls, config.start)
    problems = [] if problem is None else [f"generate: {problem}"]
    scales = config.sampler.guidance
    if isinstance(scales, Mapping) and JOINT in scales and flow.model.strategy != "joint":
        problems.append(f"generate.sampler.guidance: {ONE_AT_A_TIME}")
    return problems


def _distilled_problems(config: GenerateConfig, distil: Any) -> list[str]:
    """Return what a job of generation asks for that the distilled flow which it makes will not do."""
    if config.flow != "distil" or not isinstance(distil, DistilConfig):
        return []
    from pipeline.inference.models import distilled_generation_problems

    return distilled_generation_problems(_distilled_by(distil), config)


def _distilled_by(config: DistilConfig) -> Distilled:
    """Return what the model folder of a distilled flow will record, whatever its teacher."""
    return Distilled(evaluations=config.evaluations, guidance=config.guidance, teacher="")


def _teacher_problems(config: DistilConfig, flow: Any, ingest: Any) -> list[str]:
    """Return why a flow that is named, or that the same job trains, cannot be distilled as the settings say."""
    if config.model is not None:
        from pipeline.stages.training.distil import folder_problems
        from scldm.api.folders import find_model

        try:
            return folder_problems(config, find_model(config.model, "flow", weights=config.weights))
        except InputError:
            return []  # said elsewhere
    if not isinstance(flow, TrainFlowConfig):
        return []
    from scldm.flow.distilled import teacher_problems

    labels = list(ingest.labels) if isinstance(ingest, IngestConfig) else []
    return teacher_problems(
        config.guidance, path=flow.flow, labels=labels, strategy=flow.model.strategy,
        label_dropout=flow.model.label_dropout, start=flow.controls,
    )  # fmt: skip


def _start_problems(start: StartFlowConfig, where: str) -> list[str]:
    """Return why the flow that a training starts from is none to start from."""
    from pipeline.inference.models import distilled_of
    from scldm.api.folders import find_model
    from scldm.flow.distilled import whole_flow_problem

    try:
        distilled = distilled_of(find_model(start.model, "flow"))
    except InputError:
        return []  # said elsewhere
    problem = whole_flow_problem(distilled, f"{where}start_from.model ({start.model})")
    return [] if problem is None else [problem]


def _deepspeed_problems(train: TrainConfig) -> Iterator[str]:
    if train.deepspeed is not None:
        try:
            read_options(train.deepspeed)
        except InputError as error:
            yield str(error)


def _cautious_problems(train: TrainConfig, resources: ResourcesConfig, where: str) -> Iterator[str]:
    if train.optimizer.cautious and train.zero_stage > 0 and len(resources.world_sizes) > 1:
        yield (
            f"{where}train.optimizer.cautious (true) rescales under ZeRO by what a worker holds of all parameters, so "
            f"its steps depend on the number of workers, and resources.workers is {resources.workers}; set "
            f"{where}train.zero_stage=0, or a fixed number of workers"
        )


def _adapter_problems(config: Any, where: str) -> Iterator[str]:
    start = getattr(config, "start_from", None)
    if start is not None and start.lora is not None and config.train.zero_stage == 3:
        yield (
            f"{where}start_from.lora adds to weights that every worker holds, and ZeRO 3 cuts them up; adapters need "
            f"little memory: set {where}train.zero_stage=2"
        )


def _gene_table_problems(config: Any, where: str) -> Iterator[str]:
    table = getattr(getattr(config, "start_from", None), "gene_embeddings", None)
    if table is not None:
        from scldm.checkpoints.gene_vectors import read_gene_vectors

        try:
            read_gene_vectors(Path(table), f"{where}start_from.gene_embeddings")
        except InputError as error:
            yield str(error)


def _decoder_problems(train: TrainConfig, resources: ResourcesConfig, where: str) -> Iterator[str]:
    if getattr(train, "decoder", "torch") == "triton" and not resources.gpus_per_worker:
        yield (
            f"{where}train.decoder (triton) needs a GPU in every worker, and resources.gpus_per_worker is 0; set it to "
            f"1, or {where}train.decoder=torch"
        )


def _precision_problems(config: Any, resources: ResourcesConfig, where: str) -> Iterator[str]:
    """Say what actors without a GPU cannot compute; what a GPU has, its actor finds out before it makes anything."""
    alone = isinstance(config, PredictErrorConfig)  # has no actors
    if getattr(config, "precision", None) == "tf32" and not resources.gpus_per_worker and not alone:
        yield (
            f"{where}precision (tf32) exists on NVIDIA GPUs, and resources.gpus_per_worker is 0; set it to 1, or leave "
            f"{where}precision out"
        )


def check_against_data(
    configs: Mapping[str, StrictModel], ingest: Manifest, vae: Manifest | None = None
) -> Request | None:
    """Check that the data hold what later stages need; called as soon as ingest has finished.

    Args:
        configs: Stage -> settings, of the stages that will run.
        ingest: Its manifest.
        vae: Manifest of a train_vae that finished before and that they use; None if there is none yet.

    Returns:
        The request of generate, resolved to rows of labels and numbers; None if generate does not run.

    Raises:
        InputError: The data lack something.
    """
    request = None
    config = configs.get("generate")
    if isinstance(config, GenerateConfig) and config.model is None:
        from pipeline.data.ingest.dataset import IngestedDataset
        from pipeline.inference.request import resolve_request

        request = resolve_request(config, IngestedDataset.open(ingest))
        if problems := _gaussian_problems(config, configs.get("train_vae"), request):
            raise InputError("\n".join(problems))
        _check_own_guidance(request, config, configs, ingest)
    _check_labels(configs, ingest)
    _check_unseen(configs, ingest, vae)
    _check_vae(configs.get("train_vae"), ingest)
    for stage, split in (("train_vae", "validation"), ("evaluate", getattr(configs.get("evaluate"), "split", None))):
        if stage in configs and split is not None and not ingest.facts["n_cells"].get(split):
            raise InputError(
                f"{stage} needs cells of the {split} split and there are none; "
                f"raise ingest.split.{split} or give the source more cells"
            )
    return request


def _check_vae(vae: Any, ingest: Manifest) -> None:
    """Check that the genes of the data are what training of a VAE asks for."""
    if isinstance(vae, TrainVaeConfig) and vae.start_from is not None:
        from scldm.api.folders import find_model
        from scldm.checkpoints.start_from import shared_genes
        from scldm.data.vocabulary import Vocabulary

        model = Vocabulary.load(find_model(vae.start_from.model, "vae") / "vocabulary.json")
        try:
            shared_genes(model, Vocabulary.load(ingest.path("vocabulary")))
        except InputError as error:
            raise InputError(f"train_vae.start_from.model: {vae.start_from.model}: {error}") from error
    if isinstance(vae, TrainVaeConfig) and (vae.train.genes_seen.n or 0) > ingest.facts["n_genes"]:
        raise InputError(
            f"train_vae: train.genes_seen.n ({vae.train.genes_seen.n}) is more than the "
            f"{ingest.facts['n_genes']} genes of the vocabulary; lower it"
        )


def _check_unseen(configs: Mapping[str, StrictModel], ingest: Manifest, vae: Manifest | None) -> None:
    """Check that training cells and the VAE can answer for combinations that were not measured."""
    model = None if vae is None else vae.path("model")
    asked, perturb = configs.get("predict_error"), configs.get("perturb")
    if isinstance(asked, PredictErrorConfig):
        from pipeline.stages.unseen.asked import check_predictable

        check_predictable(asked, ingest, model)
    if isinstance(perturb, PerturbConfig) and perturb.method != "flow":
        from pipeline.stages.unseen.asked import check_learnable

        check_learnable(perturb, ingest, model)


def _check_own_guidance(
    request: Request, config: GenerateConfig, configs: Mapping[str, StrictModel], ingest: Manifest
) -> None:
    """Raise InputError for rows whose guidance is not that of the distilled flow which the job makes."""
    distil, flow = configs.get("distil"), configs.get("train_flow")
    if config.flow != "distil" or not isinstance(distil, DistilConfig) or not isinstance(flow, TrainFlowConfig):
        return
    from pipeline.inference.request import recipe_of
    from scldm.data.library_size import LibrarySizes
    from scldm.data.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(ingest.path("vocabulary")).extended(row.condition for row in request.rows)
    recipe_of(
        request, config, vocabulary, LibrarySizes({}, "not needed"), flow.model.strategy, counts=False,
        distilled=_distilled_by(distil),
    )  # fmt: skip


def _check_labels(configs: Mapping[str, StrictModel], ingest: Manifest) -> None:
    """Check what the training cells lack that the flow and the report need."""
    from pipeline.data.ingest.controls import COMPARED, check_compared_controls, check_controls
    from pipeline.data.ingest.dataset import IngestedDataset
    from pipeline.data.ingest.held_out import check_trained_classes

    data = IngestedDataset.open(ingest)
    flow, evaluate = configs.get("train_flow"), configs.get("evaluate")
    if isinstance(flow, TrainFlowConfig):
        if flow.start is not None:
            check_controls(flow.start, data)
        if flow.start_from is None:  # else the model that it starts from may know a class
            check_trained_classes(data)
        else:
            _check_old_labels(flow.start_from, data.vocabulary)
    if isinstance(evaluate, EvaluateConfig) and evaluate.control is not None:
        data.vocabulary.classes_of(evaluate.control, COMPARED)
        if isinstance(flow, TrainFlowConfig):
            check_compared_controls(evaluate.control, data)


def _check_old_labels(start_from: StartFlowConfig, vocabulary: Vocabulary) -> None:
    from scldm.api.folders import find_model
    from scldm.checkpoints.start_from import check_labels
    from scldm.data.vocabulary import Vocabulary

    old = Vocabulary.load(find_model(start_from.model, "flow") / "vocabulary.json")
    try:
        check_labels(vocabulary, old, start_from.parents)
    except InputError as error:
        raise InputError(f"train_flow.start_from.model: {start_from.model}: {error}") from error
