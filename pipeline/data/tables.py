"""Tables of cells on their way into SOMA, and what readers of files share: sample names, obs, gene ids, columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.data.findings import Finding
from pipeline.data.presence import Presence
from scldm.data.class_names import class_text, is_null, widened
from scldm.data.label_type import LabelType
from scldm.errors import InputError

UNKNOWN = ("cell_type", "tissue_general", "assay", "dataset_id", "donor_id")  # Census columns filled when absent
RESERVED = ("raw_sum", "nnz", "counts_hash_0", "counts_hash_1")  # obs columns that are written with the counts
RESERVED_STARTS = ("soma_", "__")  # names that SOMA and TileDB refuse
_RANGER = ("outs", "filtered_feature_bc_matrix", "filtered_gene_bc_matrices", "raw_feature_bc_matrix")
_VERSION = re.compile(r"^(ENS[A-Z]*\d{6,})\.\d+$")


def plain_id(gene: object) -> str:
    """Strip the version of an Ensembl id: ENSG00000243485.5 is the gene ENSG00000243485."""
    return _VERSION.sub(r"\1", str(gene))


def reserved_columns(names: Iterable[object]) -> list[str]:
    """Return the obs columns whose names are used by what is written with the counts."""
    return [c for c in map(str, names) if not c or c.startswith(RESERVED_STARTS) or c in RESERVED]


def reserved_problem(columns: Sequence[str]) -> tuple[str, str]:
    """Return what is wrong with such columns as labels, and the remedy."""
    return (
        f"obs columns {', '.join(columns)}: SOMA and the Census use such names, so the job cannot use them",
        f"read them under another name with ingest.source.columns: {{my_{columns[0].strip('_')}: {columns[0]}}}",
    )


def complete_obs(obs: pd.DataFrame, needed: Sequence[str], notes: list[str]) -> pd.DataFrame:
    """Return obs in types that SOMA stores, with the Census's columns.

    Args:
        needed: Columns that the job uses: never filled in, so that their absence is noticed.
        notes: A line is added for everything that is left out or filled in.
    """
    reserved = reserved_columns(obs)
    if asked := [c for c in reserved if c in needed]:
        raise InputError("; ".join(reserved_problem(asked)))
    obs = obs.drop(columns=reserved)
    if reserved:
        names = ", ".join(map(str, reserved))
        notes.append(f"obs columns {names} are left out: SOMA and the Census use such names.")
    filled = [c for c in UNKNOWN if c not in obs and c not in needed]
    obs = obs.assign(**dict.fromkeys(filled, "unknown"))
    if filled:
        notes.append(f'obs has no {", ".join(filled)}; "unknown" is written.')
    if "is_primary_data" not in obs:
        obs["is_primary_data"] = True
        notes.append("obs has no is_primary_data; all cells are taken as primary data.")
    return obs.rename(columns=str).apply(_storable)


def _storable(column: pd.Series) -> pd.Series:
    if column.name == "obs_id":
        return column.astype(str)
    if column.dtype == np.float16:
        return widened(column)
    if column.dtype == np.longdouble:
        return column.astype(np.float64)
    if pd.api.types.is_bool_dtype(column) or (pd.api.types.is_numeric_dtype(column) and column.dtype.kind != "c"):
        return column
    if isinstance(column.dtype, pd.CategoricalDtype):
        texts = [class_text(c) for c in column.cat.categories]
        names = np.array([*texts, None], dtype=object)[column.cat.codes.to_numpy()]
        categories = list(dict.fromkeys(texts)) or [""]  # TileDB stores no enumeration without values
        ordered = bool(column.cat.ordered)
        return pd.Series(pd.Categorical(names, categories=categories, ordered=ordered), column.index, name=column.name)
    values = [None if is_null(x) else class_text(x) for x in column.tolist()]
    categories = sorted({x for x in values if x is not None}) or [""]
    return pd.Series(pd.Categorical(values, categories=categories), column.index, name=column.name)


def spread(chunk: sp.csr_matrix, columns: np.ndarray, n_genes: int) -> sp.csr_matrix:
    """Move the columns of a file to their positions in the union of all files.

    Args:
        columns: Position of each of the file's genes in the union.
    """
    moved = sp.csr_matrix((chunk.data, columns[chunk.indices], chunk.indptr), shape=(chunk.shape[0], n_genes))
    moved.sort_indices()
    return moved


def sample_names(paths: Sequence[Path]) -> list[str]:
    """Return the parts that differ between paths, without Cell Ranger's folder names: runs/S1/outs/filtered_… is S1."""
    parts = [[*p.parent.parts, p.stem if p.is_file() else p.name] for p in (path.absolute() for path in paths)]
    if len(parts) == 1:
        return [next((x for x in reversed(parts[0]) if x not in _RANGER), parts[0][-1])]
    start = _shared(parts)
    end = _shared([p[start:][::-1] for p in parts])
    names = ["/".join(p[start : len(p) - end]) for p in parts]
    return names if all(names) else ["/".join(p[max(0, start - 1) :]) for p in parts]


def file_names(paths: Sequence[Path]) -> list[str]:
    """Return names that tell several files apart: without the ending, or the parts of their paths that differ."""
    stems = [p.stem for p in paths]
    return stems if len(set(stems)) == len(stems) else sample_names(paths)


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """Return the number of leading parts that all have in common."""
    return next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), min(map(len, parts)))


@dataclass
class CellTables:
    """Cells of a source that is not in SOMA yet."""

    obs: pd.DataFrame  # one row per cell, Census column names
    var: pd.DataFrame  # feature_id, feature_name, feature_length
    chunks: Callable[[], Iterator[sp.csr_matrix]]  # rows of counts in the order of obs, genes in the order of var
    where: str  # the file, for messages
    notes: list[str] = field(default_factory=list)  # for readers of the results
    other_counts: Callable[[], list[str]] = list  # other places in the file that hold counts, as config text
    types: Mapping[str, LabelType] = field(default_factory=dict)  # of obs columns, as they were before SOMA's types
    of_genes: Sequence[Finding] | None = None  # about gene ids as the file has them; None: as var has them
    left_out: Sequence[Finding] = ()  # about what is not read; `notes` has them too
    measured: Presence | None = None  # which genes each cell's file measured; None: all of them, all genes
    truth: Callable[[], pd.DataFrame] | None = None  # what combinations of labels have on average, if it is known
