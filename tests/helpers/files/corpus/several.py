"""Several files that are read together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from helpers.files.corpus.case import GENES, CorpusCase, N, some_cells
from helpers.files.corpus.labels import DROP, label, repeated
from helpers.files.corpus.names import SYMBOLS

Make = Callable[[np.random.Generator, str], ad.AnnData]


def plain(rng: np.random.Generator, name: str) -> ad.AnnData:
    return some_cells(rng, name=name)


def cells(genes: list[str] = GENES, n: int = N, **var: Any) -> Make:
    def make(rng: np.random.Generator, name: str) -> ad.AnnData:
        made = some_cells(rng, n, genes, name)
        made.var = made.var.assign(**var)
        return made

    return make


def labelled(values: Any, name: str = "cell_type") -> Make:
    """Return cells whose only column is a label."""

    def make(rng: np.random.Generator, cell: str) -> ad.AnnData:
        made = some_cells(rng, name=cell)
        del made.obs["cell_type"]
        label(values, name)(made, rng)
        return made

    return make


def stored(change: Callable[[np.ndarray], Any]) -> Make:
    """Return cells whose matrix is of another kind."""

    def make(rng: np.random.Generator, name: str) -> ad.AnnData:
        made = some_cells(rng, name=name)
        made.X = change(made.X.toarray())
        return made

    return make


def layered(rng: np.random.Generator, name: str) -> ad.AnnData:
    made = some_cells(rng, name=name)
    made.layers["counts"] = made.X.copy()
    made.X = np.log1p(made.X.toarray())
    made.raw = made.copy()
    made.raw = ad.AnnData(made.layers["counts"], var=made.var, obs=made.obs)
    return made


def files(name: str, *makes: Make, places: list[str] | None = None, asked: str = "", **more: Any) -> CorpusCase:
    """Return a case of several files.

    Args:
        places: Their names in the folder; by default a.h5ad, b.h5ad, …
        asked: The path that a user names inside the folder; by default the folder.
    """

    def make(folder: Path, rng: np.random.Generator) -> Path:
        for i, one in enumerate(makes):
            path = folder / (places[i] if places else f"{chr(97 + i)}.h5ad")
            path.parent.mkdir(exist_ok=True, parents=True)
            one(rng, f"{chr(97 + i)}-").write_h5ad(path)
        return folder / asked if asked else folder

    return CorpusCase(f"files: {name}", make, **more)


def with_others(rng: np.random.Generator, folder: Path) -> Path:
    """Write one `.h5ad` file beside files of other kinds."""
    some_cells(rng).write_h5ad(folder / "cells.h5ad")
    (folder / "README.md").write_text("about these cells\n")
    (folder / "cells.csv").write_text("a,b\n1,2\n")
    return folder


ENTREZ = [str(100 + i) for i in range(len(GENES))]
CASES: list[CorpusCase] = [
    files("alike", plain, plain),
    files("three", plain, plain, plain),
    files("genes in another order", plain, cells(GENES[::-1])),
    files("genes overlap", cells(GENES[:6]), cells(GENES[2:])),
    files("genes of one are a part", plain, cells(GENES[:5])),
    files("three, each lacks genes", cells(GENES[:6]), cells(GENES[3:]), cells([*GENES[:2], *GENES[6:]])),
    files("other genes", cells(GENES[:4]), cells(GENES[4:]), usable=False),
    files("versions of ids", cells([f"{g}.1" for g in GENES]), cells([f"{g}.2" for g in GENES])),
    files("ids and symbols with ids", plain, cells(SYMBOLS, gene_ids=GENES)),
    files("ids and symbols", plain, cells(SYMBOLS), usable=False),
    files("symbols", cells(SYMBOLS), cells(SYMBOLS[::-1])),
    files("symbols in two cases", cells(SYMBOLS), cells([s.lower() for s in SYMBOLS]), usable=False),
    files("ids in a column", cells(SYMBOLS, ensembl=GENES), cells(SYMBOLS[::-1], ensembl=GENES[::-1]),
          source={"gene_id": "ensembl"}),
    files("ids in a column of one", cells(SYMBOLS, ensembl=GENES), plain, source={"gene_id": "ensembl"}, usable=False),
    files("ids that are numbers", cells(ENTREZ), cells(ENTREZ[::-1])),
    files("a repeated gene in one", plain, cells([*GENES[:-1], GENES[0]]), usable=False),
    files("two organisms", plain, cells([g.replace("ENSG", "ENSMUSG") for g in GENES]), usable=False),
    files("csr, csc and dense", plain, stored(sp.csc_matrix), stored(np.asarray)),
    files("of different types", stored(lambda x: x.astype("i8")), stored(lambda x: x.astype("u1")),
          stored(lambda x: sp.csr_matrix(x.astype("f8")))),
    files("one is log-transformed", plain, stored(np.log1p), usable=False),
    files("one has negative values", plain, stored(lambda x: -x), usable=False),
    files("counts in a layer", layered, layered, source={"layer": "counts"}),
    files("counts in raw", layered, layered, source={"layer": "raw"}),
    files("one lacks the layer", layered, plain, source={"layer": "counts"}, usable=False),
    files("one lacks the label", plain, labelled(["B"], "celltype"), usable=False),
    files("one lacks the label, dropped", plain, labelled(["B"], "celltype"), config=DROP, usable=False),
    files("gaps in one", plain, labelled(["B", ""]), usable=False),
    files("gaps in one, dropped", plain, labelled(["B", ""]), config=DROP),
    files("categories differ", *(labelled(pd.Categorical(repeated(c))) for c in (["B", "T"], ["NK"]))),
    files("orders of categories differ", *(labelled(pd.Categorical(repeated(["l", "h"]), order, ordered=True))
                                           for order in (["l", "h"], ["h", "l"]))),
    files("labels are numbers and text", labelled([0, 1]), labelled(["0", "1"])),
    files("labels are floats and whole numbers", labelled([0.0, 1.0]), labelled([0, 1])),
    files("labels are booleans and text", labelled([True, False]), labelled(["True", "False"])),
    files("labels are nullable and plain", labelled(pd.array(repeated([1, 2]), "Int64")), labelled([1, 2])),
    files("labels differ by case", labelled(["T cell"]), labelled(["t cell"])),
    files("the same cells twice", lambda rng, name: some_cells(np.random.default_rng(1)),
          lambda rng, name: some_cells(np.random.default_rng(1))),
    files("the same name in two folders", plain, plain, places=["x/cells.h5ad", "y/cells.h5ad"], asked="*/cells.h5ad",
          labels=("dataset_id",)),
    files("a pattern", plain, plain, plain, places=["in1.h5ad", "in2.h5ad", "out.h5ad"], asked="in*.h5ad"),
    files("names with brackets", plain, plain, places=["a [1].h5ad", "b é.h5ad"]),
    files("labels are names of files", plain, plain, labels=("dataset_id",)),
    files("one is small", plain, cells(n=3)),
    files("one has no cells", plain, cells(n=0)),
    files("all are small", cells(n=9), cells(n=9), usable=False),
    files("both small, enough together", cells(n=30), cells(n=18)),
    CorpusCase("files: one beside others", lambda folder, rng: with_others(rng, folder)),
]  # fmt: skip
