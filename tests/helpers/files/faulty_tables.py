"""Cells whose obs or var is not what training needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from helpers.files.fault_case import Case
from helpers.files.h5ad_cases import G, N, save
from pipeline.config.job import SplitConfig
from pipeline.data.ingest.split import split_cells

IDS = [f"ENSG{i:011d}" for i in range(G)]


def genes(ids: list[str], **var: Any) -> Callable[[Path], Path]:
    """The usual cells with other gene ids, and with more columns of var."""

    def make(folder: Path) -> Path:
        path = save(folder / "a.h5ad", genes=ids)
        if var:
            a = ad.read_h5ad(path)
            a.var = a.var.assign(**var)
            a.write_h5ad(path)
        return path

    return make


def label(values: Any) -> Callable[[Path], Path]:
    return lambda folder: save(folder / "a.h5ad", cell_type=values)


def in_validation_only(folder: Path) -> Path:
    split = split_cells(pd.DataFrame({"soma_joinid": np.arange(N)}), SplitConfig())
    classes = np.array(["a", "b"] * 20, dtype=object)
    classes[np.flatnonzero(split == "validation")[0]] = "rare"
    return save(folder / "a.h5ad", cell_type=classes)


def names(folder: Path) -> Path:
    return save(folder / "a.h5ad", names=["c0", "c1", "c1", "c2", "c2", "c2", *(f"c{i}" for i in range(6, N))])


def odd_names(folder: Path) -> Path:
    return save(folder / "a.h5ad", names=[f"<b>{i}\x1b[2J" for i in range(N)])


def categories_without_codes(f: h5py.File) -> None:
    del f["obs/cell_type/codes"]
    f["obs/cell_type/codes"] = np.full(N, 7, np.int8)


def broken_codes(folder: Path) -> Path:
    path = save(folder / "a.h5ad")
    with h5py.File(path, "a") as file:
        categories_without_codes(file)
    return path


SYMBOLS = ["GAPDH", "ACTB", "CD3D", "CD3E", "MS4A1", "LYZ"]

VERSIONS = (f"1 genes are there in several versions (first: {IDS[0]}.1 and {IDS[0]}.2)",
            "so they are one gene: keep one version, or add their counts up")  # fmt: skip
NO_GENES = ("(var column feature_types) has no Gene Expression features, only others (5 Antibody Capture, 1 without a "
            "type); name a source with genes",)  # fmt: skip


def proteins(folder: Path) -> Path:
    types = [*["gene expression"] * 4, *["Antibody Capture"] * 2]
    return genes([*IDS[:4], "CD3", "CD4"], feature_types=types)(folder)


GENES = [
    Case("D:duplicate-gene-ids", genes(["GAPDH", "GAPDH", "ACTB", "ACTB", "LYZ", "LYZ"]),
         says=("3 gene ids occur more than once (first: GAPDH; ACTB; LYZ)",
               "var has no other column with an id for each gene, each once: call adata.var_names_make_unique()"),
         refused=("3 gene ids occur more than once (first: GAPDH; ACTB; LYZ)", "call adata.var_names_make_unique()")),
    Case("D:duplicate-gene-ids", genes(["GAPDH", "GAPDH", *SYMBOLS[2:]], ensembl=IDS), also="in-a-column",
         says=("name a var column of unique ids (ensembl) in ingest.source.gene_id, or call adata.var_names",),
         refused=("name a var column of unique ids (ensembl) in ingest.source.gene_id",)),
    Case("D:duplicate-gene-ids", genes(IDS, mine=["x", "x", *"abcd"]), also="of-a-column",
         source={"gene_id": "mine"},
         says=("1 gene ids occur more than once (first: x)", "each once: complete mine"),
         refused=("1 gene ids occur more than once (first: x)", "each once: complete mine")),
    Case("D:duplicate-gene-ids", genes(["GAPDH", "GAPDH", *SYMBOLS[2:]], ensembl=IDS), also="mended",
         source={"gene_id": "ensembl"}),
    Case("D:duplicate-gene-ids", genes([f"{IDS[0]}.1", f"{IDS[0]}.2", *IDS[2:]]), also="by-version",
         says=VERSIONS, refused=VERSIONS),
    Case("D:symbols", genes(SYMBOLS, ensembl=IDS),
         says=("6 of 6 gene ids are no Ensembl ids (first: GAPDH; ACTB; CD3D)",
               "models and files are matched by Ensembl id: set ingest.source.gene_id: ensembl")),
    Case("D:symbols", genes([*IDS[:4], "nan", ""]), also="no-id",
         says=("2 genes have no id; var has no other column with an id for each gene",),
         refused=("2 genes have no id",)),
    Case("D:symbols", genes(SYMBOLS, ensembl=[*IDS[:4], None, None]), also="ids-lacking",
         says=("6 of 6 gene ids are no Ensembl ids",
               "var column ensembl holds them and cannot be used: 2 genes have no id in it")),
    Case("D:symbols", genes(SYMBOLS, ensembl=[*IDS[:4], None, None]), also="ids-lacking-and-chosen",
         source={"gene_id": "ensembl"},
         says=("error: 2 genes have no id; var has no other column", "2 of 6 gene ids are no Ensembl ids (first: nan",
               "models and files are matched by Ensembl id"),
         refused=("2 genes have no id; var has no other column with an id for each gene, each once: leave those genes "
                  "out, or name them",)),
    Case("D:symbols", genes(SYMBOLS, ensembl=[*IDS[:5], f"{IDS[0]}.7"]), also="ids-repeated",
         says=("ensembl holds them and cannot be used: 1 have the id of another gene",)),
    Case("D:symbols", proteins,
         also="proteins", takes=(40, 4),
         says=("2 of 6 features are no genes (2 Antibody Capture); they are left out: the model is of gene",),
         notes=("a.h5ad: 2 of 6 features are no genes (2 Antibody Capture); they are left out",)),
    Case("D:symbols", genes(IDS, feature_types=["Antibody Capture"] * 5 + [None]), also="no-genes",
         says=NO_GENES, refused=NO_GENES),
    Case("D:symbols", genes(IDS, feature_types=["protein_coding", "lncRNA"] * 3), also="biotypes"),
    Case("D:symbols", genes([*IDS[:5], "ENSMUSG00000000001"]), also="two-organisms",
         says=("genes are of several organisms (5 human, 1 mouse) (first: ENSMUSG00000000001)",
               "keep the genes and cells of one"),
         refused=("genes are of several organisms (5 human, 1 mouse)", "keep the genes and cells of one")),
    Case("D:symbols", genes([*IDS[:5], "ENSSASG00005000001"]), also="a-virus"),
    Case("D:versioned-ids", genes([f"{x}.{i}" for i, x in enumerate(IDS)]),
         says=(f"6 gene ids have a version (first: {IDS[0]}.0; {IDS[1]}.1; {IDS[2]}.2); it is stripped",)),
]  # fmt: skip


def latin_1(folder: Path) -> Path:
    """A label as bytes of another encoding, which anndata and pandas cannot read."""
    path = save(folder / "a.h5ad")
    with h5py.File(path, "a") as file:
        del file["obs/cell_type"]
        file["obs/cell_type"] = np.array(["Müller".encode("latin-1"), b"T cell"] * (N // 2))
    return path


LATIN_1 = ("obs has no column 'cell_type'", "column cell_type of obs cannot be read and is left out (its text is not "
           "UTF-8: decode it with the encoding it was written in, and write it again)")  # fmt: skip
CELLS = [
    Case("D:duplicate-obs-names", names,
         says=("2 obs names occur more than once (first: c1; c2); cells are told apart by soma_joinid",),
         notes=("2 obs names occur more than once; cells are told apart by soma_joinid.",)),
    Case("D:duplicate-obs-names", odd_names, also="markup",
         says=("40 obs names hold markup or control characters (first: <b>0\\x1b[2J;",)),
]  # fmt: skip

LABELS = [
    Case("D:label-absent", genes(IDS), labels=("celltype", "donor"),
         says=("obs has no column 'celltype' (did you mean 'cell_type'? columns: cell_type)",
               "obs has no column 'donor'", "map it with ingest.source.columns: {donor: <column of the file>}"),
         refused=("obs has no column 'celltype' (did you mean 'cell_type'?", "obs has no column 'donor'")),
    Case("D:label-missing", label(["a", None, "b", "nan"] * 10),
         says=("20 of 40 cells have no cell_type (first: c1; c3; c5)",
               "leave them out with ingest.missing_label: drop, or label them"),
         refused=("20 of 40 cells have no cell_type (first: c1; c3; c5)", "ingest.missing_label: drop")),
    Case("D:category-in-validation-only", in_validation_only,
         says=("1 classes of cell_type have one cell (first: rare)", "they cannot be both learned and scored"),
         notes=("cell_type has no training cells of rare: it cannot be learned.",)),
    Case("D:label-types", label([1, 2] * 20), also="integer"),
    Case("D:label-types", label([True, False] * 20), also="bool"),
    Case("D:label-types", label([0.1, 0.5, 1.0, 10.0] * 10), also="doses"),
    Case("D:label-types", label(np.linspace(0.5, 9.7, N)), also="measurements",
         says=("cell_type holds 40 different measurements, not classes (first: 0.5; ",
               "cut it into ranges with pandas.cut, name another label, or make it a number"),
         refused=("cell_type holds 40 different measurements, not classes", "pandas.cut")),
    Case("D:label-types", broken_codes, also="codes-outside",
         says=("obs cannot be read",), refused=("cannot be read",)),
    Case("D:label-types", latin_1, also="latin-1", says=LATIN_1, refused=LATIN_1),
]  # fmt: skip

CASES = [*GENES, *CELLS, *LABELS]
