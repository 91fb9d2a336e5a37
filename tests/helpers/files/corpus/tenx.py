"""Cell Ranger outputs of both versions, with tables about their cells."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from helpers.files.corpus.case import GENES, CorpusCase, N, counts
from helpers.files.corpus.names import BARCODES, SYMBOLS

TENX: dict[str, Any] = {"type": "10x"}
TABLE = {**TENX, "obs": "{folder}/cells.csv"}
EXPRESSION, ANTIBODY = "Gene Expression", "Antibody Capture"


def write_folder(
    folder: Path, x: np.ndarray, *, version: int = 3, zipped: bool = True, ids: Sequence[str] = GENES,
    kinds: Sequence[str] | None = None, field: str = "integer",
) -> Path:  # fmt: skip
    """Write three text files; x is cells x features."""
    folder.mkdir(parents=True)
    kinds = kinds or [EXPRESSION] * len(ids)
    names = [SYMBOLS[i % len(SYMBOLS)] for i in range(len(ids))]
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(x.T), field=field)
    (folder / "barcodes.tsv").write_text("".join(f"{b}\n" for b in BARCODES[: len(x)]))
    lines = [(i, n, k)[:version] for i, n, k in zip(ids, names, kinds, strict=True)]
    features = folder / ("features.tsv" if version == 3 else "genes.tsv")
    features.write_text("".join("\t".join(line) + "\n" for line in lines))
    for file in list(folder.iterdir()) if zipped else ():
        with gzip.open(f"{file}.gz", "wb") as out:
            out.write(file.read_bytes())
        file.unlink()
    return folder


def write_h5(
    path: Path, x: np.ndarray, *, ids: Sequence[str] = GENES, kinds: Sequence[str] | None = None,
    genomes: Sequence[str] | None = None, dtype: str = "i4",
) -> Path:  # fmt: skip
    """Write the HDF5 file of version 3; x is cells x features."""
    matrix = sp.csr_matrix(x)
    names = [SYMBOLS[i % len(SYMBOLS)] for i in range(len(ids))]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(BARCODES[: len(x)], "S")
        group.create_dataset("data", data=matrix.data.astype(dtype), compression="gzip", chunks=True)
        group["indices"], group["indptr"] = matrix.indices.astype("i8"), matrix.indptr.astype("i8")
        group["shape"] = np.array(x.T.shape, "i4")
        features = {"id": ids, "name": names, "feature_type": kinds or [EXPRESSION] * len(ids),
                    "genome": genomes or ["GRCh38"] * len(ids)}  # fmt: skip
        for name, values in features.items():
            group[f"features/{name}"] = np.array(list(values), "S")
    return path


def write_h5_v2(path: Path, x: np.ndarray, genomes: Sequence[str] = ("GRCh38",)) -> Path:
    """Write the HDF5 file of version 2, a group for each genome."""
    with h5py.File(path, "w") as file:
        for i, genome in enumerate(genomes):
            matrix, group = sp.csr_matrix(np.roll(x, i, axis=0)), file.create_group(genome)
            group["barcodes"], group["genes"] = np.array(BARCODES[: len(x)], "S"), np.array(GENES, "S")
            group["gene_names"] = np.array(SYMBOLS, "S")
            group["data"], group["indices"] = matrix.data.astype("i4"), matrix.indices.astype("i8")
            group["indptr"], group["shape"] = matrix.indptr.astype("i8"), np.array(x.T.shape, "i4")
    return path


# ---- cases -------------------------------------------------------------------------------------------------------
def folder_case(name: str, place: str = "S1", table: str | None = None, **given: Any) -> CorpusCase:
    """Return a case of one folder; `table` is the text of cells.csv."""
    more = {k: given.pop(k) for k in ("source", "labels", "usable", "config") if k in given}

    def make(folder: Path, rng: np.random.Generator) -> Path:
        if table is not None:
            (folder / "cells.csv").write_bytes(table.encode())
        return write_folder(folder / place, counts(rng, g=len(given.get("ids", GENES))), **given)

    return _case(name, make, table=table is not None, **more)


def file_case(name: str, write: Callable[..., Path] = write_h5, **given: Any) -> CorpusCase:
    more = {k: given.pop(k) for k in ("source", "labels", "usable", "config") if k in given}

    def make(folder: Path, rng: np.random.Generator) -> Path:
        return write(folder / "filtered.h5", counts(rng, g=len(given.get("ids", GENES))), **given)

    return _case(name, make, **more)


def _case(name: str, make: Callable, *, table: bool = False, **more: Any) -> CorpusCase:
    defaults = {"source": TABLE if table else TENX, "labels": ("cell_type",) if table else ()}
    return CorpusCase(f"10x: {name}", make, **{**defaults, **more})


def described(classes: Sequence[str] = ("B", "T"), *, header: str = "barcode,cell_type", start: str = "",
              row: str = "{b},{c}", end: str = "\n") -> str:  # fmt: skip
    """Return the text of a table of all cells."""
    rows = [row.format(b=b, c=classes[i % len(classes)], i=i) for i, b in enumerate(BARCODES)]
    return start + end.join([header, *rows]) + end


def samples(table: str | None = None) -> Callable[[Path, np.random.Generator], Path]:
    """Return a maker of two samples, of which the second lacks a gene."""

    def make(folder: Path, rng: np.random.Generator) -> Path:
        place = "outs/filtered_feature_bc_matrix"
        write_folder(folder / "run" / "S1" / place, counts(rng))
        write_folder(folder / "run" / "S2" / place, counts(rng, g=7), ids=GENES[:7], zipped=False)
        if table is not None:
            rows = [f"{s},{b},{'BT'[i % 2]}{s}" for s in ("S1", "S2") for i, b in enumerate(BARCODES)]
            (folder / "cells.csv").write_text("\n".join([table, *rows]) + "\n")
        return folder / "run" / "*" / "outs" / "filtered_feature_bc_matrix"

    return make


def table_of_kind(ending: str) -> CorpusCase:
    """Return a case whose table is a .tsv or a .parquet file."""

    def make(folder: Path, rng: np.random.Generator) -> Path:
        table = pd.DataFrame({"barcode": BARCODES, "cell_type": ["B", "T"] * (N // 2), "score": np.arange(N) / 7})
        if ending == "parquet":
            table.to_parquet(folder / "cells.parquet", index=False)
        else:
            table.to_csv(folder / "cells.tsv", sep="\t", index=False)
        return write_folder(folder / "S1", counts(rng))

    source = {**TENX, "obs": f"{{folder}}/cells.{ending}"}
    return CorpusCase(f"10x: a table as {ending}", make, source, ("cell_type",))


MIXED = [*[EXPRESSION] * 5, *[ANTIBODY] * 3]
TWO = [*["GRCh38"] * 4, *["mm10"] * 4]
CASES: list[CorpusCase] = [
    *(folder_case(f"version {v}{' gz' if z else ''}", version=v, zipped=z) for v in (2, 3) for z in (True, False)),
    folder_case("outs", place="S1/outs/filtered_feature_bc_matrix", labels=("dataset_id",)),
    folder_case("real numbers that are whole", field="real"),
    folder_case("antibodies", kinds=MIXED),
    folder_case("ids that are numbers", ids=[str(100 + i) for i in range(8)]),
    folder_case("versions of ids", ids=[f"{g}.{i}" for i, g in enumerate(GENES)]),
    folder_case("a repeated id", ids=[*GENES[:-1], GENES[0]], usable=False),
    file_case("h5 of version 3"),
    file_case("h5 of version 3 in 64 bits", dtype="i8"),
    file_case("h5 with antibodies", kinds=MIXED),
    file_case("h5 of antibodies alone", kinds=[ANTIBODY] * 8, usable=False),
    file_case("h5 of two genomes", genomes=TWO, usable=False),
    file_case("h5 of two genomes, one named", genomes=TWO, source={**TENX, "genome": "mm10"}),
    file_case("h5 of version 2", write=write_h5_v2),
    file_case("h5 of version 2, two genomes", write=write_h5_v2, genomes=("GRCh38", "mm10"), usable=False),
    file_case("h5 of version 2, one named", write=write_h5_v2, genomes=("GRCh38", "mm10"),
              source={**TENX, "genome": "mm10"}),
    file_case("h5, another genome named", source={**TENX, "genome": "mm10"}, usable=False),
    folder_case("a label without a table", labels=("cell_type",), usable=False),
    folder_case("a table", table=described()),
    folder_case("a table with BOM and CRLF", table=described(start="\ufeff", end="\r\n")),
    folder_case("a table with quotes", table=described(["B, naive", 'T ""x""'], row='"{b}","{c}"')),
    folder_case("a table with NA", table=described(["NA", "None", "B"])),
    folder_case("a table with gaps", table=described(["B", "", "T"]), usable=False),
    folder_case("a table with gaps, dropped", table=described(["B", "", "T"]), config={"missing_label": "drop"}),
    folder_case("a table of numbers", table=described(["1", "2", "10"])),
    folder_case("a table of numbers with zeros", table=described(["001", "002", "010"])),
    folder_case("a table of booleans", table=described(["True", "False"])),
    folder_case("a table with an index", table=described(header=",barcode,cell_type", row="{i},{b},{c}")),
    folder_case("a table with more columns", table=described(header="barcode,n,cell_type,x", row="{b},{i},{c},0.5")),
    folder_case("a table without some cells", table=described(end="\n")[:-40], usable=False),
    folder_case("a table of other cells", table="barcode,cell_type\nACGT-1,B\n", usable=False),
    folder_case("a table without barcodes", table=described(header="cell,cell_type"), usable=False),
    folder_case("a table with repeated rows", table=described() + f"{BARCODES[0]},T\n", usable=False),
    folder_case("a table, column renamed", table=described(header="barcode,louvain"),
                source={**TABLE, "columns": {"cell_type": "louvain"}}),
    table_of_kind("tsv"),
    table_of_kind("parquet"),
    CorpusCase("10x: two samples", samples(), TENX, ("dataset_id",)),
    CorpusCase("10x: two samples with a table", samples("sample,barcode,cell_type"), TABLE),
    CorpusCase("10x: two samples, a table without samples", samples("batch,barcode,cell_type"), TABLE, usable=False),
]  # fmt: skip
