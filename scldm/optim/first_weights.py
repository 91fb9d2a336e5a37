"""First weights of a VAE that are learned from its training cells, in closed form.

With random embeddings the pooling of a cell averages hundreds of unrelated vectors: all cells have nearly the same
tokens, and training first has to find the directions in which they differ. Here

* the embedding of a gene holds its loadings on the principal components of the cells' expression, so that the average
  over a cell's genes is the cell's place among the components;
* the projection of what is pooled is scaled so that it differs between cells by 1;
* what all cells have in common is taken out of the queries that it is added to.

The network and its training are unchanged. How many steps this saves: benchmarks/README.md#convergence.

Shape letters: n cells, g genes, d model width, m latent tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from scipy.linalg import eigh
from torch import Tensor

from scldm.data.batch import CellBatch
from scldm.nn.layers import merge_heads
from scldm.nn.vae import EMBEDDING_STD, VAE

FLOOR = 0.1  # added to a gene's standard deviation, so that genes of few counts do not rule the components
POOLED = 256  # cells that are pooled at a time
ROUNDS = 4  # the queries decide what is pooled, a little: at the fourth they no longer change
SMALLEST = 1e-6  # of an eigenvalue, relative to the largest


@torch.no_grad()
def start_at_components(vae: VAE, cells: Sequence[CellBatch]) -> int:
    """Give a VAE first weights from training cells. Deterministic.

    Genes that none of the cells expresses keep their random embeddings, and so do the columns that are left if there
    are fewer components than columns.

    Args:
        vae: A new VAE, on the CPU.
        cells: Some training cells; two at least.

    Returns:
        The number of components.
    """
    counts = sp.vstack([_counts(batch, vae.n_genes) for batch in cells], format="csr")
    if counts.shape[0] < 2:
        raise ValueError(f"components need two cells at least; got {counts.shape[0]}")
    widest = max(table.shape[1] for table in _tables(vae))
    loadings = gene_components(counts, widest)
    for table in _tables(vae):
        own = torch.from_numpy(loadings[:, : table.shape[1]]).to(table.dtype)
        found = own.abs().sum(1) > 0
        if found.any():
            own = own * (EMBEDDING_STD / own[found].std())
            table[: len(own), : own.shape[1]] = torch.where(found[:, None], own, table[:, : own.shape[1]])
    parts = [CellBatch.from_csr(counts[i : i + POOLED]) for i in range(0, counts.shape[0], POOLED)]
    random_queries = vae.encoder.queries.detach().clone()
    for _ in range(ROUNDS):
        _centre_queries(vae, parts, random_queries)
    return loadings.shape[1]


def gene_components(counts: sp.csr_matrix, k: int) -> np.ndarray:
    """Return loadings of genes on the leading principal components of cells (n, g), times the root of its size.

    Of log1p CP10k, each gene divided by its standard deviation (plus a floor). The components come from the n x n
    matrix of products between cells, so that n may be small and g large. The largest loading of each is positive.

    Returns:
        (g, at most k): fewer, if the cells span fewer.
    """
    x = sp.csr_matrix(counts, dtype=np.float64)
    x.data = np.log1p(1e4 * x.data / np.repeat(np.asarray(x.sum(1)).ravel(), np.diff(x.indptr)))
    mean = np.asarray(x.mean(0)).ravel()
    variance = np.asarray(x.multiply(x).mean(0)).ravel() - mean**2
    x = sp.csr_matrix(x @ sp.diags(1 / (np.sqrt(np.maximum(variance, 0)) + FLOOR)))
    mean = np.asarray(x.mean(0)).ravel()
    with_mean = x @ mean
    products = (x @ x.T).toarray() - with_mean[:, None] - with_mean[None] + mean @ mean
    n = len(products)
    values, vectors = eigh(products, subset_by_index=[max(n - k, 0), n - 1])
    kept = values > SMALLEST * values[-1]
    size, u = np.sqrt(values[kept][::-1]), vectors[:, kept][:, ::-1]
    loadings = np.asarray(x.T @ u - np.outer(mean, u.sum(0))) / size  # (g, k), of unit length
    largest = np.take_along_axis(loadings, np.abs(loadings).argmax(0)[None], axis=0)
    loadings = loadings * np.sign(largest) * np.sqrt(size)
    return np.where(np.diff(x.tocsc().indptr)[:, None] > 0, loadings, 0.0)


def _tables(vae: VAE) -> list[torch.nn.Parameter]:
    """Return the gene embeddings: one, or the encoder's and the decoder's."""
    return [t for t in (vae.gene_embedding, vae.decoder_embedding) if t is not None]


def _centre_queries(vae: VAE, parts: Sequence[CellBatch], random_queries: Tensor) -> None:
    encoder = vae.encoder
    pooled = torch.cat(
        [encoder.out(merge_heads(encoder.pool(part, vae.gene_embedding))) for part in parts]
    )  # (n, m, d)
    mean = pooled.mean(0)
    if (spread := float((pooled - mean).std())) == 0:  # all cells alike
        return
    encoder.out.weight.div_(spread)
    if encoder.out.bias is not None:
        encoder.out.bias.div_(spread)
    encoder.queries.copy_(random_queries - mean / spread)


def _counts(cells: CellBatch, n_genes: int) -> sp.csr_matrix:
    ends = np.concatenate([[0], cells.lengths.cumsum(0).numpy()])
    return sp.csr_matrix((cells.counts.numpy(), cells.gene_ids.numpy(), ends), shape=(cells.n_cells, n_genes))
