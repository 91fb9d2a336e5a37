"""Generates synthetic cells that a model can learn from: gene programmes, cell types, donors, overdispersed counts.

The mean of gene g in cell c is library_size_c * softmax_g(base_g + sum_p activity_cp * loading_pg + donor_g), and the
counts are negative binomial. Every number is a function of the seed; the counts of a chunk of cells are a function of
(seed, chunk), so chunks can be made in any order. Types 0 and 1 differ in one weak programme; the others are well
separated.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.config.job import SyntheticSource
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
SPREAD = 0.3  # standard deviation of a programme's log activity over the cells of a type


def synthetic_cells(source: SyntheticSource) -> CellTables:
    """Return tables and chunks of a synthetic experiment; a function of `source` alone."""
    rng = _rng(source.seed, 0)
    n, g, k = source.n_cells, source.n_genes, source.n_types
    abundance = 1 / np.arange(1, k + 1) ** 0.7
    types = rng.choice(k, n, p=abundance / abundance.sum())
    types[: min(n, k)] = np.arange(min(n, k))  # every type occurs
    donors = rng.integers(0, source.n_donors, n)

    base = np.minimum(rng.normal(0, BASE_SD, g), 2 * BASE_SD)  # no gene takes half of a cell
    loading, activity = _programmes(rng, g, k)
    donor_shift = rng.normal(0, DONOR_SD, (source.n_donors, g))
    theta = rng.gamma(4.0, 0.75, g) + 0.5  # inverse dispersion of each gene
    median = np.log(LIBRARY_SIZE * np.sqrt(g / 1000)) + rng.normal(0, LIBRARY_TYPE_SD, k)

    def chunks() -> Iterator[sp.csr_matrix]:
        for number, start in enumerate(range(0, n, CHUNK)):
            cells = slice(start, min(n, start + CHUNK))
            draw = _rng(source.seed, number + 1)
            t, d = types[cells], donors[cells]
            active = activity[t] * draw.lognormal(-(SPREAD**2) / 2, SPREAD, (len(t), activity.shape[1]))
            logit = base + active @ loading + donor_shift[d]
            share = np.exp(logit - logit.max(1, keepdims=True))
            size = draw.lognormal(median[t], LIBRARY_SD)
            mu = share / share.sum(1, keepdims=True) * size[:, None]
            counts = draw.poisson(draw.gamma(theta, mu / theta))
            counts[counts.sum(1) == 0, 0] = 1  # no cell is empty
            yield sp.csr_matrix(counts.astype(np.float32))

    return CellTables(_obs(source, types, donors), _var(g), chunks, where="the synthetic source")


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


def _obs(source: SyntheticSource, types: np.ndarray, donors: np.ndarray) -> pd.DataFrame:
    names = [*TYPE_NAMES, *(f"cell type {i}" for i in range(len(TYPE_NAMES), source.n_types))][: source.n_types]
    donor_names = [f"donor {i + 1}" for i in range(source.n_donors)]
    category = lambda codes, values: pd.Categorical.from_codes(codes, values)  # noqa: E731
    return pd.DataFrame(
        {
            "obs_id": [f"cell {i}" for i in range(len(types))],
            "is_primary_data": True,
            "cell_type": category(types, names),
            "tissue_general": category(donors % len(TISSUES), list(TISSUES)),
            "assay": category(donors % len(ASSAYS), list(ASSAYS)),
            "dataset_id": category(donors % 2, ["dataset 1", "dataset 2"]),
            "donor_id": category(donors, donor_names),
        }
    )


def _var(g: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "feature_id": [f"ENSG{i:011d}" for i in range(1, g + 1)],
            "feature_name": [f"GENE{i}" for i in range(1, g + 1)],
            "feature_length": np.zeros(g, np.int64),
        }
    )


def _rng(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))
