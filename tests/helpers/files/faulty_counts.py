"""Cells whose values are no counts, or are stored in an unusual way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import scipy.sparse as sp

from helpers.files.fault_case import Case
from helpers.files.h5ad_cases import G, N, counts, save

TOO_LARGE = "no gene is counted so often in a cell, and such a number would be changed: see how the values were made"
SAME = "rescaled or downsampled to the same total (about 10,000 in every cell); are these raw counts?"
RAW = "raw counts are needed, not normalised, log-transformed or scaled values"


def cells(change: Callable[[np.ndarray], Any]) -> Callable[[Path], Path]:
    """A file of the usual cells, changed."""
    return lambda folder: save(folder / "a.h5ad", change(counts()))


def put(places: dict[tuple[int, int], float], kind: Any = sp.csr_matrix) -> Callable[[Path], Path]:
    """A file of the usual cells with other values in some places."""

    def change(x: np.ndarray) -> Any:
        for place, value in places.items():
            x[place] = value
        return kind(x)

    return cells(change)


def edited(edit: Callable[[h5py.File], None]) -> Callable[[Path], Path]:
    """A file of the usual cells, changed as HDF5."""

    def make(folder: Path) -> Path:
        path = save(folder / "a.h5ad")
        with h5py.File(path, "a") as file:
            edit(file)
        return path

    return make


def unsorted(f: h5py.File) -> None:
    f["X/indices"][:2] = [1, 0]


def explicit_zeros(f: h5py.File) -> None:
    f["X/data"][[7, 9]] = 0


def twice(f: h5py.File) -> None:
    f["X/indices"][7] = 0


def without_x(*, layer: bool = False, raw: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        a = ad.read_h5ad(save(folder / "whole.h5ad"))
        if raw:
            a.raw = a
        if layer:
            a.layers["counts"] = a.X.copy()
        a.X = None
        a.write_h5ad(folder / "a.h5ad")
        return folder / "a.h5ad"

    return make


def no_counts_but_elsewhere(folder: Path) -> Path:
    a = ad.read_h5ad(save(folder / "whole.h5ad"))
    a.layers["umi"] = a.X.copy()
    a.X = np.log1p(a.X.toarray())
    a.write_h5ad(folder / "a.h5ad")
    return folder / "a.h5ad"


def one_is_many(x: np.ndarray) -> np.ndarray:
    x[3] *= 5000
    return x


VALUES = [
    Case("D:negative-counts", put({(5, 1): -1, (6, 1): -2}),
         says=("2 values are negative (first: cell c5, gene ENSG00000000001, value -1; cell c6", RAW),
         refused=("2 values of 40 cells are negative (first: cell c5, gene ENSG00000000001, value -1)", RAW)),
    Case("D:non-integer", cells(np.log1p),
         says=("240 values are not whole numbers (first: cell c0", "these look like log-transformed values"),
         refused=("240 values of 40 cells are not whole numbers", RAW)),
    Case("D:non-integer", cells(lambda x: x / x.sum(1, keepdims=True) * 1e4), also="normalised",
         says=("these look like values normalised to 10,000 per cell",),
         refused=("are not whole numbers", "this file holds no other counts")),
    Case("D:non-integer", no_counts_but_elsewhere, also="counts-elsewhere",
         says=("240 values are not whole numbers", "this file has counts elsewhere: set ingest.source.layer: umi"),
         refused=("this file has some elsewhere: set ingest.source.layer: umi",)),
    Case("D:non-finite", put({(0, 0): np.nan, (1, 2): np.inf}),
         says=("2 values are NaN or infinite (first: cell c0, gene ENSG00000000000, value nan; cell c1", RAW),
         refused=("2 values of 40 cells are NaN or infinite (first: cell c0", RAW)),
    Case("D:non-finite", put({(0, 0): np.nan, (5, 1): -1, (7, 2): 0.5}), also="all-at-once",
         says=("1 values are NaN", "1 values are negative", "1 values are not whole numbers"),
         refused=("are NaN or infinite", "are negative", "are not whole numbers")),
    Case("D:above-2^24", put({(11, 3): 1 << 25}),
         says=("1 values are above 16,777,216, more than 32-bit floats count exactly (first: cell c11", TOO_LARGE),
         refused=("1 values of 40 cells are above 16,777,216", TOO_LARGE)),
    Case("D:above-2^24", put({(11, 3): 1 << 25}, lambda x: sp.csr_matrix(x.astype(np.int64))), also="int64",
         says=("1 values are above 16,777,216",), refused=("1 values of 40 cells are above 16,777,216",)),
    Case("D:library-size-outlier", cells(one_is_many),
         says=("1 cells have over 50 times the median of", "counts (first: cell c3: ", "doublets or sums of cells?")),
]  # fmt: skip

LAYOUTS = [
    Case("D:layout", cells(kind), also=name)
    for name, kind in {
        "dense": np.asarray,
        "csc": sp.csc_matrix,
        "int64": lambda x: sp.csr_matrix(x.astype(np.int64)),
        "uint16": lambda x: x.astype(np.uint16),
        "float64": lambda x: sp.csr_matrix(x.astype(np.float64)),
        "csc-float64": lambda x: sp.csc_matrix(x.astype(np.float64)),
    }.items()
] + [
    Case("D:unsorted-indices", edited(unsorted),
         says=("1 indices of X are not in order; they are sorted on the way in",)),
    Case("D:unsorted-indices", edited(twice), also="twice",
         says=("1 entries of X come twice in a row; they are added up; call sum_duplicates()",)),
    Case("D:explicit-zeros", edited(explicit_zeros),
         says=("2 stored values of X are zero; they are dropped on the way in",)),
    Case("D:x-absent", without_x(layer=True),
         says=("the file has no X; set ingest.source.layer: counts",),
         refused=("a.h5ad has no X; set ingest.source.layer: counts",)),
    Case("D:x-absent", without_x(raw=True), also="raw",
         says=("the file has no X; set ingest.source.layer: raw",),
         refused=("a.h5ad has no X; set ingest.source.layer: raw",)),
    Case("D:x-absent", without_x(layer=True), also="named", source={"layer": "counts"}),
    Case("D:x-absent", without_x(raw=True), also="raw-named", source={"layer": "raw"}),
    Case("D:x-absent", without_x(), also="nowhere",
         says=("the file has no X; it holds no counts",), refused=("a.h5ad has no X",)),
]  # fmt: skip


def empty_cells(x: np.ndarray) -> Any:
    x[[3, 12, 30, 31]] = 0
    return sp.csr_matrix(x)


def empty_genes(x: np.ndarray) -> Any:
    x[:, [2, 4]] = 0
    return sp.csr_matrix(x)


def rescaled(x: np.ndarray) -> Any:
    return sp.csr_matrix(np.rint(x / x.sum(1, keepdims=True) * 1e4).astype(np.float32))


def drawn_down(x: np.ndarray) -> Any:
    """Counts of which as many are kept in every cell."""
    rng = np.random.default_rng(0)
    return sp.csr_matrix(np.stack([rng.multinomial(10_000, row / row.sum()) for row in x]).astype(np.float32))


MADE = [
    Case("D:non-integer", cells(rescaled), also="rounded", says=(SAME,), notes=(SAME,)),
    Case("D:non-integer", cells(drawn_down), also="downsampled", says=(SAME,), notes=(SAME,)),
]  # fmt: skip

EMPTY = [
    Case("D:empty-cells", cells(empty_cells), takes=(36, 6),
         says=("4 of 40 cells have no counts (first: cell c3; cell c12; cell c30); ingest leaves them out",),
         notes=("4 of 40 cells have no counts and are left out.",)),
    Case("D:empty-cells", cells(lambda x: sp.csr_matrix((N, G), dtype=np.float32)), also="all",
         says=("no cell has a count",), refused=("no cell has a count",)),
    Case("D:empty-genes", cells(empty_genes),
         says=("2 of 6 genes are in no cell (first: gene ENSG00000000002; gene ENSG00000000004)",
               "ingest.genes.min_cells: 1 leaves them out")),
    Case("D:empty-genes", cells(empty_genes), also="left-out", config={"genes": {"min_cells": 1}}, takes=(40, 4),
         notes=("2 genes are expressed in fewer than 1",)),
    Case("D:zero-cells", cells(lambda x: sp.csr_matrix(x[:0])),
         says=("0 cells are too few to split, train and score; at least 30 are needed",),
         refused=("0 cells are too few",)),
    Case("D:zero-cells", cells(lambda x: x[:, :0]), also="zero-genes",
         says=("there are no genes",), refused=("there are no genes",)),
    Case("D:one-cell", cells(lambda x: sp.csr_matrix(x[:1])),
         says=("1 cells are too few to split, train and score; at least 30 are needed",
               "1 classes of cell_type have one cell"),
         refused=("1 cells are too few to split, train and score; at least 30 are needed",)),
]  # fmt: skip

CASES = [*VALUES, *LAYOUTS, *MADE, *EMPTY]
