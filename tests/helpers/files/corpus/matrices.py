"""Matrices of every layout and type, stored in every way that HDF5 has, and counts in every place of a file."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from helpers.files.corpus.case import CorpusCase, counts, h5ad, replaced

LAYOUTS: dict[str, Callable] = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}
TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "bool", ">f4", ">f8", ">i4", ">u2"]
LAYERS = [
    "counts",
    "raw",
    "X",
    "null",
    "my layer",
    " counts ",
    "Größe 細胞",
    "0",
    "a:b",
    "spliced.x",
    "layers",
    "%s {x}",
]


def laid_out(layout: str, values: Callable = lambda x: x) -> Callable:
    def change(cells: ad.AnnData, rng: np.random.Generator) -> None:
        cells.X = LAYOUTS[layout](values(cells.X.toarray()))

    return change


def retyped(dtype: str) -> Callable[[h5py.File], None]:
    """Return an edit that stores the values of X in another type, some of which scipy does not have."""

    def edit(file: h5py.File) -> None:
        parent, name = (file, "X") if isinstance(file["X"], h5py.Dataset) else (file["X"], "data")
        replaced(parent, name, parent[name][:].astype(dtype))

    return edit


def chunked(**stored: object) -> Callable[[h5py.File], None]:
    """Return an edit that stores X in small pieces."""

    def edit(file: h5py.File) -> None:
        if isinstance(file["X"], h5py.Dataset):
            replaced(file, "X", file["X"][:], chunks=(7, 3), **stored)
            return
        for part in ("data", "indices", "indptr"):
            replaced(file["X"], part, file["X"][part][:], chunks=(5,), **stored)

    return edit


def index_types(indices: str, indptr: str) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        replaced(file["X"], "indices", file["X/indices"][:].astype(indices))
        replaced(file["X"], "indptr", file["X/indptr"][:].astype(indptr))

    return edit


def older_names(file: h5py.File) -> None:
    """Name the layout as h5sparse and anndata before 0.7 did."""
    shape = file["X"].attrs["shape"]
    for name in list(file["X"].attrs):
        del file["X"].attrs[name]
    file["X"].attrs.update({"h5sparse_format": "csr", "h5sparse_shape": shape})


def unsorted(file: h5py.File) -> None:
    """Store the genes of each cell in reverse order."""
    ends = file["X/indptr"][:]
    for part in ("indices", "data"):
        values = file["X"][part][:]
        rows = [values[a:b][::-1] for a, b in itertools.pairwise(ends)]
        replaced(file["X"], part, np.concatenate(rows))


def two_parts(file: h5py.File) -> None:
    """Store each count as two entries, of which one is all but one of it; entries of one gene are added up."""
    ends, indices, data = (file["X"][p][:] for p in ("indptr", "indices", "data"))
    replaced(file["X"], "indptr", ends * 2)
    replaced(file["X"], "indices", np.repeat(indices, 2))
    replaced(file["X"], "data", np.stack([data - 1, np.ones_like(data)], 1).ravel())


def one_large(value: float, dtype: str) -> Callable:
    def change(cells: ad.AnnData, rng: np.random.Generator) -> None:
        x = cells.X.toarray().astype(dtype)
        x[3, 2] = value
        cells.X = sp.csr_matrix(x)

    return change


def wide(cells: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    genes = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(3000)])
    return ad.AnnData(sp.csr_matrix(counts(rng, cells.n_obs, 3000)), obs=cells.obs, var=genes)


# ---- places ------------------------------------------------------------------------------------------------------
def in_layer(name: str, *, x: bool = True) -> Callable:
    """Return a change that moves the counts to a layer; X then holds values that are no counts, or is absent."""

    def change(cells: ad.AnnData, rng: np.random.Generator) -> None:
        cells.layers[name] = cells.X.copy()
        cells.X = np.log1p(cells.X.toarray()) if x else None

    return change


def in_raw(layout: str = "csr", *, x: bool = True) -> Callable:
    """Return a change that moves the counts to adata.raw, which has two more genes than X."""

    def change(cells: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
        cells.X = LAYOUTS[layout](cells.X.toarray())
        fewer = cells[:, :-2].copy()
        fewer.raw = cells
        fewer.X = np.log1p(fewer.X.toarray() if sp.issparse(fewer.X) else fewer.X) if x else None
        return fewer

    return change


def both_raw(cells: ad.AnnData, rng: np.random.Generator) -> None:
    """Put other counts into a layer that is called raw than into adata.raw."""
    cells.raw = cells.copy()
    cells.layers["raw"] = sp.csr_matrix(counts(rng))


CASES: list[CorpusCase] = [
    *(h5ad(f"{layout} {c or 'plain'}", laid_out(layout), compression=c) for layout in LAYOUTS
      for c in (None, "gzip", "lzf")),
    *(h5ad(f"{layout} in small pieces", laid_out(layout), edit=chunked(compression="gzip", shuffle=True))
      for layout in LAYOUTS),
    h5ad("dense, columns first", lambda a, rng: setattr(a, "X", np.asfortranarray(a.X.toarray()))),
    *(h5ad(f"{layout} of {t}", laid_out(layout, lambda x, t=t: x > 0 if t == "bool" else x), edit=retyped(t))
      for t in TYPES for layout in ("csr", "dense")),
    *(h5ad(f"csc of {t}", laid_out("csc"), edit=retyped(t)) for t in ("u1", "f2", ">i4", "u8")),
    h5ad("64-bit indices", edit=index_types("i8", "i8")),
    h5ad("unsigned indices", edit=index_types("u4", "u8")),
    h5ad("big-endian indices", edit=index_types(">i4", ">i8")),
    h5ad("h5sparse", edit=older_names),
    h5ad("indices in reverse", edit=unsorted),
    h5ad("entries in two parts", edit=two_parts),
    h5ad("largest count", one_large(1 << 24, "f4")),
    h5ad("largest count in i8", one_large(1 << 24, "i8")),
    h5ad("above the largest count", one_large((1 << 24) + 1, "i8"), usable=False),
    h5ad("above 2^63", one_large(float(1 << 63), "u8"), usable=False),
    h5ad("four genes", lambda a, rng: a[:, :4].copy(), n=200),
    h5ad("3,000 genes", wide),
    h5ad("5,000 cells", n=5000),
    h5ad("5,000 cells csc", laid_out("csc"), n=5000),
]  # fmt: skip

PLACES: list[CorpusCase] = [
    *(h5ad(f"layer {name!r}", in_layer(name), source={"layer": f"layers/{name}" if name in ("raw", "null") else name})
      for name in LAYERS),
    h5ad("layer by its path", in_layer("counts"), source={"layer": "layers/counts"}),
    h5ad("layer without X", in_layer("counts", x=False), source={"layer": "counts"}),
    h5ad("layer that is not named", in_layer("counts"), usable=False),
    h5ad("layer that is not there", in_layer("counts"), source={"layer": "count"}, usable=False),
    *(h5ad(f"raw {layout}", in_raw(layout), source={"layer": "raw"}) for layout in LAYOUTS),
    h5ad("raw without X", in_raw(x=False), source={"layer": "raw"}),
    h5ad("raw that is not named", in_raw(), usable=False),
    h5ad("raw and a layer raw: raw", both_raw, source={"layer": "raw"}),
    h5ad("raw and a layer raw: layer", both_raw, source={"layer": "layers/raw"}),
    h5ad("raw and a layer raw: X", both_raw),
    h5ad("raw that is not there", source={"layer": "raw"}, usable=False),
]  # fmt: skip
