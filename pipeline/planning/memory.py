"""Compute the memory of a training worker for every ZeRO stage, and which A100 has enough.

State is counted as DeepSpeed keeps it, all of it in fp32: weights, gradients, Adam's two moments and, from stage 1 on,
a copy of the weights of a shard, partitioned over the workers according to the ZeRO stage. The average of the weights
is complete on every worker. Activations are what the backward pass keeps: nothing of size b x g x d, because the
decoder recomputes its tiles. They are right within a factor of 2 (a test measures small models on a CPU, with the
decoder as on a GPU). Shape letters: b cells of a micro batch, g genes scored, s expressed genes, m latent tokens, d
model width, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.deepspeed import gradient_bucket
from pipeline.config.train import FlowTrainConfig, TrainConfig
from scldm.nn.config import DiTConfig, VAEConfig

TILE = 512  # genes that the decoder computes at a time
GPU_OVERHEAD = 1.5e9  # CUDA context, NCCL's buffers, workspaces; a round figure
DEVICES = {"A100 40 GB": 42.3e9, "A100 80 GB": 85.0e9}  # bytes that the driver shows
USABLE = 0.9  # the allocator's fragments take the rest
STAGES = (0, 1, 2, 3)
# Numbers kept for a token of a block, in units of d: norms and their inputs, q k v, attention, SwiGLU's hidden ones.
# Attention weights are not kept: torch's attention recomputes them.
BLOCK_WIDTHS = 26
GENE_COPIES = 7  # b x g numbers that likelihood and softmax keep or make, in fp32


@dataclass(frozen=True)
class StateBytes:
    """Bytes of state on one worker."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    offloaded: float = 0.0  # in the memory of the host instead

    @property
    def device(self) -> float:
        """Bytes on the GPU."""
        return self.weights + self.gradients + self.optimizer + self.average


def state_bytes(n: int, train: TrainConfig, workers: int, *, stage: int | None = None) -> StateBytes:
    """Return the state of one worker.

    Args:
        n: Number of parameters.
        stage: ZeRO stage; the one in `train` if None.
    """
    stage = train.zero_stage if stage is None else stage
    share = lambda from_stage: 1 / workers if stage >= from_stage else 1.0  # noqa: E731
    moments = n * (12 if stage > 0 else 8) * share(1)  # shards have a copy of their weights beside the two moments
    offload = train.offload_optimizer == "cpu" and stage > 0
    # The average needs complete weights, which stage 3 gathers to update and to validate it.
    average = 4.0 * n + (4 * n if stage == 3 else 0) if isinstance(train, FlowTrainConfig) else 0.0
    return StateBytes(
        weights=4 * n * share(3),
        gradients=4 * n * share(2),
        optimizer=0.0 if offload else moments,
        average=average,
        offloaded=moments if offload else 0.0,
    )


def vae_activations(config: VAEConfig, train: TrainConfig, *, cells: int, n_genes: int, expressed: float) -> float:
    """Return the bytes of activations at the peak of a training step of the VAE.

    Args:
        cells: Cells of a micro batch.
        n_genes: Genes that are scored: `train.genes_per_step`, or all.
        expressed: Mean expressed genes of a cell.
    """
    width = 2 if train.precision == "bf16" else 4
    m, decoder = config.n_latent_tokens, config.for_decoder()
    blocks = sum(side.n_layers * _block_numbers(side.d_model, m) for side in (config, decoder))
    # Indices, counts, and a few numbers per head and token.
    pooling = expressed * (4 + 3 * config.n_heads_cross) + 8 * m * config.d_model
    d, h = decoder.d_model, decoder.n_heads_cross
    outputs = n_genes * (GENE_COPIES + (2 if config.head == "nb_cell" else 0))
    hidden = 8 * d / 3
    tile = min(TILE, n_genes) * (6 * d + 4 * hidden + 2 * m * h)  # recomputed in the backward pass, one tile at a time
    tables = 3 * n_genes * (config.d_model + d)  # per-gene queries, keys and values, once per micro batch
    return cells * (width * (blocks + tile) + 4 * (outputs + pooling)) + width * tables


def dit_activations(
    config: DiTConfig, train: TrainConfig, *, cells: int, n_latent_tokens: int, latent_width: int
) -> float:
    """Return the bytes of activations at the peak of a training step of the flow."""
    width = 2 if train.precision == "bf16" else 4
    d, m = config.d_model, n_latent_tokens
    per_cell = config.n_layers * (_block_numbers(d, m) + 12 * d) + 8 * m * (d + latent_width)
    return cells * width * per_cell


def _block_numbers(d: int, m: int) -> float:
    return BLOCK_WIDTHS * m * d


def fits(total: float) -> list[str]:
    """Return the devices that can hold `total` bytes."""
    return [name for name, size in DEVICES.items() if total <= USABLE * size]


def stage_lines(n: int, train: TrainConfig, workers: int, activations: float) -> list[str]:
    """Return a line for each ZeRO stage: memory per GPU, and which A100 has enough."""
    from pipeline.core.text import human

    lines = []
    for stage in STAGES:
        state = state_bytes(n, train, workers, stage=stage)
        fixed = GPU_OVERHEAD + (0 if stage == 0 else gradient_bucket(n) * 4)
        total = state.device + activations + fixed
        held = ", ".join(fits(total)) or "no A100: lower train.feed.micro_batch_size, or take more workers"
        host = f", {human(state.offloaded)} of the host's" if state.offloaded else ""
        mark = "  <- this job" if stage == train.zero_stage else ""
        lines.append(
            f"  ZeRO {stage}: {human(total)} per GPU (state {human(state.device)}, activations {human(activations)}, "
            f"CUDA and buckets {human(fixed)}){host}; fits {held}{mark}"
        )
    return lines
