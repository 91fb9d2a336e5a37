"""Entries become rows: in the order wanted, sorted by gene, with the types asked for, however they come."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pipeline.data.entries import CountEntries
from pipeline.data.loading.collate import padded
from pipeline.data.soma.assemble import CountsChanged, PlacedEntries, assemble
from scldm.data.batch import CellBatch


def entries(matrix, rows, first=0, order=None):
    coo = matrix.tocoo()
    order = slice(None) if order is None else order
    cells, genes = coo.row.astype(np.int64)[order] + first, coo.col.astype(np.int64)[order]
    return PlacedEntries(first, np.asarray(rows), CountEntries(cells, genes, coo.data.astype(np.float32)[order]))


def matrix(n=6, g=9, seed=0):
    rng = np.random.default_rng(seed)
    return sp.csr_matrix(rng.poisson(0.7, (n, g)).astype(np.float32))


def as_dense(rows, g=9):
    return sp.csr_matrix((rows.counts, rows.genes, rows.indptr), shape=(len(rows.indptr) - 1, g)).toarray()


@pytest.mark.parametrize(("gene_type", "count_type"), [(np.uint16, np.uint16), (np.int32, np.float32)])
def test_rows_go_where_they_are_wanted_from_several_answers(gene_type, count_type):
    a, b = matrix(seed=1), matrix(seed=2)
    answers = [entries(a, [3, -1, 0, -1, 4, 5], first=10), entries(b, [-1, 2, -1, 1, -1, -1], first=70)]
    rows = assemble(answers, 6, np.arange(9, dtype=np.int32), gene_type=gene_type, count_type=count_type)
    expected = np.stack([m.toarray()[i] for m, i in ((a, 2), (b, 3), (b, 1), (a, 0), (a, 4), (a, 5))])
    np.testing.assert_array_equal(as_dense(rows), expected)
    np.testing.assert_array_equal(rows.row_sums, expected.sum(1))
    assert (rows.genes.dtype, rows.counts.dtype) == (gene_type, count_type)


def test_the_order_of_entries_and_the_cuts_between_answers_change_nothing():
    m, lut = matrix(), np.array([8, 7, -1, 5, 4, 3, 2, 1, 0], np.int32)  # a vocabulary in another order, without gene 2
    whole = assemble([entries(m, range(6))], 6, lut, gene_type=np.uint16, count_type=np.uint16)
    shuffled = entries(m, range(6), order=np.random.default_rng(0).permutation(m.nnz))
    e = shuffled.entries
    parts = [PlacedEntries(0, shuffled.rows, CountEntries(e.cells[s], e.genes[s], e.counts[s]))
             for s in (slice(0, 11), slice(11, None))]  # fmt: skip
    again = assemble(parts, 6, lut, gene_type=np.uint16, count_type=np.uint16)
    for name in ("indptr", "genes", "counts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    assert all(
        (np.diff(whole.genes[a:b].astype(int)) > 0).all() for a, b in zip(whole.indptr, whole.indptr[1:], strict=False)
    )


@pytest.mark.parametrize("wrong", [0.5, 70_000.0, np.nan])
def test_counts_that_do_not_fit_are_refused(wrong):
    m = matrix()
    m.data[3] = wrong
    with pytest.raises(CountsChanged, match="uint16"):
        assemble([entries(m, range(6))], 6, np.arange(9, dtype=np.int32), gene_type=np.uint16, count_type=np.uint16)
    assemble([entries(m, range(6))], 6, np.arange(9, dtype=np.int32), gene_type=np.uint16, count_type=np.float32)


def test_no_entries_give_empty_rows():
    rows = assemble([], 3, np.arange(9, dtype=np.int32), gene_type=np.uint16, count_type=np.uint16)
    assert rows.indptr.tolist() == [0, 0, 0, 0]


def test_padding_reaches_to_the_longest_cell_of_the_batch():
    counts = torch.tensor([[0, 3.0, 0, 1], [0, 0, 0, 0], [2.0, 5, 1, 0]])
    batch = padded(CellBatch.from_dense(counts))
    assert batch.gene_ids.tolist() == [[1, 3, 0], [0, 0, 0], [0, 1, 2]]
    assert batch.counts.tolist() == [[3, 1, 0], [0, 0, 0], [2, 5, 1]]
    assert batch.lengths.tolist() == [2, 0, 3]
