"""Negative log-likelihood of sparse counts under the negative binomial, with a backward pass written by hand.

    -sum_g w_g [ theta (log(theta + e) - log(theta + mu + e))                                  every gene
                 + x (log(mu + e) - log(theta + mu + e))                                       where x > 0
                 + lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) ]                         where x > 0

with mu = proportion * library size. Kept for the backward pass are the inputs alone; autograd keeps a dozen tensors of
their size. The plain formula is `scldm.nn.likelihood.nb_log_prob`; tests hold the two together.

Shape letters: b cells, s scored genes, n entries with a count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-8  # upstream's, inside every logarithm


def sparse_nb_nll(
    log_proportion: Tensor,
    theta: Tensor,
    *,
    library_size: Tensor,
    weight: Tensor | None,
    cell: Tensor,
    column: Tensor,
    counts: Tensor,
) -> Tensor:
    """Return the negative log-likelihood per cell in nats, (b,).

    Args:
        log_proportion: (b, s).
        theta: (s,) or (b, s).
        library_size: (b,).
        weight: Weight of each gene, (s,); 1 if None.
        cell, column: Positions of the counts, (n,) each; a position occurs at most once.
        counts: (n,), >= 0.
    """
    return _NegativeBinomial.apply(log_proportion, theta, library_size, weight, cell, column, counts)


class _NegativeBinomial(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        log_proportion: Tensor,
        theta: Tensor,
        library_size: Tensor,
        weight: Tensor | None,
        cell: Tensor,
        column: Tensor,
        x: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(log_proportion, theta, library_size, weight, cell, column, x)
        mu = log_proportion.exp().mul_(library_size[:, None])
        log_total = (mu + (theta + EPS)).log_()
        per_gene = ((theta + EPS).log() - log_total).mul_(theta)
        total = per_gene.sum(1) if weight is None else per_gene @ weight
        mu_x, theta_x = mu[cell, column], _at(theta, cell, column)
        entries = x * ((mu_x + EPS).log() - log_total[cell, column])
        entries += torch.lgamma(x + theta_x) - torch.lgamma(theta_x) - torch.lgamma(x + 1)
        if weight is not None:
            entries *= weight[column]
        return total.index_add_(0, cell, entries).neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_proportion, theta, library_size, weight, cell, column, x = ctx.saved_tensors
        mu = log_proportion.exp().mul_(library_size[:, None])
        total = mu + (theta + EPS)
        mu_x, total_x, theta_x = mu[cell, column], total[cell, column], _at(theta, cell, column)
        grad_x = grad[cell] if weight is None else grad[cell] * weight[column]

        d_theta = None
        if ctx.needs_input_grad[1]:
            dense = (total / (theta + EPS)).log_() - theta / (theta + EPS) + theta / total
            dense.mul_(grad[:, None])
            if weight is not None:
                dense.mul_(weight)
            entries = grad_x * (x / total_x - torch.digamma(x + theta_x) + torch.digamma(theta_x))
            if theta.ndim == 1:
                d_theta = dense.sum(0).index_add_(0, column, entries)
            else:
                d_theta = dense.index_put_((cell, column), entries, accumulate=True)

        d_log = mu.mul_(theta).div_(total).mul_(grad[:, None])  # mu d/dmu of the terms of every gene
        if weight is not None:
            d_log.mul_(weight)
        entries = grad_x * x * mu_x * (1 / total_x - 1 / (mu_x + EPS))
        d_log.index_put_((cell, column), entries, accumulate=True)
        return d_log, d_theta, None, None, None, None, None


def _at(theta: Tensor, cell: Tensor, column: Tensor) -> Tensor:
    return theta[column] if theta.ndim == 1 else theta[cell, column]
