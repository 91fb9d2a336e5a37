"""Count the kernels that a GPU is asked to start in a step: what a small model's step waits for, whatever it computes.

The numbers are counts of torch's operations that start a kernel, of models with one to eight blocks, which fall on a
line (a test counts them again). They are those of the forms on a GPU, of eager execution, forward and backward pass;
the optimizer's fused kernels are few beside them. Products in bf16 take more, for the casts around them.
`train.compile` lowers them by an amount that no GPU has shown yet.

Shape letters: b cells of a micro batch, g genes scored.
"""

from __future__ import annotations

from dataclasses import dataclass

from scldm.nn.config import DiTConfig, VAEConfig

A100_BYTES = int(42.3e9)  # decides the genes of the decoder's tiles; as the driver shows an A100 of 40 GB


@dataclass(frozen=True)
class Launches:
    """Kernels of one pass: of the whole, and what each block and each tile of genes adds."""

    fixed: float
    block: float
    tile: float = 0.0

    def total(self, blocks: float, tiles: int = 0) -> float:
        return self.fixed + self.block * blocks + self.tile * tiles


# By whether products are cast to bf16. A block of the VAE's: one of the encoder or of the decoder.
VAE_TRAINING = {False: Launches(195, 32, 59), True: Launches(275, 46, 69)}
ENCODE = {False: Launches(55, 12), True: Launches(78, 20)}
DECODE = {False: Launches(13, 12, 12), True: Launches(24, 17, 15)}
DIT_TRAINING = {False: Launches(73, 66), True: Launches(104, 100)}
DIT_EVALUATION = {False: Launches(27, 17), True: Launches(41, 30)}


def vae_step_launches(config: VAEConfig, *, cells: int, n_genes: int, precision: str) -> float:
    """Return the launches of a micro batch of the VAE's training.

    Args:
        cells: b.
        n_genes: g.
    """
    blocks = config.n_layers + config.for_decoder().n_layers
    tiles = _tiles(config, cells=cells, n_genes=n_genes)
    return VAE_TRAINING[precision == "bf16"].total(blocks, tiles)


def encode_launches(config: VAEConfig, *, precision: str) -> float:
    """Return the launches of encoding a batch."""
    return ENCODE[precision == "bf16"].total(config.n_layers)


def dit_step_launches(config: DiTConfig, *, precision: str) -> float:
    """Return the launches of a micro batch of the flow's training."""
    return DIT_TRAINING[precision == "bf16"].total(config.n_layers)


def generate_launches(
    flow: DiTConfig, vae: VAEConfig, *, evaluations: int, cells: int, n_genes: int, precision: str
) -> float:
    """Return the launches of generating b cells: evaluations of the network, then one decoding of all genes."""
    bf16 = precision == "bf16"
    tiles = _tiles(vae, cells=cells, n_genes=n_genes)
    decode = DECODE[bf16].total(vae.for_decoder().n_layers, tiles)
    return evaluations * DIT_EVALUATION[bf16].total(flow.n_layers) + decode


def _tiles(config: VAEConfig, *, cells: int, n_genes: int) -> int:
    from scldm.nn.decoder import device_tile  # loads torch, as counting parameters does

    return -(-n_genes // device_tile(cells, d_model=config.for_decoder().d_model, memory=A100_BYTES))
