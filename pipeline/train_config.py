"""What a job file may say about a training run: how cells reach the workers, how they step, what is kept.

The stage's own sections (`pipeline.job`) hold one of these under `train`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from scldm.config import StrictModel
from scldm.flow.config import EMAConfig
from scldm.genes_seen import GenesSeenConfig
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


class TrainConfig(StrictModel):
    """A training run. Also the place for what DeepSpeed is told."""

    max_steps: PositiveInt = 600
    """Optimizer steps."""
    feed: FeedConfig = FeedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
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
    log_every_seconds: PositiveFloat = 5.0
    """Seconds between progress lines."""
    max_failures: int = Field(3, ge=0)
    """Worker failures survived before the job gives up."""


class VaeTrainConfig(TrainConfig):
    genes_per_step: PositiveInt | None = None
    """Genes scored in a training step, drawn by expression; the loss stays an estimate of the full one. Null: all."""
    genes_seen: GenesSeenConfig = GenesSeenConfig()
    """Genes that the encoder sees of a cell in training, drawn anew for every cell in every epoch by (seed, epoch). All
    genes are scored, whichever are seen. Validation and encode see all expressed genes whatever is set here: a latent
    must not depend on a draw, and what validation scores is then what encode makes. weighted draws by the gene means of
    ingest; one that no training cell expresses is taken for as rare as the rarest that is."""

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
    ema: EMAConfig = EMAConfig()
