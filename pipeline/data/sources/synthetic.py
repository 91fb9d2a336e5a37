"""Generates synthetic cells that a model can learn from: gene programmes, cell types, donors, overdispersed counts.

The mean of gene g in cell c is library_size_c * softmax_g(base_g + sum_p activity_cp * loading_pg + donor_g), and the
counts are negative binomial. Every number is a function of the seed; the counts of a chunk of cells are a function of
(seed, chunk), so chunks can be made in any order. Types 0 and 1 differ in one weak programme; the others are well
separated. With treatments, the effect of a cell's treatment on its type is added to the softmax
(`synthetic_treatments`), and what each combination has on average is known. Cells with more structure inside a type
are those of `synthetic_trajectories`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.config.job import SyntheticSource
from pipeline.data.sources.synthetic_trajectories import cell_owners, drawn_chunks, philox
from pipeline.data.sources.synthetic_treatments import (
    TREATMENT,
    TRUTH_CELLS,
    combination_truth,
    given_treatments,
    treatment_effects,
    treatment_names,
)
from pipeline.data.tables import CellTables

CHUNK = 1024
TYPE_NAMES = (
    "CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell", "classical monocyte", "B cell",
    "natural killer cell", "dendritic cell", "plasma cell", "platelet", "mast cell", "erythrocyte",
    "endothelial cell", "fibroblast", "macrophage", "neutrophil", "epithelial cell", "smooth muscle cell",
)  # fmt: skip
TISSUES = ("blood", "lung", "spleen")
ASSAYS = ("10x 3' v3", "10x 3' v2")
BASE_SD = 2.4  # of log expression over genes: most genes are rare
PROGRAMME_GENES = 0.06  # share of the genes that a programme moves
EFFECT = 1.6  # effect of a programme on log expression of its genes
CLOSE = 0.35  # the same for the programme between types 0 and 1
DONOR_SD = 0.12  # standard deviation of a donor's shift of log expression
LIBRARY_SIZE, LIBRARY_SD, LIBRARY_TYPE_SD = 350.0, 0.35, 0.25  # for 1,000 genes; grows with the root of the genes
EFFECTS, GIVEN, TRUTH = 1 << 40, 1 << 41, 1 << 42  # streams of randomness; those of chunks are small numbers
SPREAD = 0.3  # standard deviation of a programme's log activity over the cells of a type


def synthetic_cells(source: SyntheticSource) -> CellTables:
    """Return tables and chunks of a synthetic experiment; a function of `source` alone."""
    if source.within_types == "trajectories":
        return _on_trajectories(source)
    rng = philox(source.seed, 0)
    n, g, k = source.n_cells, source.n_genes, source.n_types
    abundance = 1 / np.arange(1, k + 1) ** 0.7
    types = rng.choice(k, n, p=abundance / abundance.sum())
    types[: min(n, k)] = np.arange(min(n, k))  # every type occurs
    donors = rng.integers(0, source.n_donors, n)
    process = _process(source, rng)
    treatments = None
    if source.n_treatments is not None:
        treatments = given_treatments(types, source.n_treatments, philox(source.seed, GIVEN))

    def chunks() -> Iterator[sp.csr_matrix]:
        for number, start in enumerate(range(0, n, CHUNK)):
            cells = slice(start, min(n, start + CHUNK))
            given = None if treatments is None else treatments[cells]
            _, counts = process.draw(types[cells], donors[cells], given, philox(source.seed, number + 1))
            yield sp.csr_matrix(counts.astype(np.float32))

    truth = None if treatments is None else lambda: _truth(source, process)
    obs = _obs(source, types, donors, treatments)
    return CellTables(obs, _var(g), chunks, where="the synthetic source", truth=truth)


def _on_trajectories(source: SyntheticSource) -> CellTables:
    obs = _obs(source, *cell_owners(source), None)
    chunks = lambda: (sp.csr_matrix(drawn.counts.astype(np.float32)) for drawn in drawn_chunks(source))  # noqa: E731
    return CellTables(obs, _var(source.n_genes), chunks, where="the synthetic source")


@dataclass(frozen=True)
class Process:
    """What the cells are drawn from."""

    base: np.ndarray  # (g,) log expression
    loading: np.ndarray  # (programmes, g)
    activity: np.ndarray  # (types, programmes), means
    donor_shift: np.ndarray  # (donors, g)
    theta: np.ndarray  # (g,) inverse dispersion
    median: np.ndarray  # (types,) log library size
    effects: np.ndarray | None  # (types, treatments, g) of log expression; None: nothing is given

    def draw(
        self, types: np.ndarray, donors: np.ndarray, treatments: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the expected share of each gene in each cell, and the counts, both (n, g)."""
        active = self.activity[types] * rng.lognormal(-(SPREAD**2) / 2, SPREAD, (len(types), self.activity.shape[1]))
        logit = self.base + active @ self.loading + self.donor_shift[donors]
        if self.effects is not None:
            logit = logit + self.effects[types, treatments]
        share = np.exp(logit - logit.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        size = rng.lognormal(self.median[types], LIBRARY_SD)
        mu = share * size[:, None]
        counts = rng.poisson(rng.gamma(self.theta, mu / self.theta))
        counts[counts.sum(1) == 0, 0] = 1  # no cell is empty
        return share, counts


def _process(source: SyntheticSource, rng: np.random.Generator) -> Process:
    g, k = source.n_genes, source.n_types
    base = np.minimum(rng.normal(0, BASE_SD, g), 2 * BASE_SD)  # no gene takes half of a cell
    loading, activity = _programmes(rng, g, k)
    donor_shift = rng.normal(0, DONOR_SD, (source.n_donors, g))
    theta = rng.gamma(4.0, 0.75, g) + 0.5  # inverse dispersion of each gene
    median = np.log(LIBRARY_SIZE * np.sqrt(g / 1000)) + rng.normal(0, LIBRARY_TYPE_SD, k)
    effects = None
    if source.n_treatments is not None:
        effects = treatment_effects(activity[:, k:], g, source.n_treatments, philox(source.seed, EFFECTS))
    return Process(base, loading, activity, donor_shift, theta, median, effects)


def _truth(source: SyntheticSource, process: Process) -> pd.DataFrame:
    """Return what each combination of type and treatment has on average, see `combination_truth`."""
    draw = lambda t, treated, rng: process.draw(  # noqa: E731
        np.full(TRUTH_CELLS, t), rng.integers(0, source.n_donors, TRUTH_CELLS), np.full(TRUTH_CELLS, treated), rng
    )
    assert source.n_treatments is not None  # without treatments there are no combinations
    return combination_truth(
        draw, _type_names(source), source.n_treatments, _var(source.n_genes)["feature_id"].to_numpy(),
        lambda i: philox(source.seed, TRUTH + i),
    )  # fmt: skip


def _programmes(rng: np.random.Generator, g: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw loadings (programmes, g) and mean activities (types, programmes).

    There is one programme per type, and three shared ones; type 1 is type 0 with a weak programme of its own.
    """
    n_shared = 3
    loading = np.zeros((k + n_shared, g))
    for p in range(k + n_shared):
        genes = rng.choice(g, max(2, round(PROGRAMME_GENES * g)), replace=False)
        loading[p, genes] = EFFECT * rng.choice([1, 1, -1], len(genes)) * rng.uniform(0.5, 1.5, len(genes))
    activity = np.concatenate([np.eye(k), rng.uniform(0, 0.5, (k, n_shared))], axis=1)
    if k > 1:
        activity[1] = activity[0]
        activity[1, 1] = CLOSE
    return loading, activity


def _type_names(source: SyntheticSource) -> list[str]:
    return [*TYPE_NAMES, *(f"cell type {i}" for i in range(len(TYPE_NAMES), source.n_types))][: source.n_types]


def _obs(source: SyntheticSource, types: np.ndarray, donors: np.ndarray, treatments: np.ndarray | None) -> pd.DataFrame:
    names = _type_names(source)
    donor_names = [f"donor {i + 1}" for i in range(source.n_donors)]
    category = lambda codes, values: pd.Categorical.from_codes(codes, values)  # noqa: E731
    given = {} if treatments is None else {TREATMENT: category(treatments, treatment_names(source.n_treatments or 0))}
    return pd.DataFrame(
        {
            "obs_id": [f"cell {i}" for i in range(len(types))],
            "is_primary_data": True,
            "cell_type": category(types, names),
            "tissue_general": category(donors % len(TISSUES), list(TISSUES)),
            "assay": category(donors % len(ASSAYS), list(ASSAYS)),
            "dataset_id": category(donors % 2, ["dataset 1", "dataset 2"]),
            "donor_id": category(donors, donor_names),
            **given,
        }
    )


def gene_ids(g: int) -> list[str]:
    """Return the ids of the genes of a source with g genes."""
    return [f"ENSG{i:011d}" for i in range(1, g + 1)]


def _var(g: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "feature_id": gene_ids(g),
            "feature_name": [f"GENE{i}" for i in range(1, g + 1)],
            "feature_length": np.zeros(g, np.int64),
        }
    )
