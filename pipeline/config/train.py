"""Settings of a training run: how cells reach the workers, optimizer steps, validation, checkpoints.

The sections of the training stages (`pipeline.config.job`) hold one of these under `train`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pipeline.config.ingest import ClassName
from pipeline.config.input_paths import DeepSpeedFile
from scldm.config import StrictModel
from scldm.data.genes_seen import GenesSeenConfig
from scldm.optim.config import EMAConfig, OptimizerConfig


class FeedConfig(StrictModel):
    """How cells reach the workers."""

    batch_size: PositiveInt = 64
    """Cells per optimizer step, over all workers."""
    micro_batch_size: PositiveInt = 64
    """Most cells in a worker's micro batch; gradient accumulation follows from it."""
    lanes: PositiveInt = 4
    """Parallel streams of blocks. Every batch takes the same number of cells from each, which mixes cells from distant
    parts of the store. Must be a multiple of the number of workers and divide batch_size."""
    block_rows: PositiveInt = 8192
    """Cells in a block, read from whole storage tiles and shuffled inside."""
    max_genes: PositiveInt | None = None
    """Cap on a cell's expressed genes that the encoder sees, sampled by seed; null for no cap."""


class SpikeConfig(StrictModel):
    """Detection of steps whose loss jumps. Off unless `factor` is given."""

    factor: float | None = Field(None, gt=1)
    """A spike is a loss above this multiple of the median of the last `window` steps. Null: no detection."""
    action: Literal["log", "skip"] = "log"
    """log only reports a spike; skip also skips the step, on all workers. Skipped steps count towards max_skipped."""
    window: int = Field(100, ge=10)
    """Steps that the median is taken over; detection starts at the tenth step."""


class EarlyStoppingConfig(StrictModel):
    """Stop when validation no longer improves. The learning rate's final decay is then not reached: set
    optimizer.decay=0, or max_steps near the expected end of the run."""

    patience: PositiveInt = 5
    """Validations without improvement before training stops."""
    min_delta: float = Field(0.0, ge=0)
    """A validation loss must be lower than the best by more than this to count as an improvement."""


NEWER_DEFAULTS = (("first_weights", "random"), ("compile", False))  # left out of what is written down


class TrainConfig(StrictModel):
    """A training run, including the options of DeepSpeed."""

    max_steps: PositiveInt = 600
    """Optimizer steps."""
    feed: FeedConfig = FeedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu keeps the optimizer's state and its step in the host's memory, with ZeRO stages 1 to 3: this saves GPU
    memory and costs time. The step is torch's own fused AdamW, so nothing is compiled."""
    deepspeed: DeepSpeedFile | None = None
    """For experts: a JSON file of further DeepSpeed options (buckets, overlap_comm, compression, …). Options
    that follow from other settings of the job may not be set there; the error names both."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes products of matrices in bf16 (torch.autocast) and keeps weights, gradients, their sums over
    workers, softmax and likelihood in fp32. Faster on A100 and later, slower on CPUs."""
    compile: bool = False
    """Compile transformer blocks and the decoder's tiles with torch.compile: minutes at the start, fewer and larger
    kernels in each step. Needs a C++ compiler on every worker, and zero_stage 0, 1 or 2."""
    validate_every: PositiveInt = 200
    """Steps between validations."""
    validation_cells: PositiveInt = 512
    """Cells of the validation split that are scored in each validation."""
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_best: int = Field(1, ge=0)
    """Further checkpoints kept: those with the lowest validation loss among steps that were validated."""
    log_every_seconds: PositiveFloat = 5.0
    """Seconds between progress lines."""
    non_finite: Literal["skip", "stop"] = "skip"
    """What to do about a NaN or infinite loss or gradient on any worker. skip skips the step on all workers (weights,
    optimizer state and average do not change), counts it and names the cells; stop ends the run at the first."""
    max_skipped: PositiveInt = 10
    """Consecutive skipped steps before the run ends."""
    spike: SpikeConfig = SpikeConfig()
    early_stopping: EarlyStoppingConfig | None = None
    """Null trains to max_steps."""
    export: Literal["last", "best"] = "last"
    """Which weights become the model: those of the last step, or of the lowest validation loss. best writes a
    checkpoint at every validation that improves."""
    step_timeout_s: PositiveFloat = 600.0
    """A worker that finishes no step, validation or checkpoint for this many seconds (three times as many before its
    first step) writes its stacks to hang-rank<r>.txt and exits; the group restarts from the last checkpoint."""
    max_failures: int = Field(3, ge=0)
    """Worker failures after which the job is restarted; one more ends it."""

    @model_serializer(mode="wrap")
    def _without_newer_defaults(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before these settings existed."""
        return {k: v for k, v in to_dict(self).items() if (k, v) not in NEWER_DEFAULTS}

    @model_validator(mode="after")
    def _compiled_parameters_are_whole(self) -> TrainConfig:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile (true) cannot look into zero_stage 3, which gathers the weights of a block when it is called; "
                "set zero_stage to 2, or compile to false"
            )
        return self

    @model_validator(mode="after")
    def _offload_is_of_shards(self) -> TrainConfig:
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"offload_optimizer ({self.offload_optimizer}) needs zero_stage 1, 2 or 3; got 0: DeepSpeed offloads "
                "shards, and stage 0 has none"
            )
        return self


class VaeTrainConfig(TrainConfig):
    """The training run of the VAE."""

    genes_per_step: PositiveInt | None = None
    """Genes scored in a training step, drawn by expression; the loss is then an unbiased estimate. Null: all genes."""
    genes_seen: GenesSeenConfig = GenesSeenConfig()
    """Genes of a cell that the encoder sees in training, drawn again for every cell in every epoch by (seed, epoch).
    The likelihood always scores all genes. Validation and encode always see all expressed genes, because a latent must
    not depend on a draw. weighted draws by the gene means of ingest; a gene that no training cell expresses counts as
    rare as the rarest expressed one."""

    first_weights: Literal["random", "components"] = "random"
    """What training begins with. components: the gene embeddings hold the principal components of 2,048 training cells,
    drawn by seed, and the encoder is scaled to them: the same loss in a fraction of the steps. Weights that start_from
    takes over come in their place."""
    theta_cells: int = Field(2048, ge=0)
    """Training cells that each gene's inverse dispersion is fitted on when training ends, by maximum likelihood given
    the trained means (head nb_shared); drawn by seed. 0 keeps the values that the optimizer left, which lag behind."""
    decoder: Literal["torch", "triton"] = "torch"
    """Implementation of the decoder. triton: kernels for a GPU, not the default because they were never timed on one;
    an error at the start if a worker has no CUDA device."""

    @model_validator(mode="after")
    def _genes_are_chosen_once(self) -> VaeTrainConfig:
        if self.feed.max_genes is not None and self.genes_seen.mode != "expressed":
            raise ValueError(
                f"feed.max_genes ({self.feed.max_genes}) and genes_seen (mode {self.genes_seen.mode}) both choose the "
                "genes that the encoder sees; set one (max_genes alone is genes_seen: {mode: random_expressed}, drawn "
                "once for all epochs)"
            )
        return self


class FlowStartConfig(StrictModel):
    """Start the flow at control cells too: it then carries control cells to a treatment, beside making cells from
    noise."""

    control: dict[str, ClassName] = Field(min_length=1, max_length=1)
    """The label of the treatment and its control class: {cytokine: PBS}. A cell starts at the latents of a control cell
    with the same other labels, matched by optimal transport; a cell whose other labels no control cell has starts at
    noise."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of the cells that start at control cells, drawn by seed; the others start at noise. 1: none start at noise,
    and the flow can only carry control cells that the user gives (perturb with start: control)."""
    cells_per_group: PositiveInt = 10_000
    """Most control cells of a combination of the other labels, drawn by seed. Every worker holds their latents in
    memory."""


class DistilTrainConfig(TrainConfig):
    """The training run of a distilled flow: on trajectories, in the place of cells."""

    max_steps: PositiveInt = 1500
    """Optimizer steps."""
    feed: FeedConfig = FeedConfig(batch_size=128, micro_batch_size=128)
    ema: EMAConfig = EMAConfig(decay=0.998)
    validation_cells: PositiveInt = 512
    """Further trajectories that are solved, not trained on, and scored in each validation: by how much jumps miss
    them."""

    @model_validator(mode="after")
    def _trajectories_have_no_genes(self) -> DistilTrainConfig:
        if self.feed.max_genes is not None:
            raise ValueError(
                f"feed.max_genes ({self.feed.max_genes}) caps the genes of a cell, and trajectories have none; "
                "leave it out"
            )
        return self


class FlowTrainConfig(TrainConfig):
    """The training run of the flow."""

    ema: EMAConfig = EMAConfig()
    sample_every: PositiveInt | None = None
    """Generate a few cells with the averaged weights in every n-th validation, beginning with the first, score them
    with the metrics of evaluate against the validation split and log the scores as val/gen_*. Null: never. Worker 0
    generates while the others wait: some seconds on a CPU."""
    sample_cells: int = Field(256, ge=32)
    """Cells that are generated then, with the labels and library sizes of as many held-out cells."""

    @model_validator(mode="after")
    def _samples_need_whole_weights_on_one_worker(self) -> FlowTrainConfig:
        if self.sample_every is not None and self.zero_stage == 3:
            raise ValueError(
                f"sample_every ({self.sample_every}) lets worker 0 run the network alone, and zero_stage (3) needs all "
                "workers in every pass; set zero_stage to 0, 1 or 2, or leave sample_every out"
            )
        return self
