"""What a model must beat (per-label baselines) and what it cannot beat (real against real).

A baseline knows a training cell's label and nothing else: within a label, genes are independent. It draws a library
size from the real training cells of the label and spreads it by the label's mean profile. A class that the training
cells lack is drawn from all training cells.

Shape letters: n cells, g genes, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scldm.metrics.expression import as_counts, library_sizes

ALL = ""  # key of the statistics of all cells


@dataclass(frozen=True)
class LabelProfile:
    library_size: np.ndarray  # (n,) of the training cells of the class
    profile: np.ndarray  # (g,), share of the class's counts; sums to 1
    theta: np.ndarray  # (g,), inverse dispersion by moments; infinite = Poisson


@dataclass(frozen=True)
class LabelBaseline:
    """Per-label profiles; `poisson` and `negative_binomial` draw cells for given labels."""

    table: dict[str, LabelProfile]

    @classmethod
    def fit(cls, counts: sp.csr_matrix, labels: np.ndarray) -> LabelBaseline:
        """From training counts (n, g) and a class name (or None) per cell."""
        counts = as_counts(counts)
        if len(labels) != counts.shape[0]:
            raise ValueError(f"one label per cell: got {len(labels)} labels for {counts.shape[0]} cells")
        table = {ALL: _profile(counts)}
        for name in sorted({v for v in labels if isinstance(v, str)}):
            table[name] = _profile(counts[labels == name])
        return cls(table)

    def mean(self, labels: np.ndarray, library_size: np.ndarray) -> np.ndarray:
        """Expected counts of cells of these labels and library sizes, (n, g)."""
        return np.stack([self._of(v).profile * size for v, size in zip(labels, library_size, strict=True)])

    def poisson(self, labels: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
        """counts = Poisson(profile * library size drawn from real), (n, g) CSR.

        Independent Poissons with rates p_g L are a Poisson(L) total spread multinomially by p: the same law, drawn at
        the cost of the counts and not of all genes.
        """
        rows = []
        for label in labels:
            known = self._of(label)
            total = rng.poisson(rng.choice(known.library_size))
            cumulative = np.cumsum(known.profile)
            genes = np.searchsorted(cumulative, rng.random(total) * cumulative[-1], side="right")
            rows.append(np.unique(genes, return_counts=True))
        return _rows_to_csr(rows, self.n_genes)

    def negative_binomial(self, labels: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
        """counts = NB(mean = profile * library size drawn from real, theta per label and gene), (n, g) CSR."""
        rows = []
        for label in labels:
            known = self._of(label)
            genes = np.flatnonzero(known.profile)
            rate = known.profile[genes] * rng.choice(known.library_size)
            theta = known.theta[genes]
            spread = np.isfinite(theta)
            rate[spread] *= rng.gamma(theta[spread]) / theta[spread]
            drawn = rng.poisson(rate)
            rows.append((genes[drawn > 0], drawn[drawn > 0]))
        return _rows_to_csr(rows, self.n_genes)

    @property
    def n_genes(self) -> int:
        return len(self.table[ALL].profile)

    def _of(self, label: str | None) -> LabelProfile:
        return self.table.get(label if isinstance(label, str) else ALL, self.table[ALL])


def _profile(counts: sp.csr_matrix) -> LabelProfile:
    """Mean profile p, and theta by moments from E[(x - L p)² - x] = (L p)² / theta."""
    size = library_sizes(counts)
    total = np.asarray(counts.sum(0)).ravel()
    if not total.sum():
        raise ValueError(f"a class of {counts.shape[0]} training cells holds no counts at all")
    p = total / total.sum()
    squares = np.asarray(counts.multiply(counts).sum(0)).ravel()
    expected = p**2 * (size**2).sum()  # sum over cells of (L p)²
    excess = squares - 2 * p * (counts.T @ size) + expected - total
    theta = np.divide(expected, excess, out=np.full_like(p, np.inf), where=excess > 0)
    return LabelProfile(size, p, theta)


def _rows_to_csr(rows: list[tuple[np.ndarray, np.ndarray]], n_genes: int) -> sp.csr_matrix:
    indptr = np.concatenate([[0], np.cumsum([len(genes) for genes, _ in rows])])
    indices = np.concatenate([genes for genes, _ in rows]) if rows else np.zeros(0, dtype=np.int64)
    data = np.concatenate([n for _, n in rows]) if rows else np.zeros(0)
    return sp.csr_matrix((data.astype(np.float64), indices, indptr), shape=(len(rows), n_genes))


def halves(n_cells: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint random halves of cells (equal in size; an odd one is left out): real against real."""
    order = rng.permutation(n_cells)
    half = n_cells // 2
    return np.sort(order[:half]), np.sort(order[half : 2 * half])


@dataclass(frozen=True)
class Selection:
    indices: np.ndarray  # ascending
    short: dict[str, int]  # class -> cells that were wanted and not there


def select_like(available: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> Selection:
    """Cells without replacement, as many of each class as `wanted` holds: a difference in composition is not a fault.

    Args:
        available: Class of each cell that may be drawn.
        wanted: Class of each cell of the set to resemble.
    """
    chosen, short = [], {}
    names, numbers = np.unique(wanted.astype(str), return_counts=True)
    keys = available.astype(str)
    for name, number in zip(names.tolist(), numbers.tolist(), strict=True):
        here = rng.permutation(np.flatnonzero(keys == name))[:number]
        chosen.append(here)
        if len(here) < number:
            short[name] = number - len(here)
    return Selection(np.sort(np.concatenate(chosen)), short)
