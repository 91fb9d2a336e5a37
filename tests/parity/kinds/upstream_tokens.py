"""Upstream's tokeniser and splits, draw for draw, for comparison with its records; ours is `gene_sampling`.

Two of its faults are kept: `expressed_zero` takes genes without a count first, and `weighted` divides the counts of the
data's genes by the means of the vocabulary's, which are in another order.

Shape letters: b cells, g genes of the data, s tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from scldm.data.genes_seen import GeneMode

PAD = 0  # upstream's token of a gene that is unknown or absent; genes count from 1


@dataclass(frozen=True)
class UpstreamTokens:
    """Input of upstream's encoder and, for a subset of genes, the subset."""

    genes: np.ndarray  # (b, g) or (b, s)
    counts: np.ndarray
    library_size: np.ndarray  # (b, 1)
    genes_subset: np.ndarray | None = None  # (b, s)
    counts_subset: np.ndarray | None = None


def gene_tokens(names: list[str], vocabulary: list[str]) -> np.ndarray:
    """Upstream's token of each gene of the data, (g,): position in the vocabulary from 1, PAD where it is unknown."""
    position = {name: i for i, name in enumerate(vocabulary, start=1)}
    return np.array([position.get(name, PAD) for name in names], dtype=np.int64)


def tokenise(
    counts: np.ndarray, tokens: np.ndarray, *, mode: str, length: int, seed: int, means: np.ndarray | None = None
) -> UpstreamTokens:
    """Tokens of cells under one of upstream's modes.

    Args:
        counts: Counts, (b, g).
        tokens: Token of each gene, (g,).
        mode: none, expressed, expressed_zero, random, random_expressed or weighted.
        length: Tokens per cell, s.
        seed: Seed of numpy's default generator.
        means: For `weighted`: mean count of each gene, (g,).
    """
    chosen = _columns(counts, mode, length, np.random.default_rng(seed), means)
    size = counts.sum(axis=1, keepdims=True)
    everything = np.tile(tokens, (len(counts), 1))
    if chosen is None:
        return UpstreamTokens(everything, counts, size)
    pad = chosen < 0
    part = np.where(pad, PAD, tokens[chosen])
    part_counts = np.where(pad, 0, np.take_along_axis(counts, chosen, axis=1)).astype(counts.dtype)
    if mode in ("expressed", "expressed_zero"):
        return UpstreamTokens(everything, counts, size, part, part_counts)
    return UpstreamTokens(part, part_counts, size)


def _columns(
    counts: np.ndarray, mode: str, length: int, rng: np.random.Generator, means: np.ndarray | None
) -> np.ndarray | None:
    """Which columns of the counts become tokens, (b, s), -1 for a pad; None for all of them."""
    n_genes = counts.shape[1]
    if mode == "none":
        return None
    if mode == "random":
        return np.stack([rng.choice(n_genes, size=length, replace=False) for _ in counts])
    if mode == "weighted":
        if means is None:
            raise ValueError("mode weighted needs the mean count of each gene")
        weights = (counts + 1) / means
        shares = weights / weights.sum(axis=1, keepdims=True)
        return np.stack([rng.choice(n_genes, size=length, replace=False, p=share) for share in shares])
    if mode == "expressed_zero":
        return np.stack([_zeros_first(rng.permutation(n_genes), cell)[:length] for cell in counts])
    expressed = [np.flatnonzero(cell > 0) for cell in counts]
    if mode == "random_expressed":
        expressed = [rng.choice(own, size=min(length, len(own)), replace=False) for own in expressed]
    elif mode != "expressed":
        raise ValueError(f"mode {mode!r} is none of upstream's; ours are {', '.join(get_args(GeneMode))}")
    longest = max(map(len, expressed))
    if longest > length:
        raise ValueError(f"a cell expresses {longest} genes, more than length ({length})")
    return np.stack([np.pad(own, (0, length - len(own)), constant_values=-1) for own in expressed])


def _zeros_first(order: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Genes in the given order, those without a count before those with one: upstream's fault."""
    silent = cell[order] <= 0
    return np.concatenate([order[silent], order[~silent]])


def split_files(n_files: int, seed: int) -> tuple[list[int], list[int]]:
    """Upstream's training and validation files: a tenth, drawn among the first half."""
    order, n_validation = np.random.RandomState(seed).permutation(n_files // 2), int(0.1 * n_files)
    train = np.concatenate([order[:-n_validation], np.arange(n_files // 2, n_files)])
    return train.tolist(), order[-n_validation:].tolist()


def split_cells(n_cells: int, seed: int) -> tuple[list[int], list[int]]:
    """Upstream's training and validation cells of one file: the last tenth of a permutation is for validation."""
    order, n_validation = np.random.RandomState(seed).permutation(n_cells), int(0.1 * n_cells)
    return order[:-n_validation].tolist(), order[-n_validation:].tolist()
