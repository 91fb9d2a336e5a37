"""Reads the cells of a case with anndata, scanpy, scipy, tiledbsoma and csv alone.

This is what the readers of this code base must agree with, so nothing of theirs is used here.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from helpers.files.corpus.case import Written

VERSION = re.compile(r"^(ENS[A-Z]*\d{6,})\.\d+$")
WORDS_FOR_NOTHING = ("", "nan", "NaN", "<NA>")  # docs/configuration.md, ingest.missing_text, and the empty text


@dataclass(frozen=True)
class PlainCells:
    """Cells as a person would read them.

    Attributes:
        counts: (n, g), 64-bit floats.
        genes: Ids without versions, (g,).
        labels: A column of texts for each label, None for cells that have none, (n,).
    """

    counts: sp.csr_matrix
    genes: list[str]
    labels: pd.DataFrame

    def kept(self, *, drop: bool) -> PlainCells:
        """Return the cells with a count, and without those that lack a label if they are dropped."""
        some = np.asarray(self.counts.sum(1)).ravel() > 0
        if drop and len(self.labels.columns):
            some &= self.labels.notna().all(axis=1).to_numpy()
        return PlainCells(self.counts[np.flatnonzero(some)], self.genes, self.labels[some].reset_index(drop=True))


def read_plain(written: Written) -> PlainCells:
    """Read the cells of a usable case."""
    kind = written.source["type"]
    return {"h5ad": _h5ad, "10x": _tenx, "soma": _soma}[kind](written)


def joined(parts: list[PlainCells]) -> PlainCells:
    """Put the cells of several files under one another; genes that a file lacks are zero in its cells."""
    made = [ad.AnnData(p.counts, obs=p.labels.set_axis(map(str, range(len(p.labels)))), var=pd.DataFrame(index=p.genes))
            for p in parts]  # fmt: skip
    whole = ad.concat(made, join="outer", fill_value=0) if len(made) > 1 else made[0]
    labels = pd.concat([p.labels for p in parts], ignore_index=True)
    return PlainCells(sp.csr_matrix(whole.X), list(whole.var_names), labels)


def class_text(value: Any) -> str | None:
    """Return the text that names a class: whole numbers without a point, booleans as words."""
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, (bool, np.bool_)):
        return "True" if value else "False"
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else str(int(value)) if value == int(value) else str(value)
    return str(value)


def texts(column: pd.Series, nothing: tuple[str, ...]) -> list[str | None]:
    """Return the class of each cell."""
    found = [class_text(value) for value in column.array]
    return [None if text in nothing else text for text in found]


def _nothing(written: Written) -> tuple[str, ...]:
    given = written.case.config.get("missing_text")
    return WORDS_FOR_NOTHING if given is None else ("", *given)


def _ids(names: Any) -> list[str]:
    return [VERSION.sub(r"\1", str(x)) for x in names]


# ---- h5ad --------------------------------------------------------------------------------------------------------
def _h5ad(written: Written) -> PlainCells:
    path = written.path
    if path.is_dir():
        paths = sorted(path.glob("*.h5ad"))
    else:
        paths = [path] if path.exists() else sorted(path.parent.parent.glob("/".join(path.parts[-2:])))
    names = [p.stem if len({q.stem for q in paths}) == len(paths) else p.parent.name for p in paths]
    return joined([_one_h5ad(p, name, written) for p, name in zip(paths, names, strict=True)])


def _one_h5ad(path: Path, name: str, written: Written) -> PlainCells:
    try:
        cells = ad.read_h5ad(path)
        layer = written.source.get("layer")
        matrix = cells.X if layer is None else cells.raw.X if layer == "raw" else cells.layers[_name(layer)]
        obs, var = cells.obs, cells.raw.var if layer == "raw" else cells.var
        counts = sp.csr_matrix(matrix).astype(np.float64)
    except Exception:  # any: anndata reads a file as a whole, and cannot read all that is in some
        counts, obs, var = _by_parts(path, written.source.get("layer"))
    columns = written.source.get("columns", {})
    asked = {label: columns.get(label, label) for label in written.case.labels}
    defaults = {"dataset_id": name, "obs_id": obs.index.astype(str), "is_primary_data": True}
    labels = {k: texts(obs[v] if v in obs else pd.Series(defaults[v], index=obs.index), _nothing(written))
              for k, v in asked.items()}  # fmt: skip
    ids = var.index if (gene_id := _gene_id(written, path)) is None else var[gene_id]
    return PlainCells(counts, _ids(ids), pd.DataFrame(labels, index=range(len(obs)), dtype=object))


def _name(layer: str) -> str:
    return layer.removeprefix("layers/")


def _gene_id(written: Written, path: Path) -> str | None:
    """Return the column of gene ids: as set, or the column that the only file of symbols has."""
    if written.case.name == "files: ids and symbols with ids" and path.name == "b.h5ad":
        return "gene_ids"
    return written.source.get("gene_id")


def _by_parts(path: Path, layer: str | None) -> tuple[sp.csr_matrix, pd.DataFrame, pd.DataFrame]:
    """Read the matrix with h5py and scipy, and the tables column by column with anndata."""
    with h5py.File(path) as file:
        place = {None: "X", "raw": "raw/X"}.get(layer, f"layers/{_name(layer or '')}")
        node = file[place]
        if isinstance(node, h5py.Dataset):
            counts = sp.csr_matrix(node[:].astype(np.float64))
        else:
            kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format"))
            parts = [node["data"][:].astype(np.float64), *(node[p][:].astype(np.int64) for p in ("indices", "indptr"))]
            shape = tuple(node.attrs.get("shape", node.attrs.get("h5sparse_shape")))
            counts = sp.csr_matrix((sp.csc_matrix if str(kind).startswith("csc") else sp.csr_matrix)(
                tuple(parts), shape=shape))  # fmt: skip
        return counts, _table(file["obs"]), _table(file["raw/var" if layer == "raw" else "var"])


def _table(node: h5py.Group) -> pd.DataFrame:
    columns = {}
    for name in node.attrs["column-order"]:
        try:
            columns[name] = ad.io.read_elem(node[name])
        except Exception:  # any: an encoding that anndata does not know
            continue
    index = ad.io.read_elem(node[node.attrs["_index"]])
    return pd.DataFrame({k: pd.Series(v).array for k, v in columns.items()}, index=pd.Index(index).astype(str))


# ---- 10x ---------------------------------------------------------------------------------------------------------
def _tenx(written: Written) -> PlainCells:
    path, genome = written.path, written.source.get("genome")
    paths = [path] if path.exists() else sorted(written.folder.glob(str(path.relative_to(written.folder))))
    table = written.source.get("obs")
    parts = []
    for p in paths:
        sample = p.parts[-3] if p.parts[-2] == "outs" else p.stem if p.is_file() else p.name
        counts, ids, barcodes = _h5(p, genome) if p.is_file() else _folder(p)
        own = {"dataset_id": [sample] * len(barcodes)} if "dataset_id" in written.case.labels else {}
        labels = pd.DataFrame(own, index=range(len(barcodes)), dtype=object)
        if table is not None:
            rows = {r["barcode"]: r for r in _rows(Path(table)) if len(paths) == 1 or r["sample"] == sample}
            columns = written.source.get("columns", {})
            for label in written.case.labels:
                values = [rows.get(b, {}).get(columns.get(label, label)) for b in barcodes]
                labels[label] = [None if v in _nothing(written) else v for v in values]
        parts.append(PlainCells(counts, _ids(ids), labels))
    return joined(parts)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if path.suffix == ".parquet":
        yield from pd.read_parquet(path).astype(str).to_dict("records")
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")


def _folder(folder: Path) -> tuple[sp.csr_matrix, list[str], list[str]]:
    def lines(*names: str) -> list[list[str]]:
        path = next(p for n in names for p in (folder / n, folder / f"{n}.gz") if p.exists())
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return [line.split("\t") for line in text.decode().splitlines()]

    matrix = next(p for n in ("matrix.mtx", "matrix.mtx.gz") if (p := folder / n).exists())
    counts = sp.csr_matrix(scipy.io.mmread(matrix).T).astype(np.float64)
    features = lines("features.tsv", "genes.tsv")
    genes = [i for i, row in enumerate(features) if len(row) < 3 or row[2] == "Gene Expression"]
    return counts[:, genes], [features[i][0] for i in genes], [row[0] for row in lines("barcodes.tsv")]


def _h5(path: Path, genome: str | None) -> tuple[sp.csr_matrix, list[str], list[str]]:
    import scanpy

    cells = scanpy.read_10x_h5(path, genome=genome, gex_only=True)
    return sp.csr_matrix(cells.X).astype(np.float64), list(cells.var["gene_ids"]), list(cells.obs_names)


# ---- SOMA --------------------------------------------------------------------------------------------------------
def _soma(written: Written) -> PlainCells:
    import tiledbsoma

    with tiledbsoma.open(str(written.path)) as experiment:
        measurements, source = list(experiment.ms), written.source
        name = source.get("measurement") or ("RNA" if "RNA" in measurements else measurements[0])
        measurement = experiment.ms[name]
        layer = source.get("layer") or ("raw" if "raw" in measurement.X else next(iter(measurement.X)))
        obs, var = (f.read().concat().to_pandas() for f in (experiment.obs, measurement.var))
        table = measurement.X[layer].read().tables().concat()
        place = (table["soma_dim_0"].to_numpy(), table["soma_dim_1"].to_numpy())
        counts = sp.coo_matrix((table["soma_data"].to_numpy().astype(np.float64), place), (len(obs), len(var)))
    labels = {label: texts(obs[label], _nothing(written)) for label in written.case.labels}
    ids = var["feature_id" if "feature_id" in var else "var_id"]
    return PlainCells(sp.csr_matrix(counts), _ids(ids), pd.DataFrame(labels, index=range(len(obs)), dtype=object))
