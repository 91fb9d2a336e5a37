"""An MLP VAE of counts after scVI (Lopez et al. 2018): the baseline that upstream compares its transformer with.

log1p counts go through linear layers, each with batch norm, SiLU and dropout, to a normal latent per cell; a second
such stack and a softmax give proportions of the library size. Unlike the transformer VAE it has a KL term.

Shape letters: b cells, g genes, e latent width, n hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scldm.data.batch import CellBatch
from scldm.nn.config import ScviConfig
from scldm.nn.likelihood import nb_nll
from scldm.nn.vae import CountDistribution


@dataclass(frozen=True)
class NormalLatent:
    """Posterior q(z | cell) of independent normals."""

    loc: Tensor  # (b, e)
    scale: Tensor  # (b, e), > 0

    def sample(self, eps: Tensor) -> Tensor:
        """Return z = loc + scale eps, for standard normal eps (b, e)."""
        return self.loc + self.scale * eps

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log q(z | cell), summed over the latent, (b,)."""
        return torch.distributions.Normal(self.loc, self.scale).log_prob(z).sum(1)


@dataclass(frozen=True)
class ScviLoss:
    """Both terms of the loss per cell, in nats, the KL with its weight."""

    nll: Tensor  # (b,)
    kl: Tensor  # (b,) log q(z) - log p(z) at the z that was drawn

    @property
    def total(self) -> Tensor:
        """Sum of both terms, (b,)."""
        return self.nll + self.kl


class ScviVAE(nn.Module):
    """Maps counts to a normal latent and back to a negative binomial.

    Args:
        config: Settings of the network.
        n_genes: Size of the gene vocabulary, g.
    """

    def __init__(self, config: ScviConfig, *, n_genes: int):
        super().__init__()
        self.config, self.n_genes = config, n_genes
        self.encoder = mlp(n_genes, config)
        self.loc = nn.Linear(config.n_hidden, config.n_latent)
        self.log_scale = nn.Linear(config.n_hidden, config.n_latent)
        of_decoder = config.for_decoder()
        self.decoder = mlp(config.n_latent, of_decoder)
        self.logits = nn.Linear(of_decoder.n_hidden, n_genes)
        # theta = softplus of this
        self.theta: nn.Parameter | nn.Linear = (
            nn.Parameter(torch.zeros(n_genes)) if config.shared_theta else nn.Linear(of_decoder.n_hidden, n_genes)
        )

    def encode(self, cells: CellBatch) -> NormalLatent:
        """Return q(z | cell). Dense inside, (b, g): this is a baseline for data that fit in memory."""
        if len(cells.gene_ids) and int(cells.gene_ids.max()) >= self.n_genes:
            raise ValueError(f"gene id {int(cells.gene_ids.max())} is outside the model's {self.n_genes} genes")
        hidden = self.encoder(cells.dense(self.n_genes).log1p().to(self.loc.weight.dtype))
        return NormalLatent(self.loc(hidden), self.log_scale(hidden).exp())

    def decode(self, z: Tensor, library_size: Tensor) -> CountDistribution:
        """Return the distribution of the counts, given latents (b, e) and library sizes (b,)."""
        log_proportion, theta = self._decoded(z)
        return CountDistribution(log_proportion.exp() * library_size[:, None], theta)

    def loss(self, cells: CellBatch, eps: Tensor) -> ScviLoss:
        """Return the two terms of the negative ELBO, for standard normal draws eps (b, e)."""
        q = self.encode(cells)
        z = q.sample(eps)
        log_proportion, theta = self._decoded(z)
        prior = NormalLatent(torch.zeros_like(z), torch.ones_like(z))
        return ScviLoss(
            nb_nll(cells, log_proportion, theta), self.config.kl_weight * (q.log_prob(z) - prior.log_prob(z))
        )

    def forward(self, cells: CellBatch, generator: torch.Generator) -> Tensor:
        """Return the negative ELBO per cell, (b,), with a latent drawn by the generator."""
        shape = (cells.n_cells, self.config.n_latent)
        weight = self.loc.weight
        eps = torch.randn(shape, generator=generator, device=generator.device, dtype=weight.dtype).to(weight.device)
        return self.loss(cells, eps).total

    def _decoded(self, z: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.decoder(z)
        theta = self.theta(hidden) if isinstance(self.theta, nn.Linear) else self.theta
        return self.logits(hidden).log_softmax(1), F.softplus(theta)


def mlp(n_in: int, config: ScviConfig) -> nn.Sequential:
    """Build the hidden layers of one side; each takes four places in the sequence."""
    layers: list[nn.Module] = []
    for _ in range(config.n_layers):
        layers += [nn.Linear(n_in, config.n_hidden), nn.BatchNorm1d(config.n_hidden), nn.SiLU()]
        layers.append(nn.Dropout(config.dropout))
        n_in = config.n_hidden
    return nn.Sequential(*layers)
