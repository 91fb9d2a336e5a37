"""Inspects an untrusted `.h5ad` file; each part is inspected even if another is broken."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from pipeline.config.ingest import MISSING_TEXT
from pipeline.data.entries import CountEntries
from pipeline.data.findings import Examined, Finding, error, warning
from pipeline.data.inspection.columns import obs_profile, var_profile
from pipeline.data.safety.count_matrix import CountMatrix, find_matrix, pieces
from pipeline.data.safety.h5ad_parts import open_parts
from pipeline.data.safety.h5ad_structure import (
    DAMAGE,
    SAVE_AGAIN,
    damage,
    matrix_path,
    structure_problems,
    var_path,
)
from pipeline.data.safety.hdf5 import open_problems, unsafe
from pipeline.data.tables import reserved_columns, reserved_problem
from pipeline.data.validation.counts import CountAudit
from pipeline.data.validation.feature_types import genes_of_var
from pipeline.data.validation.gene_names import GeneNames, gene_findings
from pipeline.data.validation.names import (
    cell_findings,
    class_counts,
    label_findings,
    suggested_labels,
)
from pipeline.data.validation.places import other_places, places_with_counts
from scldm.errors import InputError
from scldm.text import shown


def examine_h5ad(
    path: Path, *, labels: Sequence[str], layer: str | None, gene_id: str | None, counts: bool, profile: bool = False,
    missing_text: Sequence[str] = MISSING_TEXT, dataset_id: str | None = None,
) -> Examined:  # fmt: skip
    """Inspect one file.

    Args:
        labels: obs columns that must be usable as labels.
        layer: As `ingest.source.layer`.
        gene_id: As `ingest.source.gene_id`.
        counts: Whether to read the values.
        profile: Whether to describe every column, and list the places that hold whole numbers.
        missing_text: As `ingest.missing_text`.
        dataset_id: What ingest writes into this obs column if it is not there; None: nothing.
    """
    found = Examined(str(path), "h5ad")
    found.findings += open_problems(path)
    if found.errors:
        return found
    try:
        _inspect(found, path, labels=labels, layer=layer, gene_id=gene_id, counts=counts, profile=profile,
                 missing_text=missing_text, dataset_id=dataset_id)  # fmt: skip
    except DAMAGE as problem:
        if not found.errors:  # else it follows from a reported one
            found.findings.append(damage(problem))
    return found


def _inspect(
    found: Examined, path: Path, *, labels: Sequence[str], layer: str | None, gene_id: str | None, counts: bool,
    profile: bool, missing_text: Sequence[str], dataset_id: str | None,
) -> None:  # fmt: skip
    with h5py.File(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.findings += unsafe(file)
        if found.errors:
            return
        unsound = structure_problems(path, layer)
        found.findings += unsound
        if not {"obs", "var"} <= set(file):
            return
        obs, var = _frames(file, path, layer, found)
        if obs is not None and dataset_id is not None and "dataset_id" not in obs:
            obs = obs.assign(dataset_id=dataset_id)
        var, genes = _genes(found, var)
        _names(found, obs, var, labels, gene_id, missing_text)
        place = matrix_path(file, layer)
        places = other_places(path, layer)
        if profile:
            found.facts["profile"] = {
                "obs": {} if obs is None else obs_profile(obs),
                "places": places_with_counts(file),
            }
            found.facts["profile"] |= {} if var is None else {"var": var_profile(var)}
        if place not in file:
            found.findings.append(error(f"the file has no {shown(place)}", _elsewhere(places)))
            return
        matrix = find_matrix(file[place], place)
        if isinstance(matrix, Finding):
            return  # reported with the structure
        found.facts["matrix"] = f"{place}, {matrix.kind}, {matrix.shape[0]:,} x {matrix.shape[1]:,}"
        if counts and not unsound:
            _counts(found, matrix, place, obs, var, gene_id, places, genes)


# ---- obs and var -------------------------------------------------------------------------------------------------
def _frames(
    file: h5py.File, path: Path, layer: str | None, found: Examined
) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Read obs and the genes as ingest does; of a file that ingest refuses, what can be read."""
    if not found.errors:
        try:
            parts = open_parts(path, layer)
        except InputError as problem:
            found.findings.append(error(str(problem).removeprefix(f"{path} "), SAVE_AGAIN))
        else:
            found.findings += [warning(note, SAVE_AGAIN) for note in parts.notes]
            return parts.adata.obs, parts.adata.var
    return _frame(file, "obs", found), _frame(file, var_path(file, layer), found)


def _frame(file: h5py.File, place: str, found: Examined) -> pd.DataFrame | None:
    """Read a table; return None after adding a finding if it cannot be read."""
    try:
        node = file[place]
        if isinstance(node, h5py.Group):
            import anndata

            return anndata.io.read_elem(node)
        rows = node[:]
        columns = {n: _decoded(rows[n]) for n in rows.dtype.names}
        for name in [n for n in columns if f"uns/{n}_categories" in file]:
            classes = _decoded(file[f"uns/{name}_categories"][:])
            codes = columns[name].astype(int)
            columns[name] = pd.Categorical.from_codes(codes, categories=list(classes))
        return pd.DataFrame(columns).set_index(rows.dtype.names[0])
    except Exception as problem:  # any: an untrusted file in another library's reader
        line = (str(problem).splitlines() or [""])[0][:160]
        found.findings.append(error(f"{place} cannot be read ({type(problem).__name__}: {shown(line)})", SAVE_AGAIN))
        return None


def _decoded(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "SO":
        return values
    return np.array([x.decode("utf-8", "replace") if isinstance(x, bytes) else str(x) for x in values], dtype=object)


def _genes(found: Examined, var: pd.DataFrame | None) -> tuple[pd.DataFrame | None, np.ndarray | None]:
    """Return the features that are genes, and their positions; None: all features."""
    if var is None:
        return None, None
    try:
        features = genes_of_var(var, "the file")
    except InputError as problem:
        what, _, remedy = str(problem).rpartition("; ")
        found.findings.append(error(what, remedy))
        return var, None
    found.findings += features.findings()
    return var[features.kept], features.positions


def _names(
    found: Examined, obs: pd.DataFrame | None, var: pd.DataFrame | None, labels: Sequence[str], gene_id: str | None,
    missing_text: Sequence[str],
) -> None:  # fmt: skip
    if obs is not None:
        names = pd.Series(obs.index.astype(str))
        found.findings += [*cell_findings(names), *label_findings(obs, labels, names, missing_text=missing_text)]
        if taken := [x for x in reserved_columns(labels) if x in obs]:
            found.findings.append(error(*reserved_problem([shown(x) for x in taken]), count=len(taken)))
        found.facts |= {"cells": len(obs), "obs columns": [str(c) for c in obs.columns]}
        found.facts["suggested labels"] = suggested_labels(obs, names)
        found.facts["classes"] = {c: class_counts(obs[c], missing_text) for c in labels if c in obs}
    if var is not None:
        found.facts |= {"genes": len(var), "var columns": [str(c) for c in var.columns]}
        if gene_id is not None and gene_id not in var:
            columns = ", ".join(map(shown, var.columns)) or "none"
            found.findings.append(error(f"var has no column {gene_id!r}", f"set gene_id to one of: {columns}"))
        else:
            ids = var.index if gene_id is None else var[gene_id]
            found.gene_ids, found.var = [str(x) for x in ids], var
            found.findings += gene_findings(GeneNames(found.gene_ids, "h5ad", gene_id, var))


# ---- counts ------------------------------------------------------------------------------------------------------
def _counts(
    found: Examined, matrix: CountMatrix, place: str, obs: pd.DataFrame | None, var: pd.DataFrame | None,
    gene_id: str | None, places: list[str], genes: np.ndarray | None,
) -> None:  # fmt: skip
    """Audit the counts.

    Args:
        var: The genes.
        genes: Their columns in the matrix; None: all.
    """
    n_cells, n_genes = matrix.shape[0], matrix.shape[1] if genes is None else len(genes)
    ids: Sequence[object] = range(n_genes)
    if var is not None and len(var) == n_genes:
        ids = list(var.index if gene_id is None else var.get(gene_id, var.index))

    def where(cell: int, gene: int) -> str:
        cell_name = [f"cell {cell if obs is None else obs.index[cell]}"] if cell >= 0 else []
        return ", ".join(cell_name + ([f"gene {gene if var is None else var.index[gene]}"] if gene >= 0 else []))

    try:
        audit = CountAudit(n_cells, ids, where)
        for piece in pieces(matrix, found.findings, place):
            audit.add(piece if genes is None else _of_genes(piece, genes, matrix.shape[1]))
    except DAMAGE as problem:
        line = (str(problem).splitlines() or [""])[0][:160]
        what = f"{place} cannot be read to its end ({type(problem).__name__}: {shown(line)})"
        found.findings.append(error(what, "the file is damaged: copy or download it again"))
        return
    found.facts |= {"stored values": audit.stored, "largest value": audit.largest, "values are": audit.guess()}
    found.findings += audit.findings(places)
    found.cell_hashes = audit.hashes


def _of_genes(piece: CountEntries, genes: np.ndarray, n_features: int) -> CountEntries:
    """Return the entries of some columns, numbered by their position among these."""
    place = np.full(n_features, -1, np.int64)
    place[genes] = np.arange(len(genes))
    at = place[piece.genes]
    return CountEntries(piece.cells[at >= 0], at[at >= 0], piece.counts[at >= 0])


def _elsewhere(places: list[str]) -> str:
    return f"set ingest.source.{' or '.join(places)}" if places else "it holds no counts"
