"""Synthetic cells with what real ones have and a mean per label lacks, and the process that they are drawn from.

Within a type, cells lie on a trajectory: the log expression of a cell is a curve of its pseudotime, and the first two
types are the halves of one trajectory. Programmes that some cells run move their genes together, whatever the type.
Genes come in bursts, with an inverse dispersion each. The two data sets differ by a batch effect, donors by a weaker
one. Library sizes are log-normal around 2,000 counts and grow along a trajectory. The last type is rare.

    counts of gene g ~ NB(mean = size * softmax_g(base + curve_type(s) + activity @ loading + batch + donor), theta_g)

All numbers are functions of the seed, and those of a chunk of cells of (seed, chunk). So the process can be asked
again: for the expected counts of a cell that was drawn, and for fresh cells.

Shape letters: n cells, g genes, k types, p programmes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.config.ingest import SyntheticSource

CHUNK = 1024
RARE = 0.02  # share of the last type
BASE_SD = 1.8  # of log expression over genes
TYPE_GENES, TYPE_EFFECT = 0.12, 1.1  # share of the genes that tell a type from the others; SD of their log fold changes
CURVE_GENES, CURVE_EFFECT = 0.25, 0.7  # share of the genes that each term of a curve moves; SD of its coefficients
PROGRAMMES = 4  # two that a cell runs or not, two that every cell runs to some degree
PROGRAMME_GENES, PROGRAMME_EFFECT = 0.12, 0.7
RUNNING = 0.35  # share of the cells that run each of the first two
BATCHES, BATCH_SD, DONOR_SD = 2, 0.25, 0.08
THETA, THETA_SD, THETA_BASE = 2.0, 0.7, 0.3  # median and log SD of inverse dispersions; their growth with expression
SIZE, SIZE_SD, SIZE_TYPE_SD, SIZE_BATCH = 2000.0, 0.3, 0.2, 0.15  # for 1,000 genes; grows with the root of the genes
SIZE_GROWTH = 0.4  # of the log library size from the start of a trajectory to its end
WHO, PROCESS, CELLS, FRESH = (n << 43 for n in (1, 2, 3, 4))  # streams of randomness; chunks are added


@dataclass(frozen=True)
class Drawn:
    """Cells of the process."""

    pseudotime: np.ndarray  # (n,) on [0, 1]
    mu: np.ndarray  # (n, g) expected counts, given all that is true of the cell but the bursts of its genes
    counts: np.ndarray  # (n, g)


@dataclass(frozen=True)
class Process:
    """What the cells are drawn from."""

    base: np.ndarray  # (g,) log expression
    of_type: np.ndarray  # (lineages, g)
    curve: np.ndarray  # (lineages, 3, g) coefficients of the terms of `curve_terms`
    lineage: np.ndarray  # (k,) trajectory of each type
    span: np.ndarray  # (k, 2) first and last pseudotime of each type
    loading: np.ndarray  # (p, g)
    batch: np.ndarray  # (BATCHES, g)
    donor: np.ndarray  # (donors, g)
    theta: np.ndarray  # (g,) inverse dispersion
    log_size: np.ndarray  # (k, BATCHES) median

    @classmethod
    def of(cls, source: SyntheticSource) -> Process:
        """Return the process of a source; a function of its seed and sizes."""
        rng = philox(source.seed, PROCESS)
        g, k = source.n_genes, source.n_types
        lineage = np.maximum(np.arange(k) - 1, 0)  # types 0 and 1 share one
        span = np.tile([0.0, 1.0], (k, 1))
        if k > 1:
            span[0, 1] = span[1, 0] = 0.5
        n_lineages = lineage[-1] + 1
        base = np.clip(rng.normal(0, BASE_SD, g), -2 * BASE_SD, 1.7 * BASE_SD)  # no gene takes half of a cell
        size = np.log(SIZE * np.sqrt(g / 1000)) + SIZE_TYPE_SD * rng.normal(size=k)
        return cls(
            base=base,
            of_type=_sparse(rng, (n_lineages, g), TYPE_GENES, TYPE_EFFECT),
            curve=_sparse(rng, (n_lineages, 3, g), CURVE_GENES, CURVE_EFFECT),
            lineage=lineage,
            span=span,
            loading=_sparse(rng, (PROGRAMMES, g), PROGRAMME_GENES, PROGRAMME_EFFECT),
            batch=BATCH_SD * rng.normal(size=(BATCHES, g)),
            donor=DONOR_SD * rng.normal(size=(source.n_donors, g)),
            theta=np.clip(THETA * np.exp(THETA_SD * rng.normal(size=g) + THETA_BASE * base), 0.2, 20),
            log_size=size[:, None] + SIZE_BATCH * np.array([1, -1]),
        )

    def draw(self, types: np.ndarray, donors: np.ndarray, rng: np.random.Generator) -> Drawn:
        """Draw cells of given types and donors, (n,)."""
        n, batch = len(types), donors % BATCHES
        first, last = self.span[types].T
        s = first + (last - first) * rng.beta(1.2, 1.2, n)
        runs = rng.random((n, 2)) < RUNNING
        activity = np.concatenate([runs * rng.lognormal(0, 0.3, (n, 2)), rng.normal(size=(n, 2))], axis=1)
        activity *= np.where(np.arange(PROGRAMMES) < 2, 2.0, 1.0)
        lineage = self.lineage[types]
        logit = self.base + self.of_type[lineage] + activity @ self.loading + self.batch[batch] + self.donor[donors]
        for j, term in enumerate(curve_terms(s)):
            logit += term[:, None] * self.curve[lineage, j]
        share = np.exp(logit - logit.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        size = rng.lognormal(self.log_size[types, batch] + SIZE_GROWTH * (s - 0.5), SIZE_SD)
        mu = share * size[:, None]
        counts = rng.poisson(rng.gamma(self.theta, mu / self.theta))
        counts[counts.sum(1) == 0, 0] = 1  # no cell is empty
        return Drawn(s, mu, counts)


def curve_terms(s: np.ndarray) -> list[np.ndarray]:
    """Return what the coefficients of a curve are multiplied by at pseudotimes s (n,)."""
    return [2 * s - 1, np.sin(np.pi * s) - 0.6, np.sin(2 * np.pi * s)]


def cell_owners(source: SyntheticSource) -> tuple[np.ndarray, np.ndarray]:
    """Return the type and the donor of every cell, (n,)."""
    rng, k, n = philox(source.seed, WHO), source.n_types, source.n_cells
    share = 1 / np.arange(1, k + 1) ** 0.5
    if k > 1:
        share[-1] = RARE / (1 - RARE) * share[:-1].sum()
    types = rng.choice(k, n, p=share / share.sum())
    types[: min(n, k)] = np.arange(min(n, k))  # every type occurs
    return types, rng.integers(0, source.n_donors, n)


def drawn_chunks(source: SyntheticSource) -> Iterator[Drawn]:
    """Draw the cells of the source, chunk by chunk."""
    process = Process.of(source)
    types, donors = cell_owners(source)
    for number, start in enumerate(range(0, source.n_cells, CHUNK)):
        cells = slice(start, start + CHUNK)
        yield process.draw(types[cells], donors[cells], philox(source.seed, CELLS + number))


def expected_counts(source: SyntheticSource, rows: np.ndarray) -> np.ndarray:
    """Return the expected counts of some cells of the source, (len(rows), g): all that is true of them but bursts."""
    found = np.empty((len(rows), source.n_genes))
    for number, drawn in enumerate(drawn_chunks(source)):  # one chunk at a time: the source may be larger than memory
        here = rows // CHUNK == number
        found[here] = drawn.mu[rows[here] % CHUNK]
    return found


def fresh_counts(source: SyntheticSource, rows: np.ndarray, *, per_cell: int) -> np.ndarray:
    """Draw cells that the source does not hold, as many like each of some of its cells, (len(rows) * per_cell, g).

    Args:
        source: The source.
        rows: Cells whose types and donors the fresh ones have.
        per_cell: Fresh cells for each.
    """
    types, donors = (np.repeat(of_cell[rows], per_cell) for of_cell in cell_owners(source))
    return Process.of(source).draw(types, donors, philox(source.seed, FRESH)).counts


def philox(seed: int, stream: int) -> np.random.Generator:
    """Return the generator of a stream of randomness."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


def _sparse(rng: np.random.Generator, shape: tuple[int, ...], share: float, sd: float) -> np.ndarray:
    return sd * np.clip(rng.normal(size=shape), -2, 2) * (rng.random(shape) < share)
