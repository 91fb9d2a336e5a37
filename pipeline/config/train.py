"""What a job file may say about a training run: how cells reach the workers, how they step, what is kept.

The stage's own sections (`pipeline.config.job`) hold one of these under `train`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.config.input_paths import DeepSpeedFile
from scldm.config import StrictModel
from scldm.data.genes_seen import GenesSeenConfig
from scldm.flow.config import EMAConfig
from scldm.optim.config import OptimizerConfig


class FeedConfig(StrictModel):
    """How cells reach the workers."""

    batch_size: PositiveInt = 64
    """Cells per optimizer step, over all workers."""
    micro_batch_size: PositiveInt = 64
    """Most cells a worker takes at once; accumulation follows."""
    lanes: PositiveInt = 4
    """Parallel streams of blocks that every batch is drawn from. A multiple of the workers; divides batch_size."""
    block_rows: PositiveInt = 8192
    """Cells in a block, read from whole storage tiles and shuffled inside."""
    max_genes: PositiveInt | None = None
    """Cap on a cell's expressed genes that the encoder sees, sampled by seed; null for no cap."""


class SpikeConfig(StrictModel):
    """What to do about a step whose loss leaps. Off unless `factor` is given."""

    factor: float | None = Field(None, gt=1)
    """A spike is a loss above so many times the median of the last `window` steps. Null: no guard."""
    action: Literal["log", "skip"] = "log"
    """log says it; skip also leaves the step out, on all workers. Skipped steps count towards max_skipped."""
    window: int = Field(100, ge=10)
    """Steps of the median; judged from the tenth on."""


class EarlyStoppingConfig(StrictModel):
    """End when validation no longer improves. The learning rate's final decay is then not reached: set
    optimizer.decay=0, or a max_steps near where the run is expected to end."""

    patience: PositiveInt = 5
    """Validations without improvement that are waited for."""
    min_delta: float = Field(0.0, ge=0)
    """What counts as an improvement: a validation loss lower than the best by more than this."""


class TrainConfig(StrictModel):
    """A training run. Also the place for what DeepSpeed is told."""

    max_steps: PositiveInt = 600
    """Optimizer steps."""
    feed: FeedConfig = FeedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu keeps the optimizer's state and its step in the host's memory, with ZeRO stages 1 to 3: room on the GPU for
    time. The step is torch's own fused AdamW, so nothing is compiled."""
    deepspeed: DeepSpeedFile | None = None
    """For experts: a JSON file of further DeepSpeed options (buckets, overlap_comm, compression, …). What we set
    ourselves it may not set: the error names both."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 pays on A100 and later; on CPU it is slower."""
    validate_every: PositiveInt = 200
    """Steps between validations."""
    validation_cells: PositiveInt = 512
    """Cells of the validation split that are scored."""
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints."""
    keep_last: PositiveInt = 2
    """Checkpoints kept."""
    keep_best: int = Field(1, ge=0)
    """Checkpoints kept besides, of lowest validation loss among those written at a step that was validated."""
    log_every_seconds: PositiveFloat = 5.0
    """Seconds between progress lines."""
    non_finite: Literal["skip", "stop"] = "skip"
    """A step with a NaN or infinite loss or gradient on any worker: skip leaves it out on all workers (weights,
    optimizer and average stay as they were), counts it and names the cells; stop ends the run at the first."""
    max_skipped: PositiveInt = 10
    """Steps skipped in a row before the run ends."""
    spike: SpikeConfig = SpikeConfig()
    early_stopping: EarlyStoppingConfig | None = None
    """Null trains to max_steps."""
    export: Literal["last", "best"] = "last"
    """Which weights become the model: those of the last step, or of the lowest validation loss. best writes a
    checkpoint at every validation that improves."""
    step_timeout_s: PositiveFloat = 600.0
    """A worker without a step, validation or checkpoint finished for so long (3 times, for its first step) writes its
    stacks to hang-rank<r>.txt and ends, so that the group starts again from the last checkpoint."""
    max_failures: int = Field(3, ge=0)
    """Worker failures survived before the job gives up."""

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
    """Genes scored in a training step, drawn by expression; the loss stays an estimate of the full one. Null: all."""
    genes_seen: GenesSeenConfig = GenesSeenConfig()
    """Genes that the encoder sees of a cell in training, drawn anew for every cell in every epoch by (seed, epoch). All
    genes are scored, whichever are seen. Validation and encode see all expressed genes whatever is set here: a latent
    must not depend on a draw, and what validation scores is then what encode makes. weighted draws by the gene means of
    ingest; one that no training cell expresses is taken for as rare as the rarest that is."""

    theta_cells: int = Field(2048, ge=0)
    """Training cells that each gene's inverse dispersion is fitted on when training ends, by maximum likelihood given
    the trained means (head nb_shared); drawn by seed. 0 keeps the values that the optimizer left, which lag behind."""
    decoder: Literal["torch", "triton"] = "torch"
    """What computes the decoder. triton: kernels for a GPU, asked for by name because no GPU has timed them yet; an
    error at the start where a worker has no CUDA device."""

    @model_validator(mode="after")
    def _genes_are_chosen_once(self) -> VaeTrainConfig:
        if self.feed.max_genes is not None and self.genes_seen.mode != "expressed":
            raise ValueError(
                f"feed.max_genes ({self.feed.max_genes}) and genes_seen (mode {self.genes_seen.mode}) both choose the "
                "genes that the encoder sees; set one (max_genes alone is genes_seen: {mode: random_expressed}, drawn "
                "once for all epochs)"
            )
        return self


class FlowTrainConfig(TrainConfig):
    """The training run of the flow."""

    ema: EMAConfig = EMAConfig()
    sample_every: PositiveInt | None = None
    """Validations between two generations of a few cells with the averaged weights, scored by the metrics of evaluate
    against cells of the validation split and logged as val/gen_*; the first validation has one. Null: none. Worker 0
    makes them and the others wait: some seconds on a CPU."""
    sample_cells: int = Field(256, ge=32)
    """Cells that are generated then: the labels and library sizes of so many held-out cells."""

    @model_validator(mode="after")
    def _samples_need_whole_weights_on_one_worker(self) -> FlowTrainConfig:
        if self.sample_every is not None and self.zero_stage == 3:
            raise ValueError(
                f"sample_every ({self.sample_every}) lets worker 0 run the network alone, and zero_stage (3) needs all "
                "workers in every pass; set zero_stage to 0, 1 or 2, or leave sample_every out"
            )
        return self
