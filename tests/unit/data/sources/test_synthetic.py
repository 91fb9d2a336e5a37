"""Synthetic cells: deterministic, sparse like real ones, learnable."""

import numpy as np
import pytest
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


TREATED = {"n_cells": 12_000, "n_genes": 60, "n_types": 2, "n_treatments": 2}


def test_without_treatments_there_is_no_such_column_and_the_settings_are_as_before():
    tables, _ = make(n_cells=50)
    assert "treatment" not in tables.obs
    assert tables.truth is None
    assert "n_treatments" not in SyntheticSource(type="synthetic").model_dump()


def test_every_type_gets_every_treatment_and_the_control_equally_often():
    tables, _ = make(n_cells=600, n_genes=40, n_types=2, n_treatments=3)
    n = tables.obs.groupby(["cell_type", "treatment"], observed=True).size().unstack()
    assert list(n.columns) == ["control", "treatment 1", "treatment 2", "treatment 3"]
    assert (n.max(axis=1) - n.min(axis=1)).max() <= 1


def test_the_truth_is_what_many_cells_of_a_combination_have_on_average():
    tables, counts = make(**TREATED)
    truth, x = tables.truth(), counts.toarray()
    for (kind, given), rows in truth.groupby(["cell_type", "treatment"]):
        assert rows["share"].sum() == pytest.approx(1)
        cells = x[((tables.obs["cell_type"] == kind) & (tables.obs["treatment"] == given)).to_numpy()]
        each = cells / cells.sum(1, keepdims=True)
        log = np.log1p(each * 1e4)
        for column, values in (("share", each), ("mean_log", log)):
            seen = (values > 0).mean(0) > 0.02  # of rarer genes the standard deviation is not known
            spread = values.std(0) * np.sqrt(1 / len(values) + 1 / 4_000)
            off = (np.abs(values.mean(0) - rows[column].to_numpy()) / np.maximum(spread, 1e-9))[seen]
            assert off.max() < 5, (kind, given, column)


def test_types_share_a_part_of_an_effect_and_have_a_part_of_their_own():
    tables, _ = make(n_cells=100, n_genes=400, n_types=5, n_treatments=2)
    mean = tables.truth().pivot(index=["cell_type", "treatment"], columns="feature_id", values="mean_log")
    shift = np.stack([mean.loc[k, "treatment 1"] - mean.loc[k, "control"] for k in TYPE_NAMES[:5]])
    alike = np.corrcoef(shift)[np.triu_indices(5, 1)]
    assert 0.3 < alike.mean() < 0.97
    assert alike.min() > 0
