"""Reads one Cell Ranger output: a folder of three text files, or an HDF5 file; versions 2 and 3 of either.

Files are untrusted: sizes and indices are checked before they are used. Features stay as they are in the file;
`tenx.py` selects genes.

scanpy's readers are not used, for reasons measured with scanpy 1.11.5 (tests compare the results of both):

* `read_10x_mtx` reads version 3 only gzipped and version 2 only unpacked, so not the folders of STARsolo or of
  Cell Ranger after gunzip; it parses names with pandas, which turns a gene called NA into a missing value; and it opens
  the matrix by path, so the text cannot be checked on its way to scipy, which crashes on some malformed files.
* `read_10x_h5` rounds int32 counts to float32 without a word, so that values above 2^24 pass as counts; accepts indices
  outside the features, which compiled code then follows; and loads the file whole, where a raw output of millions of
  barcodes is read here in chunks.

What would be left to it is the reading of six HDF5 arrays.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.config.paths.cell_files import BARCODES, FEATURES, MATRIX, tenx_pairs, tenx_part
from pipeline.data.safety.hdf5 import open_problems, unsafe
from pipeline.data.safety.matrix_market import LONGEST_LINE, ShapeError, read_matrix
from pipeline.data.validation.feature_types import GENES

CHUNK_ROWS = 4096
COMPARED = 1 << 22  # bytes at a time
LONGEST_TABLE = 1 << 30  # characters of barcodes.tsv and features.tsv


# Errors that h5py, numpy, scipy and gzip raise for a damaged file.
_DAMAGE = (OSError, KeyError, ValueError, IndexError, TypeError, EOFError, AttributeError, RuntimeError, MemoryError,
           OverflowError, zlib.error)  # fmt: skip


class TenxError(ValueError):
    """A file is no valid Cell Ranger output; the message says why."""


@dataclass(frozen=True)
class TenxMatrix:
    """Cells and features of one output."""

    features: pd.DataFrame  # id, name, type, genome ("" where the file has none)
    barcodes: list[str]
    chunks: Callable[[], Iterator[sp.csr_matrix]]  # cells x features


def open_tenx(path: Path, genome: str | None) -> TenxMatrix:
    """Open an output; its counts are read when `chunks` is called.

    Args:
        genome: Genome to read from a version 2 file that holds several.

    Raises:
        TenxError: the path is no valid output.
    """
    try:
        matrix = _open_folder(path) if path.is_dir() else _open_h5(path, genome)
    except TenxError:
        raise
    except _DAMAGE as error:
        line = (str(error).splitlines() or ["no message"])[0]
        raise TenxError(f"{path} cannot be read ({type(error).__name__}: {line})") from error
    if matrix.features["id"].eq("").any():
        raise TenxError(f"{path} has features without an id")
    return matrix


# ---- folders -----------------------------------------------------------------------------------------------------
def _open_folder(folder: Path) -> TenxMatrix:
    found = {what: tenx_part(folder, what) for what in (MATRIX, FEATURES, BARCODES)}
    if lacking := [" or ".join(what) for what, file in found.items() if file is None]:
        has = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise TenxError(f"{folder} has no {' and no '.join(lacking)} (gzipped or not); it has {has}")
    for plain, packed in tenx_pairs(folder):
        if not _hold_the_same(plain, packed):
            raise TenxError(
                f"{folder} has {plain.name} and {packed.name}, and their contents differ: which one is meant is not "
                "known; delete or rename the other one"
            )
    matrix, features, barcodes = (found[what] for what in (MATRIX, FEATURES, BARCODES))
    assert matrix is not None
    assert features is not None
    assert barcodes is not None
    table = _features(features)
    names = [line[0] for line in _lines(barcodes)]

    def chunks() -> Iterator[sp.csr_matrix]:
        cells = sp.csr_matrix(_read_text(matrix, (len(table), len(names))).T)
        for start in range(0, len(names), CHUNK_ROWS):
            yield cells[start : start + CHUNK_ROWS]

    return TenxMatrix(table, names, chunks)


def _hold_the_same(plain: Path, packed: Path) -> bool:
    """Return whether a gzipped file unpacks to another file."""
    with plain.open("rb") as a, gzip.open(packed, "rb") as b:
        while True:
            one, other = a.read(COMPARED), b.read(COMPARED)
            if one != other:
                return False
            if not one:
                return True


def _read_text(matrix: Path, shape: tuple[int, int]) -> Any:
    """Read the whole matrix, features x cells: text cannot be read in parts."""
    try:
        return read_matrix(matrix, shape)
    except ShapeError as error:
        raise TenxError(
            f"{matrix} is {error.shape}, but there are {shape[0]} features and {shape[1]} barcodes: the "
            "files do not belong together"
        ) from error
    except (ValueError, OSError, EOFError, OverflowError, MemoryError, zlib.error) as error:
        line = (str(error).splitlines() or ["no message"])[0]
        raise TenxError(f"{matrix} is not a whole Matrix Market file ({line})") from error


def _features(path: Path) -> pd.DataFrame:
    rows = _lines(path)
    if short := next((i for i, row in enumerate(rows, 1) if len(row) < 2), None):
        raise TenxError(f"{path}:{short} must hold an id and a name, tab-separated")
    kinds = [row[2] if len(row) > 2 else GENES for row in rows]  # version 2 had genes only
    return pd.DataFrame({"id": [r[0] for r in rows], "name": [r[1] for r in rows], "type": kinds, "genome": ""})


def _lines(path: Path) -> list[list[str]]:
    found, size = [], 0
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as f:
        while line := f.readline(LONGEST_LINE):
            size += len(line)
            if size > LONGEST_TABLE or len(line) == LONGEST_LINE:
                raise TenxError(f"{path} is no table of names: it is too long, or a line of it is")
            if line.strip():
                found.append(line.rstrip("\r\n").split("\t"))
    return found


# ---- HDF5 --------------------------------------------------------------------------------------------------------
def _open_h5(path: Path, genome: str | None) -> TenxMatrix:
    if not h5py.is_hdf5(path):
        raise TenxError(f"{path} is not an HDF5 file; Cell Ranger writes filtered_feature_bc_matrix.h5")
    if broken := open_problems(path):
        raise TenxError(f"{path}: {broken[0].message}")
    with h5py.File(path) as f:
        if found := [finding.message for finding in unsafe(f) if finding.level == "error"]:
            raise TenxError(f"{path}: {'; '.join(found)}")
        group, table = ("matrix", _features_v3(f)) if "matrix" in f else _features_v2(f, path, genome)
        matrix = f[group]
        barcodes = _text(matrix["barcodes"])
        indptr = matrix["indptr"][:].astype(np.int64)
        n_values, shape = matrix["data"].shape[0], tuple(int(x) for x in matrix["shape"][:])
        kinds = {name: matrix[name].dtype for name in ("data", "indices")}
        if kinds["data"].kind not in "iufb" or kinds["indices"].kind not in "iu":
            types = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            raise TenxError(f"{path} holds no numbers where counts should be ({types}): it is damaged")
        if matrix["indices"].shape[0] != n_values:
            raise TenxError(f"{path} has {n_values} values but {matrix['indices'].shape[0]} indices: it is damaged")
    if shape != (len(table), len(barcodes)) or indptr.ndim != 1 or len(indptr) != len(barcodes) + 1:
        raise TenxError(
            f"{path} says that it is {' x '.join(map(str, shape))}, but holds {len(table)} features, {len(barcodes)} "
            f"barcodes and {len(indptr) - 1} columns: it is damaged"
        )
    if indptr[0] != 0 or indptr[-1] != n_values or (np.diff(indptr) < 0).any():
        raise TenxError(f"{path} has an indptr that does not run from 0 to {n_values}: it is damaged")

    def chunks() -> Iterator[sp.csr_matrix]:
        with h5py.File(path) as f:
            for start in range(0, len(barcodes), CHUNK_ROWS):
                yield _chunk(path, f[group], indptr[start : start + CHUNK_ROWS + 1], len(table))

    return TenxMatrix(table, barcodes, chunks)


def _chunk(path: Path, matrix: h5py.Group, ends: np.ndarray, n_features: int) -> sp.csr_matrix:
    """Read consecutive cells, given by their part of indptr; indices are checked before compiled code trusts them."""
    try:
        values, indices = (matrix[k][ends[0] : ends[-1]] for k in ("data", "indices"))
        if len(indices) and (indices.min() < 0 or indices.max() >= n_features):
            bad = indices.min() if indices.min() < 0 else indices.max()
            raise TenxError(f"{path} points at feature {bad} of {n_features}: it is damaged")
        return sp.csr_matrix((values, indices, ends - ends[0]), shape=(len(ends) - 1, n_features))
    except TenxError:
        raise
    except _DAMAGE as error:
        line = (str(error).splitlines() or ["no message"])[0]
        raise TenxError(f"{path} cannot be read to its end ({type(error).__name__}: {line})") from error


def _features_v3(f: h5py.File) -> pd.DataFrame:
    features = f["matrix/features"]
    columns = {name: _text(features[key]) for name, key in (("id", "id"), ("name", "name"), ("type", "feature_type"))}
    genome = _text(features["genome"]) if "genome" in features else ""
    return pd.DataFrame(columns).assign(genome=genome)


def _features_v2(f: h5py.File, path: Path, genome: str | None) -> tuple[str, pd.DataFrame]:
    """Return the name of the genome's group, and its features; version 2 has one group for each genome."""
    genomes = [k for k in f if isinstance(f[k], h5py.Group) and {"genes", "barcodes", "indptr"} <= set(f[k])]
    if not genomes:
        raise TenxError(f"{path} is HDF5 but no Cell Ranger output (it holds {', '.join(sorted(f)[:6]) or 'nothing'})")
    if genome is None and len(genomes) > 1:
        raise TenxError(f"{path} holds {len(genomes)} genomes: set ingest.source.genome to one of {', '.join(genomes)}")
    if genome is not None and genome not in genomes:
        raise TenxError(f"{path} has no genome {genome!r} (ingest.source.genome); it has {', '.join(genomes)}")
    group = genome or genomes[0]
    table = pd.DataFrame({"id": _text(f[group]["genes"]), "name": _text(f[group]["gene_names"])})
    return group, table.assign(type=GENES, genome=group)


def _text(dataset: h5py.Dataset) -> list[str]:
    return [x.decode() if isinstance(x, bytes) else str(x) for x in dataset[:]]
