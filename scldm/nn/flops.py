"""Count the arithmetic of a model by formula, for the share of a device's peak that a run uses (MFU).

Only matrix products are counted, two operations for a multiply and an add; training is three times the forward pass.
What the decoder recomputes in its backward pass is not counted: it is an implementation choice, not the model's.

Shape letters: g genes that are scored, s expressed genes, m latent tokens, d model width.
"""

from __future__ import annotations

from scldm.nn.config import DiTConfig, VAEConfig

TRAINING = 3  # forward, and two products for each in the backward pass


def vae_flops(config: VAEConfig, *, n_genes: int, expressed: float) -> float:
    """Return the operations of a VAE's forward pass for one cell.

    Args:
        n_genes: Genes that are scored: `train.genes_per_step`, or all.
        expressed: Mean expressed genes of a cell.
    """
    return encoder_flops(config, expressed=expressed) + decoder_flops(config, n_genes=n_genes)


def encoder_flops(config: VAEConfig, *, expressed: float) -> float:
    """Return the operations of encoding one cell.

    Args:
        expressed: Mean expressed genes of a cell.
    """
    d, m = config.d_model, config.n_latent_tokens
    hidden = _hidden(d, config.multiple_of)
    pooling = expressed * 4 * m * d + m * (4 * d * d + 6 * d * hidden)
    return pooling + config.n_layers * _block(d, m, hidden) + 2 * m * d * config.latent_width


def decoder_flops(config: VAEConfig, *, n_genes: int) -> float:
    """Return the operations of decoding genes of one cell.

    Args:
        n_genes: Genes that are decoded.
    """
    config, m = config.for_decoder(), config.n_latent_tokens
    d, hidden = config.d_model, _hidden(config.d_model, config.multiple_of)
    gene = 4 * m * d + 2 * d * d + 4 * d * hidden + 2 * (d + hidden)  # attention, its projection, SwiGLU folded in head
    return config.n_layers * _block(d, m, hidden) + n_genes * gene + 2 * m * d * config.latent_width


def dit_flops(config: DiTConfig, *, n_latent_tokens: int, latent_width: int) -> float:
    """Return the operations of a DiT's forward pass for one cell."""
    d, m = config.d_model, n_latent_tokens
    conditioning = 12 * d * d  # adaLN of a block, once per cell
    blocks = config.n_layers * (_block(d, m, _hidden(d, config.multiple_of)) + conditioning)
    return blocks + 4 * m * d * latent_width + 2 * (256 * d + d * d) + 4 * d * d


def _block(d: int, m: int, hidden: int) -> float:
    """Return the operations of a self-attention block on m tokens: four projections, attention, SwiGLU."""
    return m * (8 * d * d + 6 * d * hidden) + 4 * m * m * d


def _hidden(d: int, multiple_of: int) -> int:
    return -(-(8 * d // 3) // multiple_of) * multiple_of
