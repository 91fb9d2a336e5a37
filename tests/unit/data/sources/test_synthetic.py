"""Synthetic cells: deterministic, sparse like real ones, learnable."""

import numpy as np
import scipy.sparse as sp

from pipeline.config.job import SyntheticSource
from pipeline.data.sources.synthetic import TYPE_NAMES, synthetic_cells


def make(**kwargs):
    tables = synthetic_cells(SyntheticSource(type="synthetic", **kwargs))
    return tables, sp.vstack(list(tables.chunks()), format="csr")


def profiles(tables, counts):
    """Mean log expression of each type."""
    x = np.log1p(counts.toarray() / np.asarray(counts.sum(1)) * 1e4)
    kind = tables.obs["cell_type"].astype(str).to_numpy()
    return np.stack([x[kind == name].mean(0) for name in TYPE_NAMES[: len(set(kind))]])


def test_the_seed_decides_everything():
    (a_tables, a), (b_tables, b), (_, c) = make(n_cells=1500), make(n_cells=1500), make(n_cells=1500, seed=1)
    assert (a != b).nnz == 0
    assert a_tables.obs.equals(b_tables.obs)
    assert (a != c).nnz > 0


def test_counts_look_like_cells():
    _, counts = make(n_cells=2000)
    assert counts.shape == (2000, 1000)
    assert (counts.data == np.rint(counts.data)).all()
    assert 0.83 < 1 - counts.nnz / np.prod(counts.shape) < 0.92
    assert counts.sum(1).min() > 0
    mean, variance = counts.toarray().mean(0), counts.toarray().var(0)
    common = mean > 0.5
    assert np.median(variance[common] / mean[common]) > 1.5  # more than Poisson


def test_two_types_are_close_and_the_others_apart():
    tables, counts = make(n_cells=3000, n_types=4)
    p = profiles(tables, counts)
    distance = np.linalg.norm(p[:, None] - p[None], axis=-1)
    others = distance[np.triu_indices(4, 1)][1:]
    assert distance[0, 1] < 0.7 * others.min()
    sizes = tables.obs["cell_type"].value_counts()
    assert sizes.max() > 1.5 * sizes.min()
