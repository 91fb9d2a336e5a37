"""Negative binomial likelihood of counts, given proportions of genes and the library size of a cell.

mu = softmax over genes (logit / temperature) * library_size, theta the inverse dispersion: Var = mu + mu^2 / theta.
Terms with gamma functions are needed at non-zero counts only; for a zero count log p = theta (log theta - log(theta +
mu)). EPS is upstream's, inside every logarithm.

Shape letters: b cells, g genes, n non-zero entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scldm.data.batch import CellBatch
from scldm.nn.kernels.nb_sparse import EPS, sparse_nb_nll
from scldm.nn.kernels.precision import whole_products


def nb_log_prob(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Return the log-probability of counts, elementwise; the plain formula, and the reference of the sparse one."""
    log_theta_mu = (theta + mu + EPS).log()
    return (
        theta * ((theta + EPS).log() - log_theta_mu)
        + x * ((mu + EPS).log() - log_theta_mu)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )


@dataclass(frozen=True)
class GeneSample:
    """Genes that are scored in a step, and their weights (1 / probability of being drawn)."""

    gene_ids: Tensor  # (s,) int64, sorted
    weight: Tensor  # (s,)
    position: Tensor  # (g,) int64: place in gene_ids, -1 where the gene is not scored


def sample_genes(probability: Tensor, generator: torch.Generator) -> GeneSample:
    """Draw each gene independently with its probability (Poisson sampling).

    Weighted by 1 / probability, sums over genes stay unbiased (Horvitz and Thompson 1952); genes of probability 1 are
    always in, so the normaliser of the softmax, which the highly expressed genes carry, hardly moves.
    """
    drawn = torch.rand(len(probability), generator=generator).to(probability.device) < probability
    gene_ids = drawn.nonzero().squeeze(1)
    position = torch.full_like(probability, -1, dtype=torch.int64)
    position[gene_ids] = torch.arange(len(gene_ids), device=gene_ids.device)
    return GeneSample(gene_ids, 1 / probability[gene_ids], position)


def gene_probabilities(mean_counts: Tensor, n_genes: int) -> Tensor:
    """Return each gene's probability of being scored, (g,).

    Proportional to the root of its mean count, at most 1, and n_genes in sum.

    Args:
        mean_counts: Mean count of each gene in the training cells, (g,).
        n_genes: Expected number of genes in a sample.
    """
    if n_genes >= len(mean_counts):
        return torch.ones_like(mean_counts)
    size = mean_counts.double().sqrt() + 1e-3
    low, high = 0.0, float(n_genes / size.min())
    for _ in range(80):  # bisection: the sum of min(1, scale * size) grows with the scale
        scale = (low + high) / 2
        low, high = (scale, high) if (scale * size).clamp(max=1).sum() < n_genes else (low, scale)
    return (high * size).clamp(max=1).to(mean_counts.dtype)


def nb_nll(cells: CellBatch, log_proportion: Tensor, theta: Tensor, sample: GeneSample | None = None) -> Tensor:
    """Return the negative log-likelihood in nats, summed over genes: (b,).

    Args:
        cells: Counts.
        log_proportion: Log of each gene's share of the cell, (b, s): all genes, or those of `sample`. Minus infinity
            leaves a gene out: its term and its gradient are zero, exactly.
        theta: Inverse dispersion, (s,) or (b, s).
        sample: If given, the genes that the columns stand for; the sum is then an estimate of the sum over all genes.
    """
    cell, column, counts = scored_entries(cells, sample, log_proportion.dtype)
    with whole_products(counts):  # sums over genes stay in their precision
        return sparse_nb_nll(
            log_proportion,
            theta,
            library_size=cells.library_size.to(log_proportion.dtype),
            weight=None if sample is None else sample.weight.to(log_proportion.dtype),
            cell=cell,
            column=column,
            counts=counts,
        )


def squared_error(cells: CellBatch, mu: Tensor, sample: GeneSample | None = None) -> Tensor:
    """Return the squared error of log1p(counts per 10,000), summed over genes: (b,).

    Arguments as in `nb_nll`; mu is (b, s).
    """
    cell, column, counts = scored_entries(cells, sample, mu.dtype)
    y = (counts / cells.library_size.to(mu.dtype)[cell] * 10_000).log1p()
    extra = y * (y - 2 * mu[cell, column])  # (y - mu)^2 - mu^2
    if sample is None:
        return mu.square().sum(1).index_add(0, cell, extra)
    weight = sample.weight.to(mu.dtype)
    with whole_products(mu):
        return (mu.square() @ weight).index_add(0, cell, extra * weight[column])


def scored_entries(
    cells: CellBatch, sample: GeneSample | None, dtype: torch.dtype, *, all_stay: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cell, column and count of the entries whose genes are scored: sampled, and measured.

    Args:
        all_stay: Whether the others stay with a count of 0, which adds exactly nothing. So it is on an accelerator,
            where the host would have to wait to learn how many are left, unless given.
    """
    cell, column, counts = cells.cell_index, cells.gene_ids, cells.counts.to(dtype)
    scored = None if cells.measured is None else cells.measured[cell, column]
    if sample is not None:
        column = sample.position[column]
        drawn = column >= 0
        scored = drawn if scored is None else scored & drawn
    if scored is None:
        return cell, column, counts
    if counts.is_cuda if all_stay is None else all_stay:
        return cell, column.clamp(min=0), counts * scored
    return cell[scored], column[scored], counts[scored]
