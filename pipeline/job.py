"""What a job file may say: one pydantic model per kind of job.

A job runs the stages whose sections it holds. `kind: line` holds them all; a stage's own job file holds that stage's
settings at the top level and, if it likes, the sections of earlier stages too. The output of a stage that has no
section is looked up under `output` (or under `inputs`), and must have been made before.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.ingest_config import (
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
from pipeline.real_cells_config import (
    EmbedConfig,
    LogLikelihoodConfig,
    PerturbConfig,
    RealCellsConfig,
    ReconstructConfig,
)
from pipeline.resources import CheckpointStorage, ResourcesConfig
from pipeline.train_config import FeedConfig, FlowTrainConfig, TrainConfig, VaeTrainConfig
from scldm.config import StrictModel
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.nn.config import DiTConfig, VAEConfig

__all__ = [
    "CellsConfig",
    "CensusSource",
    "FeedConfig",
    "FlowTrainConfig",
    "GenesConfig",
    "H5adSource",
    "HeldOutConfig",
    "IngestConfig",
    "Job",
    "SomaSource",
    "Source",
    "SplitConfig",
    "SyntheticSource",
    "TenxSource",
    "TrainConfig",
    "VaeTrainConfig",
    "stage_configs",
]

STAGES = ("ingest", "train_vae", "encode", "train_flow", "generate", "evaluate")
REAL_CELL_STAGES = ("embed", "reconstruct", "perturb", "log_likelihood")  # jobs of their own; no part of the line
NEEDS: dict[str, tuple[str, ...]] = {
    "ingest": (),
    "train_vae": ("ingest",),
    "encode": ("ingest", "train_vae"),
    "train_flow": ("ingest", "train_vae", "encode"),
    "generate": ("ingest", "train_vae", "train_flow"),
    "evaluate": ("ingest", "train_vae", "generate"),
}


def needs(stage: str, config: Any) -> tuple[str, ...]:
    """Stages that a stage with these settings is made from."""
    if stage == "train_flow" and config.vae.train:
        return ("ingest", "train_vae")  # it streams counts
    if isinstance(config, RealCellsConfig):
        if config.model is not None:
            return ()
        return ("train_vae", "train_flow") if config.uses_flow else ("train_vae",)
    return NEEDS[stage]


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


# ---- stages ------------------------------------------------------------------------------------------------------
class TrainVaeConfig(StrictModel):
    model: VAEConfig = VAEConfig()
    train: VaeTrainConfig = VaeTrainConfig()

    @model_validator(mode="after")
    def _decoder_needs_no_condition(self) -> TrainVaeConfig:
        if self.model.adaln:
            raise ValueError(
                "model.adaln (true) needs a condition vector per cell, which this stage has none of: false"
            )
        return self


class EncodeConfig(StrictModel):
    batch_size: PositiveInt = 256
    splits: list[Literal["train", "validation", "test"]] = ["train", "validation"]


class JointVaeConfig(StrictModel):
    """Whether the VAE is trained on, together with the flow."""

    train: bool = False
    """true streams counts instead of reading the latent cache, with the encoder in the graph; the stage then needs no
    encode, and exports both networks. generate and evaluate take this VAE."""
    weight: PositiveFloat = 1.0
    """Of the VAE's negative log-likelihood (nats per cell) beside the flow's loss (mean square of a latent)."""
    genes_per_step: PositiveInt | None = None
    """Genes scored in a training step, as train_vae.train.genes_per_step."""

    @model_validator(mode="after")
    def _is_of_a_joint_training(self) -> JointVaeConfig:
        given = [f for f in ("weight", "genes_per_step") if getattr(self, f) != JointVaeConfig.model_fields[f].default]
        if given and not self.train:
            raise ValueError(
                f"{', '.join(given)} is of a VAE that is trained with the flow, and vae.train is false; set it to "
                f"true, or leave {', '.join(given)} out"
            )
        return self


class TrainFlowConfig(StrictModel):
    model: DiTConfig = DiTConfig()
    flow: PathConfig = PathConfig()
    train: FlowTrainConfig = FlowTrainConfig()
    vae: JointVaeConfig = JointVaeConfig()

    @model_validator(mode="after")
    def _a_cap_on_genes_needs_genes(self) -> TrainFlowConfig:
        if self.train.feed.max_genes is not None and not self.vae.train:
            raise ValueError(
                f"train.feed.max_genes ({self.train.feed.max_genes}) caps the genes of a cell, and the flow is trained "
                "on cached latents, which have none; leave it out, or set vae.train=true"
            )
        return self


class GenerateConfig(StrictModel):
    conditions: str | None = None
    """CSV, TSV or Parquet table: label columns, n_cells and, if you like, guidance (or guidance.<label>), library_size.
    An empty field of a label: generated without that label; of another column: as the settings below say."""
    cells: list[dict[str, Any]] | None = None
    """The same table inline: [{cell_type: B, n_cells: 1000}, …]."""
    per_label: dict[str, PositiveInt] | None = None
    """So many cells for each class of a label: {cell_type: 200}."""
    like: Literal["train", "validation", "test"] | None = None
    """As many cells of each combination of labels as this split has."""
    n_cells: PositiveInt | None = None
    """With `like`: how many cells in all, at the same composition. Alone: so many unconditional cells."""
    library_size: Literal["statistics"] | PositiveFloat = "statistics"
    """Sum of counts that the decoder is asked for: drawn from the training cells' statistics of the condition (its
    combination of labels, else the label with most cells, else all cells), or one number for all cells."""
    genes: list[str] | str | None = None
    """Genes that are written: ids or names, or a text file with one on each line. All are decoded either way, so that
    the counts of a gene do not depend on which others are written."""
    sampler: SamplerConfig = SamplerConfig()
    shard_size: int = Field(25_000, ge=1, le=250_000)
    batch_size: PositiveInt | None = None
    """Cells that an actor has decoded ahead of its writer, in whole tiles (32 cells on a CPU, up to 1,024 on a GPU).
    Null: two tiles. It decides memory, never a count."""
    seed: int = Field(0, ge=0, lt=2**64)


class EvaluateConfig(StrictModel):
    split: Literal["validation", "test"] = "test"
    n_pcs: PositiveInt = 30
    n_top_genes: PositiveInt = 2000
    max_cells: PositiveInt = 5000
    """Real and generated cells scored at most; drawn by seed."""
    n_neighbors: PositiveInt = 15
    """Of the label classifier."""
    transport_cells: PositiveInt = 1000
    """Cells a side in the exact Wasserstein distances; time grows as its cube."""
    reconstruction_cells: PositiveInt = 512
    """Held-out cells that the VAE encodes and decodes."""
    umap: bool = True
    """False draws the first two principal components instead, which is quicker."""
    seed: int = Field(0, ge=0)


# ---- jobs --------------------------------------------------------------------------------------------------------
class TrackingConfig(StrictModel):
    """MLflow."""

    uri: str | None = None
    """Tracking server; null keeps a SQLite file under the output folder."""
    experiment: str | None = None
    """Null: scldm/<name of the job>."""


class JobBase(StrictModel):
    """What every job file may say."""

    name: Name
    """Name of the pipeline: stages of the same name and output find each other."""
    output: str = "runs"
    """Root folder; this pipeline writes to <output>/<name>. On a cluster: a path that every node sees."""
    seed: int = Field(0, ge=0)
    cluster: str | None = None
    """The cluster file that this job is sized for; for people and for `scldm plan`."""
    resources: ResourcesConfig = ResourcesConfig()
    checkpoints: CheckpointStorage = CheckpointStorage()
    """A second place for the checkpoints of training."""
    tracking: TrackingConfig = TrackingConfig()
    inputs: dict[str, str] = {}
    """Stage -> folder of a finished run of it; default: the newest under the output folder."""

    @model_validator(mode="after")
    def _inputs_are_stages(self) -> JobBase:
        unknown = sorted(set(self.inputs) - set(STAGES))
        if unknown:
            raise ValueError(f"inputs names {', '.join(unknown)}; stages are {', '.join(STAGES)}")
        return self


class LineJob(JobBase):
    kind: Literal["line"]
    ingest: IngestConfig
    train_vae: TrainVaeConfig = TrainVaeConfig()
    encode: EncodeConfig = EncodeConfig()
    train_flow: TrainFlowConfig = TrainFlowConfig()
    generate: GenerateConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _generates_counts(self) -> LineJob:
        if self.train_vae.model.head == "gaussian":
            raise ValueError(
                "train_vae.model.head (gaussian) models log-normalised expression, and generate draws counts: "
                "nb_shared or nb_cell"
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


Job = Annotated[
    LineJob
    | IngestJob
    | TrainVaeJob
    | EncodeJob
    | TrainFlowJob
    | GenerateJob
    | EvaluateJob
    | EmbedJob
    | ReconstructJob
    | PerturbJob
    | LogLikelihoodJob,
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
}


def stage_configs(job: JobBase) -> dict[str, StrictModel]:
    """The stages that a job holds, in the order in which they run."""
    kind: str = job.kind  # type: ignore[attr-defined]
    found: dict[str, StrictModel] = {}
    for stage in (*STAGES, *REAL_CELL_STAGES):
        if stage == kind:
            config_type = STAGE_CONFIGS[stage]
            found[stage] = config_type.model_validate({f: getattr(job, f) for f in config_type.model_fields})
        elif getattr(job, stage, None) is not None:
            found[stage] = getattr(job, stage)
    if kind == "line" and found["train_flow"].vae.train:  # type: ignore[attr-defined]
        del found["encode"]  # nobody would read the cache
    return found
