"""Names of cells and genes, and what else a file may hold beside counts and labels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from helpers.files.corpus.case import GENES, CorpusCase, G, N, h5ad, replaced

SYMBOLS = ["GAPDH", "ACTB", "CD3D", "CD3E", "MS4A1", "LYZ", "NKG7", "HLA-DRA"]
BARCODES = [f"AAACCTGAG{i:04d}-1" for i in range(N)]
CELL_NAMES: dict[str, Sequence[str]] = {
    "repeated": [f"c{i // 2}" for i in range(N)],
    "all alike": ["cell"] * N,
    "unicode": [f"Zelle-{i}-細胞-é" for i in range(N)],
    "numbers": [str(i) for i in range(N)],
    "numbers with zeros": [f"{i:04d}" for i in range(N)],
    "barcodes": BARCODES,
    "one empty": ["", *(f"c{i}" for i in range(1, N))],
    "with white space": [f" c {i}\t" for i in range(N)],
    "like missing values": ["nan", "None", "NA", *(f"c{i}" for i in range(3, N))],
    "of 5,000 characters": [f"{i}" + "x" * 5000 for i in range(N)],
}
GENE_NAMES: dict[str, Sequence[str]] = {
    "symbols": SYMBOLS,
    "numbers": [str(i) for i in range(G)],
    "versions": [f"{g}.{i + 1}" for i, g in enumerate(GENES)],
    "some versions": [f"{g}.7" if i % 2 else g for i, g in enumerate(GENES)],
    "mouse": [f"ENSMUSG{i:011d}" for i in range(G)],
    "a virus": [*GENES[:-1], "ENSSASG00005000002"],
    "half symbols": [*GENES[:4], *SYMBOLS[4:]],
    "two cases": ["Actb", "ACTB", "Cd3d", "CD3D", *GENES[4:]],
    "unicode": [f"Gen-β{i}" for i in range(G)],
    "with slashes": [f"HLA/DRA {i}" for i in range(G)],
    "dates of a spreadsheet": ["1-Mar", "2-Mar", "1-Sep", "2-Sep", *GENES[4:]],
    "NA among them": ["NA", *GENES[1:]],
}
REFUSED_GENES: dict[str, Sequence[str]] = {
    "repeated": [*SYMBOLS[:-1], SYMBOLS[0]],
    "repeated but for versions": [f"{GENES[0]}.1", f"{GENES[0]}.2", *GENES[2:]],
    "one empty": ["", *GENES[1:]],
    "nan": ["nan", *GENES[1:]],
    "of two organisms": [*GENES[:-1], "ENSMUSG00000000001"],
}


def cell_names(names: Sequence[str]) -> Callable:
    return lambda cells, rng: setattr(cells, "obs_names", list(names))


def gene_names(names: Sequence[str], **columns: Any) -> Callable:
    """Return a change of the genes' names, with columns of var."""

    def change(cells: ad.AnnData, rng: np.random.Generator) -> None:
        cells.var_names = list(names)
        for name, values in columns.items():
            cells.var[name] = pd.Series(values, index=cells.var_names) if isinstance(values, list) else values

    return change


def index_called(name: str) -> Callable:
    """Return a change that names the index of obs; anndata stores it under this name."""
    return lambda cells, rng: setattr(cells.obs.index, "name", name)


def fixed_length(file: h5py.File) -> None:
    """Store names as texts of a fixed length, as R and C++ programs do."""
    for table in ("obs", "var"):
        replaced(file[table], "_index", np.array(file[table]["_index"][:], "S"))


NAMES: list[CorpusCase] = [
    *(h5ad(f"cells named: {kind}", cell_names(names)) for kind, names in CELL_NAMES.items()),
    *(h5ad(f"genes named: {kind}", gene_names(names)) for kind, names in GENE_NAMES.items()),
    *(h5ad(f"genes named: {kind}", gene_names(names), usable=False) for kind, names in REFUSED_GENES.items()),
    h5ad("ids in a column", gene_names(SYMBOLS, gene_ids=GENES), source={"gene_id": "gene_ids"}),
    h5ad("ids in a categorical column", gene_names(SYMBOLS, gene_ids=pd.Categorical(GENES)),
         source={"gene_id": "gene_ids"}),
    h5ad("ids in a column, repeated symbols", gene_names(["A"] * G, gene_ids=GENES), source={"gene_id": "gene_ids"}),
    h5ad("ids in a column of numbers", gene_names(SYMBOLS, entrez=list(range(100, 100 + G))),
         source={"gene_id": "entrez"}),
    h5ad("ids in a column that is not there", source={"gene_id": "gene_ids"}, usable=False),
    h5ad("ids in a column with repeats", gene_names(SYMBOLS, gene_ids=[GENES[0], *GENES[:-1]]),
         source={"gene_id": "gene_ids"}, usable=False),
    h5ad("names in a column", gene_names(GENES, feature_name=SYMBOLS), source={"gene_name": "feature_name"}),
    h5ad("lengths of genes", gene_names(GENES, feature_length=[float(i) for i in range(G - 1)] + [float("nan")])),
    h5ad("lengths of genes as text", gene_names(GENES, feature_length=["1000", "?", "", "1e3", "5", "6", "7", "8"])),
    *(h5ad(f"index of obs called {name}", index_called(name)) for name in ("barcode", "index", "CellID")),
    h5ad("names of a fixed length", edit=fixed_length),
]  # fmt: skip


# ---- other content -----------------------------------------------------------------------------------------------
def unknown(place: str, encoding: str = "of-the-future") -> Callable[[h5py.File], None]:
    """Return an edit that adds a group with an encoding that anndata does not know."""

    def edit(file: h5py.File) -> None:
        group = file.create_group(place)
        group.attrs.update({"encoding-type": encoding, "encoding-version": "9.9.9"})
        table, _, column = place.partition("/")
        group["values"] = np.arange(G if table == "var" else N)
        if table in ("obs", "var"):
            order = [*file[table].attrs["column-order"], column]
            file[table].attrs.create("column-order", order, dtype=h5py.string_dtype())

    return edit


def without_encodings(file: h5py.File) -> None:
    """Leave out what says of the file that it is AnnData, as other writers do."""
    for name in list(file.attrs):
        del file.attrs[name]


def full(cells: ad.AnnData, rng: np.random.Generator) -> None:
    """Add one of everything that scanpy's pipeline leaves in a file."""
    cells.obsm["X_pca"] = rng.normal(size=(N, 5))
    cells.obsm["frame"] = pd.DataFrame({"a": range(N), "b": list("xy") * (N // 2)}, index=cells.obs_names)
    cells.obsm["sparse"] = sp.random(N, 30, 0.1, format="csr", random_state=0)
    cells.varm["PCs"] = rng.normal(size=(G, 5))
    cells.obsp["distances"] = sp.random(N, N, 0.1, format="csr", random_state=0)
    cells.varp["correlation"] = rng.normal(size=(G, G))
    cells.layers["lognorm"] = np.log1p(cells.X.toarray())
    cells.uns |= {
        "neighbors": {"params": {"n_neighbors": 15, "method": "umap"}}, "log1p": {"base": None}, "colors": ["#1f77b4"],
        "empty": {}, "rank": np.rec.array([("a", 1.0)], dtype=[("names", "O"), ("scores", "f4")]), "flag": True,
        "frame": pd.DataFrame({"x": [1.5]}), "text": "細胞", "array": np.zeros((0, 3)),
    }  # fmt: skip


def columns(**values: Any) -> Callable:
    """Return a change that adds columns of obs, which no job names."""

    def change(cells: ad.AnnData, rng: np.random.Generator) -> None:
        for name, column in values.items():
            cells.obs[name] = column

    return change


def awkward(cells: ad.AnnData, rng: np.random.Generator) -> None:
    import awkward as ak

    cells.obsm["ragged"] = ak.Array([list(range(i % 3)) for i in range(N)])


CONTENT: list[CorpusCase] = [
    h5ad("everything of scanpy", full),
    h5ad("a large layer", lambda a, rng: a.layers.update({"scaled": rng.normal(size=a.shape)}), n=20_000),
    h5ad("dates as text", columns(day=["2024-01-31"] * N, when=["2024-01-31T10:00:00Z"] * N)),
    h5ad("columns of every type", columns(
        f2=np.arange(N, dtype="f2"), i1=np.arange(N, dtype="i1"), u8=np.arange(N, dtype="u8"), flag=[True, False] * 24,
        text=["a"] * N, gaps=pd.Categorical(["a", None] * 24), whole=pd.array([1, None] * 24, "Int64"),
        yes=pd.array([True, None] * 24, "boolean"), ordered=pd.Categorical(["b", "a"] * 24, ["b", "a"], ordered=True),
        none=np.full(N, np.nan), empty=[""] * N, long=["x" * 10_000] * N)),
    h5ad("columns with odd names", columns(**{"a b": 1, "ä": 2, "split": "x", "index": 3, "n_cells": 4})),
    h5ad("columns of SOMA", columns(soma_joinid=range(N), raw_sum=1.0, nnz=3, soma_x="y", counts_hash_0=7)),
    h5ad("columns of the Census", columns(
        is_primary_data=True, dataset_id="d1", donor_id="D1", assay="10x 3' v3", tissue_general="blood", obs_id="x")),
    h5ad("100 columns", columns(**{f"column {i}": i for i in range(100)})),
    *(h5ad(f"unknown encoding in {place}", edit=unknown(place))
      for place in ("obs/odd", "var/odd", "obsm/odd", "obsp/odd", "uns/odd", "layers/odd", "varm/odd", "odd")),
    h5ad("no encoding of the file", edit=without_encodings),
]  # fmt: skip
if importlib.util.find_spec("awkward") is not None:
    CONTENT.append(h5ad("awkward array", awkward))
