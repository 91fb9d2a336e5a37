"""The pass over counts: what numpy says of the dense matrix, to the bit, however the pass is cut in parts."""

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pipeline.data.entries import CountEntries
from pipeline.data.ingest import statistics
from pipeline.data.ingest.statistics import RareEntries, count_statistics
from pipeline.data.soma.write import write_experiment

N, G, TILE = 700, 40, 32


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    share = np.linspace(0, 0.8, G)  # from genes that no cell expresses to common ones
    x = (rng.random((N, G)) < share) * rng.integers(1, 3000, (N, G))
    x[:, -1] += 1  # no cell is empty
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory, counts):
    obs = pd.DataFrame({"is_primary_data": [True] * N})
    var = pd.DataFrame({"feature_id": [f"g{i}" for i in range(G)], "feature_name": "x", "feature_length": 0})
    return write_experiment(tmp_path_factory.mktemp("s") / "soma", obs, var, [sp.csr_matrix(counts)], tile=TILE)


@pytest.fixture(scope="module")
def cells():
    """soma_joinids of some of the cells, and which are of the training split."""
    ids = np.flatnonzero(np.arange(N) % 5)
    return ids, np.random.default_rng(1).random(len(ids)) < 0.7


IDENTITY = np.arange(G, dtype=np.int32)


def test_statistics_are_those_of_the_dense_matrix(store, counts, cells):
    ids, train = cells
    stats, kept = count_statistics(store, ids, train, IDENTITY, G)
    x = counts[ids].astype(np.float64)
    assert kept.all()
    np.testing.assert_array_equal(stats.library_size, x.sum(1))
    np.testing.assert_array_equal(stats.n_expressed, (x > 0).sum(1))
    np.testing.assert_array_equal(stats.gene_cells, (x[train] > 0).sum(0))
    np.testing.assert_array_equal(stats.gene_sum, x[train].sum(0))
    np.testing.assert_array_equal(stats.gene_sum_squares, (x[train] ** 2).sum(0))
    np.testing.assert_allclose(stats.mean, x[train].mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.variance, x[train].var(0), rtol=1e-9)


@pytest.mark.parametrize("min_cells", [1, 5, 60, 250])
def test_rare_genes_are_left_out_in_the_same_pass(store, counts, cells, min_cells, monkeypatch):
    ids, train = cells
    reads = counted_reads(monkeypatch)
    stats, kept = count_statistics(store, ids, train, IDENTITY, G, min_cells=min_cells)
    assert sum(reads) == len(ids)
    x = counts[ids].astype(np.float64)
    np.testing.assert_array_equal(kept, (x[train] > 0).sum(0) >= min_cells)
    x = x[:, kept]
    assert 0 < x.shape[1] < G
    np.testing.assert_array_equal(stats.library_size, x.sum(1))
    np.testing.assert_array_equal(stats.n_expressed, (x > 0).sum(1))
    np.testing.assert_array_equal(stats.gene_cells, (x[train] > 0).sum(0))
    np.testing.assert_array_equal(stats.gene_sum_squares, (x[train] ** 2).sum(0))


def counted_reads(monkeypatch) -> list[int]:
    """Cells of each read from now on."""
    reads: list[int] = []
    real = statistics.SomaStore.read_ragged

    def read(self, ids, lut=None):
        reads.append(len(ids))
        return real(self, ids, lut)

    monkeypatch.setattr(statistics.SomaStore, "read_ragged", read)
    return reads


def test_too_many_rare_counts_are_read_a_second_time_to_the_same_end(store, cells, monkeypatch):
    ids, train = cells
    # genes outside the vocabulary, of which the last one is not the last of the source
    lut = np.where(IDENTITY % 7 == 3, -1, IDENTITY).astype(np.int32)
    once, kept = count_statistics(store, ids, train, lut, G, min_cells=60)
    monkeypatch.setattr(statistics, "MAX_HELD", 50)
    reads = counted_reads(monkeypatch)
    twice, kept_again = count_statistics(store, ids, train, lut, G, min_cells=60)
    assert sum(reads) == 2 * len(ids)
    np.testing.assert_array_equal(kept, kept_again)
    assert same(once, twice, but=("content",))


def same(a, b, but=()) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name not in but)


@pytest.mark.parametrize("reads_per_task", [1, 2, 3, 100])
def test_the_result_does_not_depend_on_how_it_is_cut(store, cells, monkeypatch, reads_per_task):
    ids, train = cells
    expected, _ = count_statistics(store, ids, train, IDENTITY, G, min_cells=60)
    monkeypatch.setattr(statistics, "READS_PER_TASK", reads_per_task)
    monkeypatch.setattr(statistics, "each_in_order", lambda f, shared, parts, parallel: (f(shared, p) for p in parts))
    found, _ = count_statistics(store, ids, train, IDENTITY, G, min_cells=60, parallel=True)
    assert same(found, expected)


def test_the_content_is_that_of_the_counts(store, cells, counts, tmp_path):
    ids, train = cells
    one = count_statistics(store, ids, train, IDENTITY, G)[0].content
    assert count_statistics(store, ids, ~train, IDENTITY, G)[0].content == one  # whatever the split
    swapped = counts.copy()
    swapped[3, [0, 1]] = swapped[3, [1, 0]] + [[0, 1]]  # one count, of one cell
    obs = pd.DataFrame({"is_primary_data": [True] * N})
    var = pd.DataFrame({"feature_id": [f"g{i}" for i in range(G)], "feature_name": "x", "feature_length": 0})
    other = write_experiment(tmp_path / "soma", obs, var, [sp.csr_matrix(swapped)], tile=TILE)
    assert count_statistics(other, ids, train, IDENTITY, G)[0].content != one


def test_if_no_gene_is_kept_the_statistics_say_by_how_much(store, cells):
    ids, train = cells
    stats, kept = count_statistics(store, ids, train, IDENTITY, G, min_cells=N + 1)
    assert not kept.any()
    assert stats.gene_cells.max() == train.sum()


def test_entries_of_decided_genes_are_let_go(monkeypatch):
    monkeypatch.setattr(statistics, "MAX_HELD", 16)
    held = RareEntries()
    part = CountEntries(np.arange(4), np.arange(4, dtype=np.int32), np.ones(4, np.float32))
    for i in range(15):  # gene 0 alone stays undecided after the first part
        assert held.add(part, 4 * i, np.array([True, i == 0, i == 0, i == 0]))
    total, number = held.of_cells(np.array([True, False, False, False]), 60)
    np.testing.assert_array_equal(number, np.arange(60) % 4 == 0)
    np.testing.assert_array_equal(total, number)
    assert not held.add(part, 60, np.ones(4, bool))
