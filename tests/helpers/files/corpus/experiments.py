"""SOMA experiments, written by tiledbsoma's own importer and as the Census is laid out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma
import tiledbsoma.io

from helpers.files.corpus.case import GENES, CorpusCase, some_cells
from helpers.files.corpus.labels import DROP, repeated
from pipeline.data.soma.write import write_experiment

SOMA: dict[str, Any] = {"type": "soma"}
GAPS = pd.Categorical(repeated(["B", None]))


def imported(
    *, measurement: str = "RNA", layer: str = "raw", more: Callable[[ad.AnnData], None] | None = None,
    others: tuple[str, ...] = (), layers: tuple[str, ...] = (),
) -> Callable[[Path, np.random.Generator], Path]:  # fmt: skip
    """Return a maker of an experiment by `tiledbsoma.io.from_anndata`.

    Args:
        layer: Name of the layer of counts.
        more: Changes the cells before.
        others: Further measurements, with other values.
        layers: Further layers, with other values.
    """

    def make(folder: Path, rng: np.random.Generator) -> Path:
        cells, uri = some_cells(rng), str(folder / "soma")
        if more is not None:
            more(cells)
        tiledbsoma.io.from_anndata(uri, cells, measurement_name=measurement, X_layer_name=layer)
        with tiledbsoma.open(uri, "w") as experiment:
            for name in layers:
                tiledbsoma.io.add_X_layer(experiment, measurement, name, cells.X * 0.5)
            for name in others:
                _add_measurement(experiment, name, cells)
        return folder / "soma"

    return make


def _add_measurement(experiment: Any, name: str, cells: ad.AnnData) -> None:
    other = experiment.ms.add_new_collection(name, tiledbsoma.Measurement)
    var = pa.table({"soma_joinid": np.arange(cells.n_vars), "var_id": list(cells.var_names)})
    frame = other.add_new_dataframe("var", schema=var.schema, domain=[(0, cells.n_vars - 1)])
    frame.write(var)
    x, coo = other.add_new_collection("X"), cells.X.tocoo()
    array = x.add_new_sparse_ndarray("raw", type=pa.float32(), shape=cells.shape)
    array.write(pa.table({"soma_dim_0": coo.row.astype("i8"), "soma_dim_1": coo.col.astype("i8"),
                          "soma_data": coo.data * 3}))  # fmt: skip


def census_like(**columns: Any) -> Callable[[Path, np.random.Generator], Path]:
    """Return a maker of an experiment with the Census's names."""

    def make(folder: Path, rng: np.random.Generator) -> Path:
        cells = some_cells(rng)
        obs = cells.obs.reset_index(names="obs_id").assign(**columns)
        obs["cell_type"] = pd.Categorical(obs["cell_type"])
        var = pd.DataFrame({"feature_id": GENES, "feature_name": GENES, "feature_length": 0})
        write_experiment(folder / "soma", obs, var, [cells.X], tile=16)
        return folder / "soma"

    return make


def with_column(name: str, values: Any) -> Callable[[ad.AnnData], None]:
    return lambda cells: cells.obs.__setitem__(name, values)


def whole(cells: ad.AnnData) -> None:
    cells.X = cells.X.astype(np.int32)


def log_transformed(cells: ad.AnnData) -> None:
    cells.X = cells.X.log1p()


def named_by_symbol(cells: ad.AnnData) -> None:
    cells.var_names = [f"SYM{i}" for i in range(cells.n_vars)]


def few(cells: ad.AnnData) -> None:
    cells._inplace_subset_obs(slice(0, 12))


def genes(names: list[str]) -> Callable[[ad.AnnData], None]:
    return lambda cells: setattr(cells, "var_names", names)


def case(name: str, make: Callable[[Path, np.random.Generator], Path], **more: Any) -> CorpusCase:
    source = {**SOMA, **more.pop("source", {})}
    return CorpusCase(f"soma: {name}", make, source, **more)


CASES: list[CorpusCase] = [
    case("as the Census", census_like()),
    case("as the Census, internal names", census_like(split="x", label=1, group="g", library_size=2.0, n_expressed=3)),
    case("imported", imported()),
    case("imported, whole numbers", imported(more=whole)),
    case("imported, symbols", imported(more=named_by_symbol)),
    case("imported, categories", imported(more=with_column("cell_type", pd.Categorical(repeated(["B", "T"]))))),
    case("imported, label of numbers", imported(more=with_column("dose", repeated([0, 1, 5]))), labels=("dose",)),
    case("imported, label of booleans", imported(more=with_column("hit", repeated([True, False]))), labels=("hit",)),
    case("imported, gaps", imported(more=with_column("cell_type", GAPS)), usable=False),
    case("imported, gaps, dropped", imported(more=with_column("cell_type", GAPS)), config=DROP),
    case("imported, no such label", imported(), labels=("celltype",), usable=False),
    case("imported, columns of tables of ours", imported(more=with_column("split", repeated(["train", "x"]))),
         labels=("split",)),
    case("one measurement, another name", imported(measurement="Gene")),
    case("one measurement, named", imported(measurement="Gene"), source={"measurement": "Gene"}),
    case("one layer, another name", imported(layer="counts")),
    case("several measurements, the usual one", imported(others=("protein",))),
    case("several measurements, one named", imported(others=("protein",)), source={"measurement": "protein"}),
    case("several measurements, none usual", imported(measurement="Gene", others=("protein",)), usable=False),
    case("several layers, the usual one", imported(layers=("half",))),
    case("several layers, none usual", imported(layer="counts", layers=("half",)), usable=False),
    case("several layers, one named", imported(layer="counts", layers=("half",)), source={"layer": "counts"}),
    case("another layer named", imported(layers=("half",)), source={"layer": "half"}, usable=False),
    case("log-transformed", imported(more=log_transformed), usable=False),
    case("12 cells", imported(more=few), usable=False),
    case("genes of two organisms", imported(more=genes([*GENES[:-1], "ENSMUSG00000000001"])), usable=False),
    case("genes repeated but for versions", imported(more=genes([f"{GENES[0]}.1", f"{GENES[0]}.2", *GENES[2:]])),
         usable=False),
    case("genes with versions", imported(more=genes([f"{g}.3" for g in GENES]))),
    case("a layer that is not there", imported(), source={"layer": "counts"}, usable=False),
]  # fmt: skip
