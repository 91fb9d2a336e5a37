"""Cell Ranger outputs that are damaged or hostile, and tables about their cells. More: `test_tenx.py`."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
import scipy.sparse as sp

from helpers.files.fault_case import Case
from helpers.files.h5ad_cases import G, N, counts

TENX = {"type": "10x"}
TABLE = {**TENX, "obs": "{folder}/cells.csv"}
IDS = [f"ENSG{i:011d}" for i in range(G)]
BARCODES = [f"AAAC{i:04d}-1" for i in range(N)]


def file(folder: Path) -> Path:
    """Version 3, as HDF5: columns are cells."""
    path, x = folder / "filtered_feature_bc_matrix.h5", sp.csr_matrix(counts().astype(np.int32))
    with h5py.File(path, "w") as f:
        m = f.create_group("matrix")
        m["barcodes"] = np.array(BARCODES, "S")
        m["data"], m["indices"], m["indptr"] = x.data, x.indices.astype(np.int64), x.indptr.astype(np.int64)
        m["shape"] = np.array([G, N], np.int32)
        features = {"id": IDS, "name": IDS, "feature_type": ["Gene Expression"] * G, "genome": ["GRCh38"] * G}
        for name, values in features.items():
            m[f"features/{name}"] = np.array(values, "S")
    return path


def texts(folder: Path) -> Path:
    """Version 3, as three text files."""
    out = folder / "sample1"
    out.mkdir()
    scipy.io.mmwrite(out / "matrix.mtx", sp.coo_matrix(counts().T.astype(np.int32)), field="integer")
    text = (out / "matrix.mtx").read_bytes().split(b"\n", 1)
    (out / "matrix.mtx").write_bytes(text[0] + '\n%metadata_json: {"sample": "Größe 細胞"}\n'.encode() + text[1])
    (out / "features.tsv").write_text("".join(f"{x}\t{x}\tGene Expression\n" for x in IDS))
    (out / "barcodes.tsv").write_text("".join(f"{x}\n" for x in BARCODES))
    return out


def with_table(labels: list[str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        rows = zip(BARCODES, labels * (N // len(labels)), strict=True)
        (folder / "cells.csv").write_text("barcode,cell_type\n" + "".join(f"{b},{c}\n" for b, c in rows))
        return texts(folder)

    return make


def edited(edit: Callable[[h5py.File], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = file(folder)
        with h5py.File(path, "a") as f:
            edit(f)
        return path

    return make


def swapped(name: str, values: Any) -> Callable[[Path], Path]:
    def edit(f: h5py.File) -> None:
        del f[name]
        if values is not None:
            f[name] = values

    return edited(edit)


def entries(text: str) -> Callable[[Path], Path]:
    """Three text files, of which the matrix says something else."""

    def make(folder: Path) -> Path:
        (texts(folder) / "matrix.mtx").write_text(f"%%MatrixMarket matrix coordinate {text}")
        return folder / "sample1"

    return make


def features(*types: str, ids: Sequence[str] = IDS) -> Callable[[Path], Path]:
    """Three text files with features of other types; the last type is that of the rest."""

    def make(folder: Path) -> Path:
        all_types = [*types, *[types[-1]] * (G - len(types))]
        lines = (f"{x}\t{x}\t{kind}\n" for x, kind in zip(ids, all_types, strict=True))
        (texts(folder) / "features.tsv").write_text("".join(lines))
        return folder / "sample1"

    return make


def packed(*names: str, changed: bool) -> Callable[[Path], Path]:
    """Three text files, some of them gzipped as well, with the same content or not."""

    def make(folder: Path) -> Path:
        out = texts(folder)
        for name in names:
            content = (out / name).read_bytes()
            (out / f"{name}.gz").write_bytes(gzip.compress(content + b"\n" * changed))
        return out

    return make


def a_pipe(folder: Path) -> Path:
    """A named pipe for a matrix: whoever opens it waits for ever."""
    out = texts(folder)
    (out / "matrix.mtx").unlink()
    os.mkfifo(out / "matrix.mtx")
    return out


def case(row: str, make: Callable[[Path], Path], also: str, *words: str, **more: Any) -> Case:
    labels = ("cell_type",) if "source" in more else ("dataset_id",)
    return Case(row, make, also=also, **{"source": TENX, "labels": labels, "says": words, "refused": words, **more})


PROTEINS = "3 of 6 features are no genes (2 Antibody Capture, 1 without a type); they are left out"
NO_GENES = "has no Gene Expression features, only others (3 Peaks, 2 Antibody Capture, 1 without a type); name a source"
ONE, HUGE = "integer general\n6 40 1\n", "integer general\n6 40 4000000000\n1 1 1\n"
CASES = [
    case("D:tenx", file, "h5"),
    case("D:tenx", texts, "texts"),
    case("D:tenx", features("gene expression"), "lower-case"),
    case("D:tenx", features("GENE EXPRESSION", "Antibody Capture", "Antibody Capture", "", "Gene Expression"),
         "proteins", says=(PROTEINS,), refused=(), notes=(PROTEINS,), takes=(40, 3),
         config={"split": {"validation": 0.3}}),
    case("D:tenx", features("Antibody Capture", "Antibody Capture", "", "Peaks"), "no-genes", NO_GENES),
    case("D:duplicate-gene-ids", features("Gene Expression", ids=[f"{IDS[0]}.1", f"{IDS[0]}.2", *IDS[2:]]), "10x",
         f"1 genes are there in several versions (first: {IDS[0]}.1 and {IDS[0]}.2)", "keep one version"),
    case("D:tenx", packed("matrix.mtx", "features.tsv", "barcodes.tsv", changed=False), "twice"),
    *(
        case("D:tenx", packed(name, changed=True), f"two-{name}",
             f"has {name} and {name}.gz, and their contents differ: which one is meant is not known",
             "delete or rename the other one")
        for name in ("matrix.mtx", "features.tsv", "barcodes.tsv")
    ),
    case("D:label-mixed", with_table(["1", "one", "1.5", "True"]), "table", source=TABLE),
    case("D:label-missing", with_table(["a", "", "b", "b"]), "table", "10 of 40 cells have no cell_type",
         source=TABLE),
    case("D:corrupt-10x", swapped("matrix/indptr", np.arange(N)), "pointers", "it is damaged"),
    case("D:corrupt-10x", swapped("matrix/indptr", np.r_[np.arange(N), -1]), "pointers-back", "it is damaged"),
    case("D:corrupt-10x", swapped("matrix/indptr", np.zeros((2, 3))), "pointers-flat", "it is damaged"),
    case("D:corrupt-10x", swapped("matrix/indices", np.full(N * G, 99)), "indices", "points at feature 99 of 6"),
    case("D:corrupt-10x", swapped("matrix/indices", np.full(N * G, -7)), "indices-negative", "points at feature -7"),
    case("D:corrupt-10x", swapped("matrix/data", np.array([b"x"] * (N * G))), "text",
         "holds no numbers where counts should be (data |S1"),
    case("D:corrupt-10x", swapped("matrix/barcodes", None), "no-barcodes", "cannot be read"),
    case("D:corrupt-10x", swapped("matrix/shape", np.array([G])), "shape", "it is damaged"),
    case("D:negative-counts", swapped("matrix/data", np.full(N * G, -1)), "10x", "240 values", "are negative"),
    case("D:external-link", swapped("matrix/data", h5py.ExternalLink("/etc/passwd", "/x")), "10x",
         "/matrix/data is a link to another file (/etc/passwd), which could be any file of yours"),
    case("D:huge-declared", entries(HUGE), "10x-entries", "is not a whole Matrix Market file"),
    case("D:huge-declared", entries("integer general\n6 4000000000000 1\n1 1 1\n"), "10x-shape",
         "is 6 x 4000000000000, but there are 6 features and 40 barcodes: the files do not belong together"),
    case("D:corrupt-10x", entries(ONE), "entries-missing", "is not a whole Matrix Market file"),
    case("D:corrupt-10x", entries(ONE + "7 1 1\n"), "entry-outside", "is not a whole Matrix Market file"),
    case("D:corrupt-10x", entries(ONE + "1 1 x\n"), "entry-text", "is not a whole Matrix Market file"),
    case("D:corrupt-10x", entries(ONE + "1 1 2x\n"), "entry-odd", "it holds b'x' where numbers should be"),
    case("D:corrupt-10x", entries(ONE + "1 1 2\xe2"), "killed-scipy", "where numbers should be"),  # no end of line
    case("D:non-finite", entries("real general\n6 40 1\n1 1 nan\n"), "10x", "are NaN or infinite"),
    case("D:corrupt-10x", a_pipe, "pipe", "has no matrix.mtx", says=("no .h5ad, Cell Ranger output",),
         refused=("no Cell Ranger output",)),
]  # fmt: skip
