"""What a job file may say: one pydantic model per kind of job.

A job runs the stages whose sections it holds. `kind: pipeline` holds all of them; the job file of one stage holds
that stage's settings at the top level and, optionally, the sections of earlier stages. The output of a stage without a
section is looked up under `output` (or under `inputs`) and must already exist.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from pipeline.config.apply import (
    EmbedConfig,
    LogLikelihoodConfig,
    PerturbConfig,
    RealCellsConfig,
    ReconstructConfig,
)
from pipeline.config.ingest import (
    CellsConfig,
    CensusSource,
    GenesConfig,
    H5adSource,
    HeldOutConfig,
    IngestConfig,
    SomaSource,
    Source,
    SplitConfig,
    SyntheticSource,
    TenxSource,
)
from pipeline.config.paths.expand import PathText
from pipeline.config.resources import CheckpointStorage, ResourcesConfig
from pipeline.config.stages import (
    DistilConfig,
    EncodeConfig,
    EvaluateConfig,
    GenerateConfig,
    PredictErrorConfig,
    TrainFlowConfig,
    TrainVaeConfig,
)
from pipeline.config.train import FeedConfig, FlowTrainConfig, TrainConfig, VaeTrainConfig
from scldm.config import StrictModel

__all__ = [
    "CellsConfig",
    "CensusSource",
    "DistilConfig",
    "EncodeConfig",
    "EvaluateConfig",
    "FeedConfig",
    "FlowTrainConfig",
    "GenerateConfig",
    "GenesConfig",
    "H5adSource",
    "HeldOutConfig",
    "IngestConfig",
    "Job",
    "PredictErrorConfig",
    "SomaSource",
    "Source",
    "SplitConfig",
    "SyntheticSource",
    "TenxSource",
    "TrainConfig",
    "TrainFlowConfig",
    "TrainVaeConfig",
    "VaeTrainConfig",
    "stage_configs",
]

STAGES = ("ingest", "train_vae", "encode", "train_flow", "generate", "evaluate")
REAL_CELL_STAGES = ("embed", "reconstruct", "perturb", "log_likelihood")  # jobs of their own, not part of a pipeline
OWN_JOBS = (*REAL_CELL_STAGES, "predict_error", "distil")
# Stages that other jobs read, in the order in which they run; a pipeline may have `distil`.
IN_ORDER = ("ingest", "train_vae", "encode", "train_flow", "distil", "generate", "evaluate")
NEEDS: dict[str, tuple[str, ...]] = {
    "ingest": (),
    "train_vae": ("ingest",),
    "encode": ("ingest", "train_vae"),
    "train_flow": ("ingest", "train_vae", "encode"),
    "generate": ("ingest", "train_vae", "train_flow"),
    "evaluate": ("ingest", "train_vae", "generate"),
    "predict_error": ("ingest", "train_vae", "encode"),
    "distil": ("train_vae", "train_flow"),
}


def needs(stage: str, config: Any) -> tuple[str, ...]:
    """Return the stages that a stage with these settings reads."""
    if stage == "train_flow" and config.vae.train:
        return ("ingest", "train_vae")  # it streams counts
    if isinstance(config, EvaluateConfig) and config.cells != "generate":
        return ("ingest", "train_vae", config.cells)
    if isinstance(config, GenerateConfig) and config.model is not None:
        return ("ingest",) if config.like is not None else ()
    if isinstance(config, GenerateConfig) and config.flow == "distil":
        return ("ingest", "train_vae", "distil")
    if isinstance(config, DistilConfig) and config.model is not None:
        return ()
    if isinstance(config, PerturbConfig) and config.method != "flow":  # they learn from the training cells
        models = ("train_vae", "train_flow") if config.uses_flow and config.model is None else ()
        return ("ingest", *models)
    if isinstance(config, RealCellsConfig):
        if config.model is not None:
            return ()
        return ("train_vae", "train_flow") if config.uses_flow else ("train_vae",)
    return NEEDS[stage]


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


# ---- jobs --------------------------------------------------------------------------------------------------------
class TrackingConfig(StrictModel):
    """MLflow tracking."""

    uri: PathText | None = None
    """Tracking server; null uses MLFLOW_TRACKING_URI or, if that is not set, a SQLite file in the output folder."""
    experiment: str | None = None
    """Name of the experiment; null: scldm/<name of the job>."""

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).password:
            raise ValueError(
                f"the address of {urlsplit(value).hostname} holds a password, and jobs are kept with every output; "
                "leave it out and export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return value


class JobBase(StrictModel):
    """Settings of every job."""

    kind: str
    """Which job this is: pipeline, or the name of one stage."""
    name: Name
    """Name of the pipeline: stages of the same name and output find each other."""
    output: PathText = "runs"
    """Root folder of outputs; this pipeline writes to <output>/<name>. On a cluster: a path that every node sees.
    Here and in every other path, $NAME and ~ stand for a variable and the home folder where the job is loaded."""
    seed: int = Field(0, ge=0)
    """Seed of weights, order of cells and noise in training. Part of every version."""
    cluster: PathText | None = None
    """The cluster file that this job is sized for; for readers and for `scldm plan`."""
    resources: ResourcesConfig = ResourcesConfig()
    checkpoints: CheckpointStorage = CheckpointStorage()
    """Remote storage of training checkpoints."""
    tracking: TrackingConfig = TrackingConfig()
    inputs: dict[str, PathText] = {}
    """Stage -> folder of a finished run to use; default: the newest under the output folder."""

    @model_validator(mode="after")
    def _inputs_are_stages(self) -> JobBase:
        unknown = sorted(set(self.inputs) - set(IN_ORDER))
        if unknown:
            raise ValueError(f"inputs names {', '.join(unknown)}; stages are {', '.join(IN_ORDER)}")
        return self


class PipelineJob(JobBase):
    kind: Literal["pipeline"]
    ingest: IngestConfig
    train_vae: TrainVaeConfig = TrainVaeConfig()
    encode: EncodeConfig = EncodeConfig()
    train_flow: TrainFlowConfig = TrainFlowConfig()
    distil: DistilConfig | None = None
    generate: GenerateConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in to_dict(self).items() if (k, v) != ("distil", None)}

    @model_validator(mode="after")
    def _distils_its_own_flow(self) -> PipelineJob:
        if self.distil is not None and self.distil.model is not None:
            raise ValueError(
                "distil.model names another flow than the pipeline trains; leave it out, or distil in a job of its own "
                "(kind: distil)"
            )
        if self.distil is None and self.generate.flow == "distil":
            raise ValueError(
                "generate.flow (distil) is the distilled flow of this pipeline, and it has no section distil; add one "
                "(distil: {}), or leave generate.flow out"
            )
        return self

    @model_validator(mode="after")
    def _generates_with_its_own_models(self) -> PipelineJob:
        if self.generate.model is not None:
            raise ValueError(
                "generate.model names other models than the pipeline trains; leave it out, or generate in a job of its "
                "own (kind: generate)"
            )
        return self


class IngestJob(JobBase, IngestConfig):
    kind: Literal["ingest"]


class TrainVaeJob(JobBase, TrainVaeConfig):
    kind: Literal["train_vae"]
    ingest: IngestConfig | None = None


class EncodeJob(JobBase, EncodeConfig):
    kind: Literal["encode"]


class TrainFlowJob(JobBase, TrainFlowConfig):
    kind: Literal["train_flow"]


class GenerateJob(JobBase, GenerateConfig):
    kind: Literal["generate"]


class DistilJob(JobBase, DistilConfig):
    kind: Literal["distil"]


class EvaluateJob(JobBase, EvaluateConfig):
    kind: Literal["evaluate"]


class EmbedJob(JobBase, EmbedConfig):
    kind: Literal["embed"]


class ReconstructJob(JobBase, ReconstructConfig):
    kind: Literal["reconstruct"]


class PerturbJob(JobBase, PerturbConfig):
    kind: Literal["perturb"]


class LogLikelihoodJob(JobBase, LogLikelihoodConfig):
    kind: Literal["log_likelihood"]


class PredictErrorJob(JobBase, PredictErrorConfig):
    kind: Literal["predict_error"]


Job = Annotated[
    PipelineJob
    | IngestJob
    | TrainVaeJob
    | EncodeJob
    | TrainFlowJob
    | GenerateJob
    | EvaluateJob
    | EmbedJob
    | ReconstructJob
    | PerturbJob
    | LogLikelihoodJob
    | PredictErrorJob
    | DistilJob,
    Field(discriminator="kind"),
]
STAGE_CONFIGS: dict[str, type[StrictModel]] = {
    "ingest": IngestConfig,
    "train_vae": TrainVaeConfig,
    "encode": EncodeConfig,
    "train_flow": TrainFlowConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "embed": EmbedConfig,
    "reconstruct": ReconstructConfig,
    "perturb": PerturbConfig,
    "log_likelihood": LogLikelihoodConfig,
    "predict_error": PredictErrorConfig,
    "distil": DistilConfig,
}


def experiment_name(job: JobBase) -> str:
    """Return the name of the job's experiment in MLflow."""
    return job.tracking.experiment or f"scldm/{job.name}"


def stage_configs(job: JobBase) -> dict[str, StrictModel]:
    """Return the settings of each stage of a job, in the order in which the stages run."""
    found: dict[str, StrictModel] = {}
    for stage in dict.fromkeys((*IN_ORDER, *OWN_JOBS)):
        if stage == job.kind:
            config_type = STAGE_CONFIGS[stage]
            # The job was validated; its own settings are taken over as they are.
            found[stage] = config_type.model_construct(**{f: getattr(job, f) for f in config_type.model_fields})
        elif getattr(job, stage, None) is not None:
            found[stage] = getattr(job, stage)
    if isinstance(job, PipelineJob) and job.train_flow.vae.train:
        del found["encode"]  # nothing reads the cache
    if isinstance(job, PipelineJob) and job.distil is not None and job.generate.flow is None:
        found["generate"] = job.generate.model_copy(update={"flow": "distil"})
    return found
