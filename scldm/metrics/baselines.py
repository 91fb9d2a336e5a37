"""Baselines: what a model must beat (per-label baselines), must not be (copies) and cannot beat (real cells).

* `poisson` and `negative_binomial` know a training cell's class and nothing else: within a class, genes are
  independent. They draw a library size from the real training cells of the class and spread it by the class's mean
  profile.
* Copies (`Pools.draw`) are training cells of the class, drawn with replacement: a model that has memorised its training
  cells. No distance between distributions tells them from real cells; the memorisation scores do.
* `shuffled` cells are training cells of the class in which every gene is permuted over the cells, uniformly and on its
  own: each gene keeps its distribution, and all dependence between genes (correlations, library sizes) is broken.

A cell's class is its combination of labels if at least MIN_COMBINATION training cells have it, else its first label; a
class that the training cells lack is drawn from all training cells.

Shape letters: n cells, g genes, k classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scldm.metrics.cell_set import CellSet
from scldm.metrics.genes.expression import as_counts, library_sizes

ALL = ""  # key of the statistics of all cells
MIN_COMBINATION = 20  # training cells
GENES = 1024  # shuffled at a time: a dense block of the cells of a class


@dataclass(frozen=True)
class LabelProfile:
    """Statistics of the training cells of one class."""

    library_size: np.ndarray  # (n,), one per training cell of the class
    profile: np.ndarray  # (g,), share of the class's counts; sums to 1
    theta: np.ndarray  # (g,), inverse dispersion by moments; infinite = Poisson


@dataclass(frozen=True)
class LabelBaseline:
    """Per-class profiles; `poisson` and `negative_binomial` draw cells for given labels."""

    table: dict[str, LabelProfile]

    @classmethod
    def fit(cls, counts: sp.csr_matrix, labels: np.ndarray) -> LabelBaseline:
        """Fit profiles to training counts (n, g) and a class name (or None) per cell."""
        counts = as_counts(counts)
        if len(labels) != counts.shape[0]:
            raise ValueError(f"one label per cell: got {len(labels)} labels for {counts.shape[0]} cells")
        names = sorted({v for v in labels if isinstance(v, str)})
        return cls.from_pools(counts, {ALL: np.arange(len(labels)), **{v: np.flatnonzero(labels == v) for v in names}})

    @classmethod
    def from_pools(cls, counts: sp.csr_matrix, members: Mapping[str, np.ndarray]) -> LabelBaseline:
        """Fit profiles to training counts (n, g) and the positions of the cells of each class, including ALL."""
        counts = as_counts(counts)
        return cls({name: _profile(counts[rows]) for name, rows in members.items()})

    def mean(self, labels: np.ndarray, library_size: np.ndarray) -> np.ndarray:
        """Return the expected counts of cells of these labels and library sizes, (n, g)."""
        return np.stack([self._profile_of(v).profile * size for v, size in zip(labels, library_size, strict=True)])

    def poisson(
        self, labels: np.ndarray, rng: np.random.Generator, library_size: np.ndarray | None = None
    ) -> sp.csr_matrix:
        """Draw counts = Poisson(profile * library size), (n, g) CSR.

        Independent Poissons with rates p_g L are a Poisson(L) total spread multinomially by p: the same distribution at
        a cost proportional to the counts instead of all genes.

        Args:
            labels: Class of each cell, (n,).
            rng: Source of the draws.
            library_size: Size of each cell, (n,); drawn from the training cells of the class if None.
        """
        rows = []
        for i, label in enumerate(labels):
            known = self._profile_of(label)
            total = rng.poisson(rng.choice(known.library_size) if library_size is None else library_size[i])
            cumulative = np.cumsum(known.profile)
            genes = np.searchsorted(cumulative, rng.random(total) * cumulative[-1], side="right")
            rows.append(np.unique(genes, return_counts=True))
        return _rows_to_csr(rows, self.n_genes)

    def negative_binomial(
        self, labels: np.ndarray, rng: np.random.Generator, library_size: np.ndarray | None = None
    ) -> sp.csr_matrix:
        """Draw counts = NB(mean = profile * library size, theta per label and gene), (n, g) CSR.

        Arguments as in `poisson`.
        """
        rows = []
        for i, label in enumerate(labels):
            known = self._profile_of(label)
            genes = np.flatnonzero(known.profile)
            rate = known.profile[genes] * (rng.choice(known.library_size) if library_size is None else library_size[i])
            theta = known.theta[genes]
            spread = np.isfinite(theta)
            rate[spread] *= rng.gamma(theta[spread]) / theta[spread]
            drawn = rng.poisson(rate)
            rows.append((genes[drawn > 0], drawn[drawn > 0]))
        return _rows_to_csr(rows, self.n_genes)

    @property
    def n_genes(self) -> int:
        """Number of genes, g."""
        return len(self.table[ALL].profile)

    def _profile_of(self, label: str | None) -> LabelProfile:
        return self.table.get(label if isinstance(label, str) else ALL, self.table[ALL])


def _profile(counts: sp.csr_matrix) -> LabelProfile:
    """Return the mean profile p, and theta by moments from E[(x - L p)² - x] = (L p)² / theta."""
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
    """Return two disjoint random halves of cells for real against real; equal in size, an odd cell is left out."""
    order = rng.permutation(n_cells)
    half = n_cells // 2
    return np.sort(order[:half]), np.sort(order[half : 2 * half])


@dataclass(frozen=True)
class Selection:
    """Cells chosen from a set, and the shortfall of each class."""

    indices: np.ndarray  # ascending
    short: dict[str, int]  # class -> wanted cells that were not available


def select_like(available: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> Selection:
    """Draw cells without replacement, as many of each class as `wanted` holds.

    A difference in composition then does not count as an error of the generator.

    Args:
        available: Class of each cell that may be drawn.
        wanted: Class of each cell of the set to resemble.
        rng: Source of the draws.
    """
    chosen: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    short: dict[str, int] = {}
    names, numbers = np.unique(wanted.astype(str), return_counts=True)
    keys = available.astype(str)
    for name, number in zip(names.tolist(), numbers.tolist(), strict=True):
        here = rng.permutation(np.flatnonzero(keys == name))[:number]
        chosen.append(here)
        if len(here) < number:
            short[name] = number - len(here)
    return Selection(np.sort(np.concatenate(chosen)), short)


@dataclass(frozen=True)
class Pools:
    """Training cells that can stand in for each of some cells."""

    members: dict[str, np.ndarray]  # class -> positions of training cells
    wanted: np.ndarray  # (n,) class of each cell

    @classmethod
    def like(cls, reference: CellSet, cells: CellSet, labels: Sequence[str]) -> Pools:
        """Find for every cell the training cells of its class, as defined at the top of this file."""
        joint, first = reference.crossed(labels), reference.labels[labels[0]]
        pairs = list(zip(cells.crossed(labels), cells.labels[labels[0]], strict=True))
        members: dict[str, np.ndarray] = {ALL: np.arange(reference.n_cells)}
        name_of: dict[tuple[str | None, str | None], str] = {}
        for pair in dict.fromkeys(pairs):
            name_of[pair] = ALL
            for kind, names, name, least in (("joint", joint, pair[0], MIN_COMBINATION), ("first", first, pair[1], 1)):
                here = np.flatnonzero(names == name) if isinstance(name, str) else np.zeros(0, dtype=np.int64)
                if len(here) >= least:
                    name_of[pair] = f"{kind}:{name}"
                    members[name_of[pair]] = here
                    break
        return cls(members, np.array([name_of[pair] for pair in pairs], dtype=object))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a training cell for each cell, with replacement, (n,)."""
        out = np.empty(len(self.wanted), dtype=np.int64)
        for name in dict.fromkeys(self.wanted):
            here = np.flatnonzero(self.wanted == name)
            out[here] = rng.choice(self.members[name], len(here))
        return out

    def draw_each_once(self, rng: np.random.Generator) -> np.ndarray:
        """Draw as `draw`, but use no training cell of a class twice before all of its cells were used, (n,)."""
        out = np.empty(len(self.wanted), dtype=np.int64)
        for name in dict.fromkeys(self.wanted):
            here, pool = np.flatnonzero(self.wanted == name), self.members[name]
            rounds = [rng.permutation(pool) for _ in range(-(-len(here) // len(pool)))]
            out[here] = np.concatenate(rounds)[: len(here)]
        return out


def shuffled(counts: sp.csr_matrix, classes: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Permute each gene over the cells of every class, (n, g)."""
    counts = as_counts(counts)
    blocks, rows = [], []
    for name in np.unique(classes.astype(str)):
        here = np.flatnonzero(classes.astype(str) == name)
        own = counts[here].tocsc()
        genes = range(0, counts.shape[1], GENES)
        parts = [sp.csr_matrix(rng.permuted(own[:, g : g + GENES].toarray(), axis=0)) for g in genes]
        blocks.append(sp.hstack(parts, format="csr"))
        rows.append(here)
    return sp.vstack(blocks, format="csr")[np.argsort(np.concatenate(rows))]
