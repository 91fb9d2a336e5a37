"""The transformer VAE of scLDM (Palla et al., arXiv 2511.02986): a set of gene counts to latent tokens and back.

Shape letters: b cells, g genes, m latent tokens, e latent width, d model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scldm.data.batch import CellBatch
from scldm.nn.config import VAEConfig
from scldm.nn.decoder import Decoder
from scldm.nn.encoder import Encoder
from scldm.nn.likelihood import GeneSample, nb_nll, squared_error

# Small, so that an untrained model is near the mean profile: with 1 it took a fifth of the training to get there.
EMBEDDING_STD = 0.05
THETA_START = 10.0  # nearly a Poisson at the counts of single cells


@dataclass(frozen=True)
class CountDistribution:
    """Negative binomial over the genes of b cells."""

    mu: Tensor  # (b, g) mean counts; sums to the library size over all genes
    theta: Tensor  # (g,) or (b, g) inverse dispersion


@dataclass(frozen=True)
class ExpressionDistribution:
    """Gaussian of unit variance over log1p(counts per 10,000) of the genes of b cells."""

    mu: Tensor  # (b, g)


class VAE(nn.Module):
    """Transformer VAE: deterministic encoder, negative-binomial decoder, no KL term.

    Args:
        config: Settings of the network.
        n_genes: Size of the gene vocabulary.
    """

    def __init__(self, config: VAEConfig, *, n_genes: int):
        super().__init__()
        self.config, self.n_genes = config, n_genes
        self.gene_embedding = nn.Parameter(EMBEDDING_STD * torch.randn(n_genes, config.d_model))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, n_outputs=2 if config.head == "nb_cell" else 1)
        self.decoder_embedding = (
            None
            if config.shared_embedding
            else nn.Parameter(EMBEDDING_STD * torch.randn(n_genes, config.for_decoder().d_model))
        )
        self.log_theta = nn.Parameter(torch.zeros(n_genes)) if config.head == "nb_shared" else None
        self.gene_bias = nn.Parameter(torch.zeros(n_genes)) if config.gene_bias else None

    @torch.no_grad()
    def start_at(self, mean: Tensor) -> None:
        """Initialise a model with `gene_bias` at the mean profile of the training cells.

        A gene that no training cell expresses starts at a tenth of the rarest one, not at minus infinity. theta starts
        at THETA_START for all: the spread of a marker gene between types is for the latents to explain, and taken for
        dispersion at the start it would hide the gene from them. After training, theta is fitted
        (`dispersion.fit_theta`).

        Args:
            mean: Mean count of each gene over the training cells, (g,).
        """
        if mean.shape != (self.n_genes,):
            raise ValueError(f"mean must be ({self.n_genes},); got {tuple(mean.shape)}")
        if self.gene_bias is None:
            return
        self.gene_bias.copy_((mean.clamp(min=mean[mean > 0].min() / 10) / mean.sum()).log())
        if self.log_theta is not None:
            self.log_theta.fill_(math.log(THETA_START))

    def encode(self, cells: CellBatch) -> Tensor:
        """Return the latents of cells, (b, m, e)."""
        return self.encoder(cells, self.gene_embedding)

    def decode(
        self,
        z: Tensor,
        library_size: Tensor,
        *,
        genes: Tensor | None = None,
        condition: Tensor | None = None,
        measured: Tensor | None = None,
        tile: int | None = None,
    ) -> CountDistribution | ExpressionDistribution:
        """Return the distribution of the counts of genes; of their expression, for a Gaussian head.

        Args:
            z: Latents, (b, m, e).
            library_size: Sum of counts over the requested genes, (b,).
            genes: Ids of the requested genes, (p,), or (b, p) for a panel per cell; all if None. Proportions are over
                the requested genes.
            condition: (b, d), for an adaLN decoder.
            measured: Requested genes that were measured in each cell, (b, p) bool; proportions are over them, and the
                mean of the others is 0. All if None.
        """
        self._check_latents(z, library_size)
        out = self._outputs(z, genes, condition, tile)
        if self.config.head == "gaussian":
            return ExpressionDistribution(_only(measured, out[..., 0], 0.0))
        log_proportion = _only(measured, self._logits(out, genes), -torch.inf).log_softmax(1)
        return CountDistribution(log_proportion.exp() * library_size[:, None], self._theta(out, genes))

    def decode_mu(self, z: Tensor, library_size: Tensor, *, measured: Tensor | None = None) -> Tensor:
        """Return the mean counts, (b, g); for a Gaussian head the mean of log1p(counts per 10,000)."""
        return self.decode(z, library_size, measured=measured).mu

    def nll(
        self,
        cells: CellBatch,
        z: Tensor,
        *,
        sample: GeneSample | None = None,
        condition: Tensor | None = None,
        tile: int | None = None,
    ) -> Tensor:
        """Return the negative log-likelihood of the cells' counts in nats, summed over genes, (b,).

        If `cells.measured` is given, the genes that a cell's data set did not measure are left out of its softmax and
        of its sum: they are unknown, not zero.

        For a Gaussian head this is upstream's loss, the squared error of log1p(counts per 10,000): twice the negative
        log-likelihood of a unit Gaussian, up to a constant.
        """
        self._check_latents(z, cells.library_size)
        genes = None if sample is None else sample.gene_ids
        out = self._outputs(z, genes, condition, tile)
        measured = cells.measured if cells.measured is None or genes is None else cells.measured[:, genes]
        if self.config.head == "gaussian":
            return squared_error(cells, _only(measured, out[..., 0], 0.0), sample)
        logits = _only(measured, self._logits(out, genes), -torch.inf)
        if sample is None:
            log_proportion = logits.log_softmax(1)
        else:  # a sampled gene stands for 1 / probability genes like it in the normaliser
            weighted = logits + sample.weight.to(logits.dtype).log()
            total = weighted.logsumexp(1, keepdim=True)
            if measured is not None:  # a cell of which no drawn gene was measured adds nothing
                total = total.masked_fill(total == -torch.inf, 0.0)
            log_proportion = logits - total
        return nb_nll(cells, log_proportion, self._theta(out, genes), sample)

    def forward(
        self,
        cells: CellBatch,
        sample: GeneSample | None = None,
        seen: CellBatch | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return the negative log-likelihood per cell, (b,): the training objective before the mean over cells.

        Args:
            cells: Cells to score.
            sample: Genes that are scored; all if None.
            seen: The same cells with the genes that the encoder sees; `cells` if None.
            condition: (b, d), for an adaLN decoder.
        """
        return self.nll(cells, self.encode(cells if seen is None else seen), sample=sample, condition=condition)

    def _outputs(self, z: Tensor, genes: Tensor | None, condition: Tensor | None, tile: int | None) -> Tensor:
        """Return the decoder's numbers, (b, g, r), in at least fp32."""
        embedding = self.gene_embedding if self.decoder_embedding is None else self.decoder_embedding
        out = self.decoder(z, embedding if genes is None else embedding[genes], condition=condition, tile=tile)
        return out if out.dtype == torch.float64 else out.float()

    def _logits(self, out: Tensor, genes: Tensor | None) -> Tensor:
        logits = out[..., 0]
        if self.gene_bias is not None:
            logits = logits + (self.gene_bias if genes is None else self.gene_bias[genes])
        return logits / self.config.temperature

    def _theta(self, out: Tensor, genes: Tensor | None) -> Tensor:
        if self.log_theta is None:
            return out[..., 1].exp()
        return (self.log_theta if genes is None else self.log_theta[genes]).to(out.dtype).exp()

    def _check_latents(self, z: Tensor, library_size: Tensor) -> None:
        m, e = self.config.n_latent_tokens, self.config.latent_width
        if z.ndim != 3 or z.shape[1:] != (m, e):
            raise ValueError(
                f"z must be (b, {m}, {e}), the model's n_latent_tokens and latent_width; got {tuple(z.shape)}"
            )
        if library_size.shape != z.shape[:1]:
            raise ValueError(f"library_size must be ({len(z)},), one per cell of z; got {tuple(library_size.shape)}")


def _only(measured: Tensor | None, values: Tensor, otherwise: float) -> Tensor:
    return values if measured is None else values.masked_fill(~measured, otherwise)
