"""What a model must beat (per-label baselines), what it must not be (copies), and what it cannot beat (real cells).

* `poisson` and `negative_binomial` know a training cell's class and nothing else: within a class, genes are
  independent. They draw a library size from the real training cells of the class and spread it by the class's mean
  profile.
* Copies (`Pools.draw`) are training cells of the class, drawn with replacement: a model that has learnt its training
  cells by heart. No distance of distributions tells them from real cells; the memorisation scores do.
* `shuffled` cells are training cells of the class in which every gene is permuted over the cells, uniformly and on its
  own: each gene keeps its distribution, all that joins genes (correlations, library sizes) is broken.

A cell's class is its combination of labels where at least MIN_COMBINATION training cells have it, else its first label;
one that the training cells lack is drawn from all training cells.

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
GENES = 1024  # that are shuffled at once: a dense block of the cells of a class


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
        names = sorted({v for v in labels if isinstance(v, str)})
        return cls.of_pools(counts, {ALL: np.arange(len(labels)), **{v: np.flatnonzero(labels == v) for v in names}})

    @classmethod
    def of_pools(cls, counts: sp.csr_matrix, members: Mapping[str, np.ndarray]) -> LabelBaseline:
        """From training counts (n, g) and the positions of the cells of each class, ALL among them."""
        counts = as_counts(counts)
        return cls({name: _profile(counts[rows]) for name, rows in members.items()})

    def mean(self, labels: np.ndarray, library_size: np.ndarray) -> np.ndarray:
        """Expected counts of cells of these labels and library sizes, (n, g)."""
        return np.stack([self._of(v).profile * size for v, size in zip(labels, library_size, strict=True)])

    def poisson(
        self, labels: np.ndarray, rng: np.random.Generator, library_size: np.ndarray | None = None
    ) -> sp.csr_matrix:
        """counts = Poisson(profile * library size), (n, g) CSR; the size is drawn from real where none is given, (n,).

        Independent Poissons with rates p_g L are a Poisson(L) total spread multinomially by p: the same law, drawn at
        the cost of the counts and not of all genes.
        """
        rows = []
        for i, label in enumerate(labels):
            known = self._of(label)
            total = rng.poisson(rng.choice(known.library_size) if library_size is None else library_size[i])
            cumulative = np.cumsum(known.profile)
            genes = np.searchsorted(cumulative, rng.random(total) * cumulative[-1], side="right")
            rows.append(np.unique(genes, return_counts=True))
        return _rows_to_csr(rows, self.n_genes)

    def negative_binomial(
        self, labels: np.ndarray, rng: np.random.Generator, library_size: np.ndarray | None = None
    ) -> sp.csr_matrix:
        """counts = NB(mean = profile * library size, theta per label and gene), (n, g) CSR; sizes as for `poisson`."""
        rows = []
        for i, label in enumerate(labels):
            known = self._of(label)
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


@dataclass(frozen=True)
class Pools:
    """The training cells that stand for each of some cells."""

    members: dict[str, np.ndarray]  # class -> positions of training cells
    wanted: np.ndarray  # (n,) class of each cell

    @classmethod
    def like(cls, reference: CellSet, cells: CellSet, labels: Sequence[str]) -> Pools:
        """For every cell the training cells of its class, as the top of this file says."""
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
        """A training cell for each cell, with replacement, (n,)."""
        out = np.empty(len(self.wanted), dtype=np.int64)
        for name in dict.fromkeys(self.wanted):
            here = np.flatnonzero(self.wanted == name)
            out[here] = rng.choice(self.members[name], len(here))
        return out

    def draw_each_once(self, rng: np.random.Generator) -> np.ndarray:
        """The same, but no training cell of a class a second time before all its cells were taken, (n,)."""
        out = np.empty(len(self.wanted), dtype=np.int64)
        for name in dict.fromkeys(self.wanted):
            here, pool = np.flatnonzero(self.wanted == name), self.members[name]
            rounds = [rng.permutation(pool) for _ in range(-(-len(here) // len(pool)))]
            out[here] = np.concatenate(rounds)[: len(here)]
        return out


def shuffled(counts: sp.csr_matrix, classes: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Each gene permuted over the cells of every class, (n, g)."""
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
