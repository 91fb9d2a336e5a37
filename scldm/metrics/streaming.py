"""Statistics of any number of cells, a chunk at a time.

Memory is that of a chunk, and a few numbers per gene and cell.

Cells have weights, so that all generated cells count with the composition of the held-out ones: the weight of a cell is
(share of its class among the real cells) / (generated cells of its class). Classes that were not generated are named.

Shape letters: n cells of a chunk, g genes, N all cells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scldm.metrics.cell_set import CellSet
from scldm.metrics.genes import expression
from scldm.metrics.genes.expression import GeneMoments
from scldm.metrics.score import Score, checked


@dataclass(frozen=True)
class StreamedCells:
    """Statistics of N cells: 3 numbers per gene, 3 per cell."""

    moments: GeneMoments  # log1p CP10k, weighted
    library_size: np.ndarray  # (N,); empty if the cells hold no counts
    genes_per_cell: np.ndarray  # (N,); likewise
    weights: np.ndarray  # (N,), sums to 1
    counted: bool = True  # whether the cells hold counts

    @property
    def n_cells(self) -> int:
        """Number of cells, N."""
        return len(self.weights)


def composition_weights(classes: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the weight of each cell (N,), sum 1, so that classes weigh as in `wanted`; and the missing classes.

    A class that is not in `wanted` has weight 0.
    """
    names, codes, counts = np.unique(classes.astype(str), return_inverse=True, return_counts=True)
    share = dict(zip(*np.unique(wanted.astype(str), return_counts=True), strict=True))
    per_class = np.array([share.get(name, 0) for name in names]) / counts
    total = float((per_class * counts).sum())
    if not total:
        raise ValueError(
            f"no cell has a wanted class; the cells have {', '.join(names[:5])}, wanted are "
            f"{', '.join(list(share)[:5])}"
        )
    return per_class[codes] / total, sorted(set(share) - set(names))


def stream(chunks: Iterable[sp.csr_matrix], weights: np.ndarray, *, counted: bool = True) -> StreamedCells:
    """Compute statistics in one pass over chunks of values (n, g), with weights (N,) in the order of the pass.

    Args:
        counted: Whether the values are counts; if not, they are log1p CP10k.
    """
    start = 0
    first: np.ndarray | None = None
    second = seen = np.zeros(0)
    sizes, genes = [], []
    for chunk in chunks:
        values = expression.as_counts(chunk) if counted else expression.as_log_values(chunk)
        own = weights[start : start + values.shape[0]]
        start += values.shape[0]
        if len(own) != values.shape[0]:
            raise ValueError(f"more cells than the {len(weights):,} weights")
        x = CellSet(values, {}, counted).log_values
        per_entry = np.repeat(own, np.diff(x.indptr))
        if first is None:
            first, second, seen = np.zeros((3, x.shape[1]))
        first += np.bincount(x.indices, weights=x.data * per_entry, minlength=len(first))
        second += np.bincount(x.indices, weights=x.data**2 * per_entry, minlength=len(first))
        seen += np.bincount(x.indices, weights=per_entry, minlength=len(first))
        if counted:
            sizes.append(expression.library_sizes(values))
            genes.append(np.diff(values.indptr))
    if first is None or start != len(weights):
        raise ValueError(f"{start:,} cells came for {len(weights):,} weights")
    n = len(weights)
    moments = GeneMoments(n, first, np.maximum(second - first**2, 0) * n, (1 - seen) * n)
    nothing = np.zeros(0)
    library_size = np.concatenate(sizes) if counted else nothing
    genes_per_cell = np.concatenate(genes).astype(np.int64) if counted else nothing
    return StreamedCells(moments, library_size, genes_per_cell, weights, counted)


def streamed_scores(
    real: GeneMoments, sizes: np.ndarray, genes: np.ndarray, candidate: StreamedCells
) -> dict[str, Score]:
    """Return `streamed_*`: gene statistics and KS of all candidate cells against the held-out real cells.

    Candidates without counts have the gene means and variances only.

    There are no resamples: the candidate's cells are many, and the remaining chance variation is that of the held-out
    cells, which the floor shows. Definitions are in `expression`.

    Args:
        real: Moments of the held-out cells, log1p CP10k.
        sizes, genes: Library size and genes per cell of the held-out cells, (n,).
        candidate: Statistics of the candidate's cells.
    """
    agreement = expression.gene_statistics_agreement(real, candidate.moments, counted=candidate.counted)
    out = {}
    for statistic in ("mean", "variance", "zero_fraction") if candidate.counted else ("mean", "variance"):
        title = f"gene {statistic.replace('_', ' ')}, R² (identity line)"
        out[f"streamed_gene_{statistic}_r2"] = Score(
            agreement[f"gene_{statistic}_r2"], "higher", 1.0, "streamed", title, bounds=(-np.inf, 1.0)
        )
    if not candidate.counted:
        return checked(out, "all generated cells")
    zeros = abs(float(candidate.moments.zero_fraction.mean()) - float(real.zero_fraction.mean()))
    out["streamed_zero_fraction_difference"] = Score(
        zeros, "lower", 0.0, "streamed", "zero fraction, absolute difference", bounds=(0.0, 1.0)
    )
    even = np.full((1, len(sizes)), 1 / len(sizes))
    for name, a, b in (
        ("library_size", sizes, candidate.library_size),
        ("genes_per_cell", genes, candidate.genes_per_cell),
    ):
        ks = float(expression.weighted_ks(a, b, even, candidate.weights[None])[0])
        title = f"{name.replace('_', ' ')}, KS"
        out[f"streamed_{name}_ks"] = Score(ks, "lower", 0.0, "streamed", title, bounds=(0.0, 1.0))
    return checked(out, "all generated cells")
