"""Reads a count matrix of an untrusted HDF5 file in pieces: sparse by rows or by columns, or dense.

Nothing that a file declares is trusted: pointers, lengths and indices are checked before they are used, since compiled
code that trusts them reads outside its memory. A piece is `CountEntries`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from pipeline.data.entries import CountEntries
from pipeline.data.findings import Finding, error, warning

PIECE = 1 << 21  # values at a time
MAX_CELLS, MAX_GENES = 1 << 31, 1 << 20
_FIX = "save it again from an intact copy (scipy's sort_indices() and sum_duplicates() fix order and repeats)"


@dataclass(frozen=True)
class CountMatrix:
    """A matrix in a file and its layout."""

    node: Any  # h5py group or dataset
    kind: str  # csr, csc or dense
    shape: tuple[int, int]  # cells, genes


def find_matrix(node: Any, name: str) -> CountMatrix | Finding:
    """Read the layout of a group or dataset; return a Finding if it cannot be a count matrix."""
    if isinstance(node, h5py.Dataset):
        if len(node.shape or ()) != 2 or node.dtype.kind not in "iufb":
            return error(
                f"{name} is {node.dtype} of shape {node.shape}", "counts are a matrix of numbers, cells x genes"
            )
        return _sized(CountMatrix(node, "dense", (int(node.shape[0]), int(node.shape[1]))), name)
    attrs = dict(node.attrs)
    encoding = attrs.get("encoding-type", attrs.get("h5sparse_format", ""))
    kind = str(encoding.decode() if isinstance(encoding, bytes) else encoding)[:3]
    shape = np.asarray(attrs.get("shape", attrs.get("h5sparse_shape", ()))).ravel()
    parts = {p: node.get(p) for p in ("data", "indices", "indptr")}
    if kind not in ("csr", "csc") or len(shape) != 2 or shape.dtype.kind not in "iu" or (shape < 0).any():
        return error(
            f"{name} has encoding {encoding!r} and shape {tuple(shape)}", "known are csr_matrix, csc_matrix, array"
        )
    if bad := [p for p, d in parts.items() if not isinstance(d, h5py.Dataset) or d.ndim != 1]:
        return error(f"{name} has no usable {', '.join(bad)}", "save it again from an intact copy")
    if parts["data"].dtype.kind not in "iufb" or any(parts[p].dtype.kind not in "iu" for p in ("indices", "indptr")):
        kinds = ", ".join(f"{p} {d.dtype}" for p, d in parts.items())
        return error(f"{name} is of the wrong type ({kinds})", "data are numbers, indices and indptr whole numbers")
    return _sized(CountMatrix(node, kind, (int(shape[0]), int(shape[1]))), name)


def _sized(matrix: CountMatrix, name: str) -> CountMatrix | Finding:
    if matrix.shape[0] > MAX_CELLS or matrix.shape[1] > MAX_GENES:
        limits = f"{MAX_CELLS:,} x {MAX_GENES:,}"
        return error(f"{name} declares {matrix.shape[0]:,} x {matrix.shape[1]:,}", f"at most {limits} are read")
    return matrix


def pieces(matrix: CountMatrix, findings: list[Finding], name: str = "X") -> Iterator[CountEntries]:
    """Yield all stored entries in pieces of about PIECE values; problems with the layout are added to `findings`."""
    if matrix.kind == "dense":
        yield from _dense(matrix)
        return
    if found := layout_problems(matrix, name):
        findings += found
        return
    minor = matrix.shape[1] if matrix.kind == "csr" else matrix.shape[0]
    yield from _compressed(matrix, matrix.node["indptr"][:].astype(np.int64), minor, findings, name)


def layout_problems(matrix: CountMatrix, name: str) -> list[Finding]:
    """Return problems with the row or column pointers of a sparse matrix."""
    if matrix.kind == "dense":
        return []
    major = matrix.shape[0] if matrix.kind == "csr" else matrix.shape[1]
    n_data, n_indices, n_pointers = (len(matrix.node[part]) for part in ("data", "indices", "indptr"))
    if n_pointers != major + 1:
        return [error(f"{name}/indptr has {n_pointers:,} entries, {major + 1:,} are right", _FIX)]
    pointers = matrix.node["indptr"][:].astype(np.int64)
    wrong = np.flatnonzero(np.diff(pointers) < 0)
    if pointers[0] == 0 and not len(wrong) and pointers[-1] == n_data == n_indices:
        return []
    return [error(
        f"{name}/indptr goes from {pointers[0]} to {pointers[-1]} with {len(wrong)} steps back, for {n_data:,} data "
        f"and {n_indices:,} indices", _FIX, count=max(1, len(wrong)), first=wrong,
    )]  # fmt: skip


def _dense(matrix: CountMatrix) -> Iterator[CountEntries]:
    rows = max(1, PIECE // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        block = matrix.node[start : start + rows]
        cells, genes = np.nonzero(block)
        yield CountEntries(cells + start, genes, block[cells, genes])


def _compressed(
    matrix: CountMatrix, pointers: np.ndarray, minor: int, findings: list[Finding], name: str
) -> Iterator[CountEntries]:
    outside = unsorted = repeated = zeros = 0
    first_outside: list[str] = []
    last = (-1, -1)  # row and index of the entry before
    for start in range(0, int(pointers[-1]), PIECE):
        stop = min(start + PIECE, int(pointers[-1]))
        minors, values = matrix.node["indices"][start:stop].astype(np.int64), matrix.node["data"][start:stop]
        majors = np.searchsorted(pointers, np.arange(start, stop), side="right") - 1
        good = (minors >= 0) & (minors < minor)
        if n := int((~good).sum()):
            first_outside += [f"entry {start + k}: index {minors[k]}" for k in np.flatnonzero(~good)[:3]]
            outside += n
        same = majors == np.r_[last[0], majors[:-1]]
        steps = minors - np.r_[last[1], minors[:-1]]
        unsorted, repeated = unsorted + int((same & (steps < 0)).sum()), repeated + int((same & (steps == 0)).sum())
        zeros += int((values == 0).sum())
        last = int(majors[-1]), int(minors[-1])
        majors, minors, values = majors[good], minors[good], values[good]
        yield CountEntries(*((majors, minors) if matrix.kind == "csr" else (minors, majors)), values)
    if outside:
        findings.append(error(f"{outside:,} indices of {name} are outside its {minor:,}", _FIX, count=outside,
                              first=first_outside))  # fmt: skip
    if repeated:
        findings.append(warning(f"{repeated:,} entries of {name} come twice in a row; they are added up",
                                "call sum_duplicates()", count=repeated))  # fmt: skip
    if unsorted:
        findings.append(warning(f"{unsorted:,} indices of {name} are not in order", "they are sorted on the way in",
                                count=unsorted))  # fmt: skip
    if zeros:
        findings.append(warning(f"{zeros:,} stored values of {name} are zero", "they are dropped on the way in",
                                count=zeros))  # fmt: skip
