"""SOMA experiments of which a part is missing, or not written yet when they are opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma

from helpers.files.fault_case import Case
from helpers.files.h5ad_cases import G, N, counts
from pipeline.data.soma.write import write_experiment

AGAIN = "copy or write the experiment again"
COUNTS = "ms/RNA/X/raw"


def experiment(folder: Path) -> Path:
    obs = pd.DataFrame({"obs_id": [f"c{i}" for i in range(N)], "cell_type": pd.Categorical(["a", "b"] * 20)})
    var = pd.DataFrame({"feature_id": [f"ENSG{i:011d}" for i in range(G)], "feature_name": "x", "feature_length": 0})
    write_experiment(folder / "soma", obs, var, [sp.csr_matrix(counts())], tile=16)
    return folder / "soma"


def described(**var: list[str | None]) -> Callable[[Path], Path]:
    """An experiment with other columns of var, as tiledbsoma writes them for a user."""

    def make(folder: Path) -> Path:
        path = experiment(folder)
        with tiledbsoma.open(str(path / "ms/RNA/var")) as frame:
            table = frame.read().concat().to_pandas().drop(columns=["feature_id", "feature_name", "feature_length"])
        shutil.rmtree(path / "ms/RNA/var")
        table = pa.Table.from_pandas(table.assign(**var), preserve_index=False)
        with tiledbsoma.DataFrame.create(str(path / "ms/RNA/var"), schema=table.schema, domain=[[0, G - 1]]) as frame:
            frame.write(table)
        return path

    return make


def without(*patterns: str) -> Callable[[Path], Path]:
    """An experiment without some of its files."""

    def make(folder: Path) -> Path:
        path = experiment(folder)
        for pattern in patterns:
            for found in path.glob(pattern):
                shutil.rmtree(found) if found.is_dir() else found.unlink()
        return path

    return make


def half_written(folder: Path) -> Path:
    """obs describes 40 cells, X holds the first 16: what a time between two writes shows."""
    path = without(f"{COUNTS}/__fragments/*", f"{COUNTS}/__commits/*")(folder)
    coo = sp.coo_matrix(counts()[:16])
    table = {"soma_dim_0": coo.row.astype(np.int64), "soma_dim_1": coo.col.astype(np.int64), "soma_data": coo.data}
    with tiledbsoma.open(str(path / COUNTS), "w") as array:
        array.write(pa.table(table))
    return path


def changed_counts(folder: Path) -> Path:
    """One count of one cell is written once more, after obs was."""
    path = experiment(folder)
    with tiledbsoma.open(str(path / COUNTS), "w") as array:
        array.write(pa.table({"soma_dim_0": [7], "soma_dim_1": [2], "soma_data": pa.array([3.0], pa.float32())}))
    return path


def case(row: str, make: Callable[[Path], Path], also: str = "", **words: Any) -> Case:
    return Case(row, make, also=also, source={"type": "soma"}, **words)


DAMAGED = (f"{COUNTS} of the SOMA experiment", "is damaged: a file of it is missing or changed", AGAIN)
IDS = [f"ENSG{i:011d}" for i in range(G)]
SYMBOLS: list[str | None] = ["GAPDH", "ACTB", "CD3D", "CD3E", "MS4A1", "LYZ"]
OTHERS = ["Antibody Capture", "Custom"]
PROTEINS = (
    "2 of 6 features are no genes (1 Antibody Capture, 1 Custom); they are left out: the model is of gene expression"
)
TWICE = ("more than once (first: ENSG00000000000)", "leave them out with ingest.genes.value_filter, or write")
LOST = "24 of 40 cells have counts by obs (nnz) and none in X (first: cell 16; cell 17; cell 18)"
CASES = [
    case("D:soma-sound", experiment),
    case("D:symbols", described(feature_id=[*IDS[:4], "CD3", "CD4"], feature_types=[*["Gene Expression"] * 4, *OTHERS]),
         "experiment", takes=(40, 4), says=(PROTEINS,), notes=(PROTEINS,)),
    case("D:symbols", described(feature_id=IDS, feature_types=["Peaks"] * G), "experiment-without-genes",
         says=("has no Gene Expression features, only others (6 Peaks); name a source with genes",),
         refused=("has no Gene Expression features, only others (6 Peaks); name a source with genes",)),
    case("D:symbols", described(feature_id=SYMBOLS, ensembl=IDS), "experiment-with-ids-elsewhere",
         says=("var column ensembl holds them, but gene ids of an experiment are read from feature_id or var_id: write "
               "the experiment again with these ids in a column feature_id",)),
    case("D:duplicate-gene-ids", described(feature_id=[IDS[0], *IDS[:5]], mine=IDS), "experiment",
         says=TWICE, refused=TWICE),
    case("D:soma-missing-fragment", without(f"{COUNTS}/__fragments/*"), says=DAMAGED, refused=DAMAGED),
    case("D:soma-missing-fragment", without(f"{COUNTS}/__fragments/*/a0.tdb"), "values", says=DAMAGED, refused=DAMAGED),
    case("D:soma-missing-fragment", without(f"{COUNTS}/__fragments/*", f"{COUNTS}/__commits/*"), "with-commit",
         says=("40 of 40 cells have counts by obs (nnz) and none in X",),
         refused=("40 of 40 cells have counts by obs (nnz) and none in X",)),
    case("D:soma-missing-fragment", without("obs/__fragments/*"), "obs",
         says=("obs of the SOMA experiment", "is damaged", AGAIN),
         refused=("obs of the SOMA experiment", "is damaged")),
    case("D:soma-missing-fragment", without("ms"), "measurement",
         says=("cannot open ms of the SOMA experiment", "check ingest.source: uri, measurement and layer"),
         refused=("cannot open ms of the SOMA experiment",)),
    case("D:soma-wrong-time", half_written,
         says=(LOST, "a fragment is missing or not written yet", AGAIN, "drop the obs columns nnz and raw_sum"),
         refused=(LOST, "a fragment is missing or not written yet")),
    case("D:soma-wrong-time", without("obs/__commits/*"), "before-obs",
         says=("0 cells are too few",), refused=("holds no cells",)),
    case("D:soma-wrong-time", changed_counts, "after",
         says=("1 of 40 cells have other counts in X than obs records (nnz, raw_sum) (first: cell 7)",),
         notes=("1 of 40 cells have other counts in X than obs records",)),
]  # fmt: skip
