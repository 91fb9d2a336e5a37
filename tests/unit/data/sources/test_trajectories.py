"""Synthetic cells on trajectories: what real cells have and a mean per label lacks, and the process behind them."""

import numpy as np
import pytest
import scipy.sparse as sp

from pipeline.config.job import SyntheticSource
from pipeline.data.sources.synthetic import synthetic_cells
from pipeline.data.sources.synthetic_trajectories import (
    CHUNK,
    Process,
    cell_owners,
    drawn_chunks,
    expected_counts,
    fresh_counts,
)


def source(**kwargs) -> SyntheticSource:
    return SyntheticSource(type="synthetic", within_types="trajectories", **kwargs)


@pytest.fixture(scope="module")
def cells():
    tables = synthetic_cells(source(n_cells=3000))
    return tables, sp.vstack(list(tables.chunks()), format="csr").toarray()


def test_library_sizes_and_zeros_are_in_the_range_of_real_cells(cells):
    _, counts = cells
    assert 1500 < np.median(counts.sum(1)) < 3000
    assert 0.3 < np.log(counts.sum(1)).std() < 0.6
    assert 0.4 < (counts == 0).mean() < 0.8
    assert counts.mean(0).max() / counts.sum(1).mean() < 0.1  # no gene takes a tenth of a cell


def test_the_last_type_is_rare_and_both_batches_have_all_types(cells):
    tables, _ = cells
    share = tables.obs["cell_type"].value_counts(normalize=True, sort=False)
    assert 0.01 < share.iloc[-1] < 0.03
    assert share.iloc[:-1].min() > 0.1
    assert (tables.obs.groupby(["cell_type", "dataset_id"], observed=False).size() > 0).all()


def test_genes_of_a_type_go_together_and_vary_more_than_their_bursts():
    drawn = next(drawn_chunks(source(n_cells=1024)))
    types, _ = cell_owners(source(n_cells=1024))
    here = types == 0
    share = drawn.mu[here] / drawn.mu[here].sum(1, keepdims=True)
    log = np.log(share)
    assert np.median(log.std(0)) > 0.3  # of expected expression, which a mean per label has at 0
    first = np.linalg.svd(log - log.mean(0), compute_uv=False) ** 2
    assert first[:6].sum() / first.sum() > 0.6  # few directions: trajectory, batch, programmes
    counts = drawn.counts[here]
    noisy = (drawn.mu[here].mean(0) > 1).nonzero()[0]
    assert np.median(((counts - drawn.mu[here]) ** 2).mean(0)[noisy] / drawn.mu[here].mean(0)[noisy]) > 1.3


def test_the_first_two_types_are_halves_of_one_trajectory():
    given = source(n_cells=1024)
    drawn, (types, _) = next(drawn_chunks(given)), cell_owners(given)
    assert drawn.pseudotime[types == 0].max() <= 0.5 <= drawn.pseudotime[types == 1].min()


def test_expected_counts_are_those_that_the_cells_were_drawn_from():
    given = source(n_cells=CHUNK + 200, n_genes=50)
    counts = np.concatenate([drawn.counts for drawn in drawn_chunks(given)])
    rows = np.array([3, CHUNK + 150, 7])
    mu, theta = expected_counts(given, rows), Process.of(given).theta
    assert mu.shape == (3, 50)
    every = expected_counts(given, np.arange(given.n_cells))
    np.testing.assert_array_equal(mu, every[rows])
    z = (counts - every) / np.sqrt(every + every**2 / theta)
    assert np.abs(z.mean(0)).max() < 0.15
    assert z.std() == pytest.approx(1, abs=0.05)


def test_fresh_cells_are_others_of_the_same_types_and_donors():
    given = source(n_cells=600, n_genes=80)
    counts = np.concatenate([drawn.counts for drawn in drawn_chunks(given)])
    rows = np.flatnonzero(cell_owners(given)[0] == 2)
    fresh = fresh_counts(given, rows, per_cell=5)
    assert fresh.shape == (5 * len(rows), 80)
    assert not (fresh[: len(rows)] == counts[rows]).all(1).any()
    spread = counts[rows].std(0) / np.sqrt(len(rows)) + 1e-3
    assert np.abs((fresh.mean(0) - counts[rows].mean(0)) / spread).max() < 5
    np.testing.assert_array_equal(fresh, fresh_counts(given, rows, per_cell=5))


def test_the_seed_decides_everything_and_the_setting_is_absent_unless_given():
    tables = [synthetic_cells(source(n_cells=40, n_genes=30, seed=seed)) for seed in (1, 1, 2)]
    a, b, c = (next(iter(t.chunks())) for t in tables)
    assert (a != b).nnz == 0
    assert (a != c).nnz > 0
    assert "within_types" not in SyntheticSource(type="synthetic").model_dump()
    assert source().model_dump()["within_types"] == "trajectories"


def test_one_type_and_one_donor_are_enough():
    tables = synthetic_cells(source(n_cells=40, n_genes=30, n_types=1, n_donors=1))
    assert set(tables.obs["dataset_id"].astype(str)) == {"dataset 1"}


def test_treatments_are_refused():
    with pytest.raises(ValueError, match=r"n_treatments \(2\) and within_types \(trajectories\) exclude each other"):
        source(n_treatments=2)
