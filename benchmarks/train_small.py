"""Train one small VAE on cells in memory, and score it on cells it has not seen.

All randomness comes from keys (`scldm.random.generator`) and a forked torch seed: a run is a function of its arguments.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm.data.batch import CellBatch
from scldm.metrics.genes.expression import gene_moments
from scldm.metrics.genes.reconstruction import reconstruction_scores
from scldm.nn.config import VAEConfig
from scldm.nn.vae import VAE
from scldm.optim.config import OptimizerConfig
from scldm.optim.schedule import learning_rate_factor
from scldm.random import generator

SPLIT, ORDER = 1, 2  # streams of randomness
SHARES = (0.7, 0.1)  # training, validation; the rest is held out


@dataclass(frozen=True)
class Parts:
    """Counts of the chosen genes, (n, g) CSR each."""

    train: sp.csr_matrix
    validation: sp.csr_matrix
    held_out: sp.csr_matrix


@dataclass(frozen=True)
class Training:
    """What is the same for all that are compared."""

    steps: int
    batch_size: int
    optimizer: OptimizerConfig


@dataclass(frozen=True)
class Score:
    nll: np.ndarray  # (n,) nats per cell, summed over genes
    gene_pearson: float  # mean over genes; decoded means against counts, in log1p CP10k


def read_counts(path: Path) -> sp.csr_matrix:
    import anndata

    return sp.csr_matrix(anndata.read_h5ad(path).X)


def split_cells(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of training, validation and held-out cells."""
    order = torch.randperm(n, generator=generator(seed, SPLIT)).numpy()
    stops = np.cumsum([int(share * n) for share in SHARES])
    train, validation, held_out = np.split(order, stops)
    return train, validation, held_out


def split_counts(counts: sp.csr_matrix, *, n_genes: int, seed: int) -> Parts:
    """Split cells, and keep the genes of highest variance in log1p CP10k over the training cells."""
    rows = split_cells(counts.shape[0], seed)
    variance = gene_moments([counts[rows[0]]]).variance
    genes = np.sort(np.argsort(-variance, kind="stable")[:n_genes])
    parts = Parts(*(counts[of_part][:, genes] for of_part in rows))
    for part in (parts.train, parts.validation, parts.held_out):
        if (np.diff(part.indptr) == 0).any():
            raise ValueError(f"a cell has no counts in the {n_genes} genes of highest variance: choose more genes")
    return parts


def to_batch(counts: sp.csr_matrix) -> CellBatch:
    return CellBatch.from_dense(torch.from_numpy(counts.toarray()).float())


def build(config: VAEConfig, train: sp.csr_matrix, seed: int) -> VAE:
    """A VAE at the mean profile of the training cells; inputs of one seed share every weight that they have in common.

    Modules are built in order, so that an input with weights of its own would shift the draws of those after it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VAE(config, n_genes=train.shape[1])
        torch.manual_seed(seed)
        bare = VAE(config.model_copy(update={"input": "log1p"}), n_genes=train.shape[1])
    vae.load_state_dict(bare.state_dict(), strict=False)
    moments = gene_moments([train], log_normalise=False)
    vae.start_at(torch.from_numpy(moments.mean).float())
    return vae


def batches(n: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Rows without end: each epoch is a permutation of its own, and drops what does not fill a batch."""
    epoch = 0
    while True:
        order = torch.randperm(n, generator=generator(seed, ORDER, epoch))
        yield from order[: n - n % batch_size].split(batch_size)
        epoch += 1


def train(config: VAEConfig, counts: sp.csr_matrix, training: Training, seed: int) -> VAE:
    """AdamW with the repository's schedule; mean negative log-likelihood over all genes."""
    if counts.shape[0] < training.batch_size:
        raise ValueError(f"batch_size ({training.batch_size}) must be at most the training cells ({counts.shape[0]})")
    vae, o = build(config, counts, seed), training.optimizer
    optimizer = torch.optim.AdamW(vae.parameters(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True)
    rows = batches(counts.shape[0], training.batch_size, seed)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = o.lr * learning_rate_factor(step, training.steps, o)
        optimizer.zero_grad()
        vae(to_batch(counts[next(rows).numpy()])).mean().backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), o.clip)
        optimizer.step()
    return vae


@torch.inference_mode()
def score(vae: VAE, counts: sp.csr_matrix, *, batch_size: int = 128) -> Score:
    """Likelihood and decoded means of cells."""
    nll, mu = [], []
    for start in range(0, counts.shape[0], batch_size):
        cells = to_batch(counts[start : start + batch_size])
        z = vae.encode(cells)
        nll.append(vae.nll(cells, z).double().numpy())
        mu.append(vae.decode_mu(z, cells.library_size).numpy())
    of_cells = np.concatenate(nll)
    return Score(of_cells, reconstruction_scores(counts, np.concatenate(mu), of_cells).gene_pearson)
