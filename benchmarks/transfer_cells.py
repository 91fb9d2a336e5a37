"""Sets of real cells for `transfer.py`: a source, which a model is trained on, and a target that it is used for.

    replicates   two replicates of a CRISPR screen in one cell line -> the third; 299 genes
    patients     slice cultures of four patients, treated or not -> the fifth patient; 300 genes
    tissues      blood cells and synthetic cells, 20,000 in all -> airway cells of another species; 1,311 genes

A source and its target are described by the same genes: those that both files have.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp

MIN_COUNTS = 10  # of a cell; others are left out
ATLAS_CELLS, ATLAS_TYPES, PROGRAMS, THETA = 20_000, 60, 8, 2.0
SHIFT = 0.6  # standard deviation of a synthetic type's log fold changes


@dataclass(frozen=True)
class Cells:
    """Counts with a class each."""

    counts: sp.csr_matrix  # (n, g) float32
    classes: np.ndarray  # (n,) names

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, rows: np.ndarray | slice) -> Cells:
        return Cells(self.counts[rows], self.classes[rows])


@dataclass(frozen=True)
class Sets:
    """Cells of a source and of a target. Nobody trains on what is held out."""

    genes: tuple[str, ...]
    source: Cells
    source_held_out: Cells
    target: Cells
    target_held_out: Cells


def read(folder: Path, name: str, seed: int) -> Sets:
    """A pair of sets; the seed splits the target."""
    return PAIRS[name](folder, np.random.default_rng(seed))


def replicates(folder: Path, rng: np.random.Generator) -> Sets:
    data = anndata.read_h5ad(folder / "perturbation" / "papalexi_eccite_lowmoi.h5ad")
    third = (data.obs["bio_rep"] == "rep_3").to_numpy()
    cells = _cells(data, ["target_gene"])
    return _split(tuple(data.var_names), _rich(cells[~third]), _rich(cells[third]), rng)


def patients(folder: Path, rng: np.random.Generator) -> Sets:
    data = anndata.read_h5ad(folder / "perturbation" / "gbm_panobinostat_lemur.h5ad")
    fifth = (data.obs["patient_id"] == "PW040").to_numpy()
    cells = _cells(data, ["patient_id", "condition"])
    return _split(tuple(data.var_names), _rich(cells[~fifth]), _rich(cells[fifth]), rng)


def tissues(folder: Path, rng: np.random.Generator) -> Sets:
    blood = anndata.read_h5ad(folder / "pbmc3k_full.h5ad")
    airway = anndata.read_h5ad(folder / "perturbation" / "pig_airway_cftr.h5ad")
    genes = tuple(sorted(set(blood.var_names) & set(airway.var_names)))
    real = _rich(_cells(blood[:, list(genes)], ["cell_type"]))
    made = synthetic_atlas(real, ATLAS_CELLS - len(real), np.random.default_rng(0))
    source = Cells(sp.vstack([real.counts, made.counts], format="csr"), np.concatenate([real.classes, made.classes]))
    return _split(genes, source, _rich(_cells(airway[:, list(genes)], ["cell_type", "genotype"])), rng)


PAIRS: dict[str, Callable[[Path, np.random.Generator], Sets]] = {
    "replicates": replicates,
    "patients": patients,
    "tissues": tissues,
}


def synthetic_atlas(real: Cells, n: int, rng: np.random.Generator) -> Cells:
    """Cells of made-up types: the profile of a real class, changed by random gene programs; negative binomial counts.

    Args:
        n: Number of cells.
        rng: Source of types and counts.
    """
    g = real.counts.shape[1]
    names = np.unique(real.classes)
    profile = np.stack([np.asarray(real.counts[real.classes == name].sum(0)).ravel() + 0.5 for name in names])
    programs = rng.normal(size=(PROGRAMS, g))
    log = np.log(profile[rng.integers(0, len(names), ATLAS_TYPES)])
    log += SHIFT / np.sqrt(PROGRAMS) * rng.normal(size=(ATLAS_TYPES, PROGRAMS)) @ programs
    share = np.exp(log) / np.exp(log).sum(1, keepdims=True)
    types = rng.integers(0, ATLAS_TYPES, n)
    size = rng.choice(np.asarray(real.counts.sum(1)).ravel(), n)
    parts = []
    for rows in np.array_split(np.arange(n), max(1, n // 1000)):
        mu = share[types[rows]] * size[rows, None]
        counts = rng.poisson(mu * rng.gamma(THETA, 1 / THETA, mu.shape)).astype(np.float32)
        parts.append(sp.csr_matrix(counts))
    made = Cells(sp.vstack(parts, format="csr"), np.array([f"synthetic {t:02d}" for t in types]))
    return _rich(made)


def _cells(data: anndata.AnnData, columns: list[str]) -> Cells:
    classes = data.obs[columns].astype(str).agg(" ".join, axis=1).to_numpy().astype(str)
    return Cells(sp.csr_matrix(data.X, dtype=np.float32), classes)


def _rich(cells: Cells) -> Cells:
    return cells[np.asarray(cells.counts.sum(1)).ravel() >= MIN_COUNTS]


def _split(genes: tuple[str, ...], source: Cells, target: Cells, rng: np.random.Generator) -> Sets:
    """Hold out a tenth of the source, at most 1,000 cells, the same for all seeds, and a third of the target."""
    order, target_order = np.random.default_rng(0).permutation(len(source)), rng.permutation(len(target))
    n, n_target = min(1_000, len(source) // 10), len(target) // 3
    return Sets(
        genes, source[order[n:]], source[order[:n]], target[target_order[n_target:]], target[target_order[:n_target]]
    )
