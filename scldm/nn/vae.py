"""The transformer VAE of scLDM (Palla et al., arXiv 2511.02986): a set of gene counts to latent tokens and back.

Shape letters: b cells, g genes, m latent tokens, e latent width, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scldm.batch import CellBatch
from scldm.nn.config import VAEConfig
from scldm.nn.decoder import Decoder
from scldm.nn.encoder import Encoder
from scldm.nn.likelihood import GeneSample, nb_nll

# Small, so that an untrained model is near the mean profile: with 1, a fifth of the training went by before it left it.
EMBEDDING_STD = 0.05


@dataclass(frozen=True)
class CountDistribution:
    """Negative binomial over the genes of b cells."""

    mu: Tensor  # (b, g) mean counts; sums to the library size over all genes
    theta: Tensor  # (g,) or (b, g) inverse dispersion


class VAE(nn.Module):
    """Deterministic encoder, negative-binomial decoder, no KL term.

    Args:
        config: Choices.
        n_genes: Size of the gene vocabulary.
    """

    def __init__(self, config: VAEConfig, *, n_genes: int):
        super().__init__()
        self.config, self.n_genes = config, n_genes
        self.gene_embedding = nn.Parameter(EMBEDDING_STD * torch.randn(n_genes, config.d_model))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, n_outputs=1 if config.head == "nb_shared" else 2)
        self.decoder_embedding = (
            None if config.shared_embedding else nn.Parameter(EMBEDDING_STD * torch.randn(n_genes, config.d_model))
        )
        self.log_theta = nn.Parameter(torch.zeros(n_genes)) if config.head == "nb_shared" else None
        self.gene_bias = nn.Parameter(torch.zeros(n_genes)) if config.gene_bias else None

    @torch.no_grad()
    def start_at(self, mean: Tensor, variance: Tensor) -> None:
        """Let an untrained model of ours (`gene_bias`) begin at the mean profile and dispersion of the training cells.

        A gene that no training cell expresses starts at a tenth of the rarest one, not at minus infinity. theta comes
        by moments, within [0.1, 100].

        Args:
            mean: Mean count of each gene over the training cells, (g,).
            variance: Variance of the same, (g,).
        """
        if mean.shape != (self.n_genes,) or variance.shape != mean.shape:
            raise ValueError(
                f"mean and variance must be ({self.n_genes},); got {tuple(mean.shape)}, {tuple(variance.shape)}"
            )
        if self.gene_bias is None:
            return
        self.gene_bias.copy_((mean.clamp(min=mean[mean > 0].min() / 10) / mean.sum()).log())
        if self.log_theta is not None:
            theta = mean.square() / (variance - mean).clamp(min=1e-6)
            self.log_theta.copy_(theta.clamp(0.1, 100).log())

    def encode(self, cells: CellBatch) -> Tensor:
        """Latents, (b, m, e)."""
        return self.encoder(cells, self.gene_embedding)

    def decode(self, z: Tensor, library_size: Tensor, *, tile: int | None = None) -> CountDistribution:
        """Distribution of the counts of all genes, given latents (b, m, e) and library sizes (b,)."""
        log_proportion, theta = self._decode(z, None, tile)
        return CountDistribution(log_proportion.exp() * library_size[:, None], theta)

    def decode_mu(self, z: Tensor, library_size: Tensor) -> Tensor:
        """Mean counts, (b, g)."""
        return self.decode(z, library_size).mu

    def nll(self, cells: CellBatch, z: Tensor, *, sample: GeneSample | None = None, tile: int | None = None) -> Tensor:
        """Negative log-likelihood of the cells' counts in nats, summed over genes, (b,)."""
        log_proportion, theta = self._decode(z, sample, tile)
        return nb_nll(cells, log_proportion, theta, sample)

    def forward(self, cells: CellBatch, sample: GeneSample | None = None, seen: CellBatch | None = None) -> Tensor:
        """Negative log-likelihood per cell, (b,): the training objective before the mean over cells.

        Args:
            cells: What is scored.
            sample: Genes that are scored; all if None.
            seen: What the encoder is shown of the same cells; all of it if None.
        """
        return self.nll(cells, self.encode(cells if seen is None else seen), sample=sample)

    def _decode(self, z: Tensor, sample: GeneSample | None, tile: int | None) -> tuple[Tensor, Tensor]:
        """Log proportions (b, s) and theta (s,) or (b, s), in fp32, of all genes or of a sample of them."""
        embedding = self.gene_embedding if self.decoder_embedding is None else self.decoder_embedding
        log_theta, gene_bias = self.log_theta, self.gene_bias
        if sample is not None:
            embedding = embedding[sample.gene_ids]
            log_theta = None if log_theta is None else log_theta[sample.gene_ids]
            gene_bias = None if gene_bias is None else gene_bias[sample.gene_ids]
        out = self.decoder(z, embedding, tile=tile)
        out = out if out.dtype == torch.float64 else out.float()
        logits = out[..., 0] if gene_bias is None else out[..., 0] + gene_bias
        logits = logits / self.config.temperature
        # A sampled gene stands for 1 / probability genes like it in the normaliser.
        weighted = logits if sample is None else logits + sample.weight.to(logits.dtype).log()
        log_proportion = logits - weighted.logsumexp(1, keepdim=True)
        theta = out[..., 1].exp() if log_theta is None else log_theta.to(logits.dtype).exp()
        return log_proportion, theta
