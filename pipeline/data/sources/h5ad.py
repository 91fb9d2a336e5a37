"""Reads cells from `.h5ad` files: one file in anndata's backed mode, several with cellarium-ml's collection reader.

Genes are matched between files by id; a note says how many a file lacks, and `CellTables.measured` which.

What cellarium-ml does here, and why it is kept: `DistributedAnnDataCollection` opens a list of files as one collection
with an LRU cache of loaded files (one at a time here, so that any number of files takes the memory of the largest), and
`AnnDataSchema` decides whether two files agree in everything but their cells. Both would otherwise be written again
here, and its users get the same reading of a sharded collection as in their own training. A collection requires that
its files agree, so files are grouped into consecutive runs that do, and each run is a collection of its own. It is
imported only for several files, because that takes seconds (lightning and more).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.config.job import H5adSource
from pipeline.config.paths.cell_files import h5ad_files, left_by_macos
from pipeline.data.presence import Presence
from pipeline.data.safety.formats import other_format
from pipeline.data.safety.h5ad_parts import H5adParts, open_parts
from pipeline.data.safety.h5ad_structure import layer_setting, matrix_path, structure_problems
from pipeline.data.tables import CellTables, complete_obs, file_names, plain_id, spread
from pipeline.data.validation.agreement import FileTables, agreement_findings, columns_of_ids, taken
from pipeline.data.validation.feature_types import GeneFeatures, genes_of_var
from pipeline.data.validation.gene_names import GeneNames, gene_findings, repeated_findings
from pipeline.data.validation.places import layer_names, other_places
from scldm.data.label_type import LabelType
from scldm.errors import InputError
from scldm.text import choices_hint

CHUNK_ROWS = 4096
CHUNK_VALUES = 1 << 24  # of a dense matrix


@dataclass(frozen=True)
class _File:
    parts: H5adParts
    genes: pd.DataFrame  # feature_id, feature_name, feature_length
    features: GeneFeatures
    gene_id: str | None  # var column of the ids; None: the index

    @property
    def path(self) -> Path:
        return self.parts.path

    @property
    def adata(self) -> anndata.AnnData:
        """obs, genes and counts; X is on disk."""
        return self.parts.adata

    @property
    def var(self) -> pd.DataFrame:
        """The features that are genes."""
        return self.adata.var[self.features.kept]

    def names(self) -> GeneNames:
        """Return the gene ids as they are in the file."""
        ids = self.var.index if self.gene_id is None else self.var[self.gene_id]
        return GeneNames([str(x) for x in ids], "h5ad", self.gene_id, self.var)


def read_h5ad(source: H5adSource, needed: Sequence[str] = ()) -> CellTables:
    """Read tables and chunks of one or many files.

    Args:
        needed: obs columns that the job uses: never filled in, so that their absence is noticed.
    """
    paths = find_files(source.path)
    problems: list[str] = []
    skipped = [path.name for path in left_by_macos(source.path)]
    notes = [f"{', '.join(skipped)}: skipped, because macOS wrote it beside another file."] if skipped else []
    files = [f for path in paths if (f := _open(path, source, problems, notes)) is not None]
    if len(files) > 1:  # for a single file, validation reports it
        files = _named_alike(files, source, notes)
        problems += _disagreements(files, source.columns, needed)
    if problems:
        raise InputError("\n".join(["ingest.source cannot be used:", *(f"  - {p}" for p in problems)]))
    var = pd.concat([f.genes for f in files]).drop_duplicates("feature_id", ignore_index=True)
    if len(files) == 1:
        var = files[0].genes
    for f in files:
        if lacking := len(var) - len(f.genes):
            notes.append(f"{f.path.name} lacks {lacking} of {len(var)} genes.")
    joined = _obs(files, source.columns)
    types = {c: LabelType.of(joined[c]) for c in needed if c in joined}
    obs = complete_obs(joined, needed, notes)
    left_out = [finding for f in files for finding in f.features.findings()]
    notes += [f"{f.path.name}: {finding.message}." for f in files for finding in f.features.findings()]
    if (var["feature_length"] == 0).all():
        notes.append("var has no feature_length; 0 is written.")

    def chunks() -> Iterator[sp.csr_matrix]:
        target = pd.Index(var["feature_id"])
        for f, rows in _matrices(files):
            columns = None if f.genes is var else target.get_indexer(f.genes["feature_id"])
            for features in _chunks(rows):
                chunk = features if f.features.positions is None else features[:, f.features.positions]
                yield chunk if columns is None else spread(chunk, columns, len(target))

    where = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files of {source.path}"
    measured = None
    if len(files) > 1:
        target = pd.Index(var["feature_id"])
        places = [target.get_indexer(f.genes["feature_id"]) for f in files]
        measured = Presence.from_files([f.path.name for f in files], places, [f.adata.n_obs for f in files], len(var))
    other_counts = lambda: other_places(paths[0], source.layer)  # noqa: E731
    of_genes = list(gene_findings(files[0].names())) if len(files) == 1 else None
    return CellTables(obs, var, chunks, where, notes, other_counts, types, of_genes, left_out, measured)


def find_files(path: str) -> list[Path]:
    """Return the files that a path, folder or glob pattern stands for."""
    p = Path(path).expanduser()
    if found := h5ad_files(path):
        return found
    if known := other_format(p):
        raise InputError(f"ingest.source.path {path}: this is {known}")
    if p.is_dir():
        raise InputError(f"ingest.source.path {path}: the folder holds no .h5ad file; it has {_listing(p)}")
    near = f"; {p.parent} has {_listing(p.parent)}" if p.parent.is_dir() else ""
    raise InputError(f"ingest.source.path {path}: no such file, folder or pattern (from {Path.cwd()}){near}")


def _listing(folder: Path) -> str:
    names = sorted(x.name for x in folder.iterdir())
    return (", ".join(names[:6]) + (", …" if len(names) > 6 else "")) or "nothing"


def _open(path: Path, source: H5adSource, problems: list[str], notes: list[str]) -> _File | None:
    """Open a file and read its genes; return None after adding to `problems`."""
    if unsound := structure_problems(path, source.layer):
        problems += [f"{path}: {finding.message}" for finding in unsound]
        return None
    try:
        if wrong := _misplaced(path, source):
            problems.append(wrong)
            return None
        parts = open_parts(path, source.layer)
        if unknown := _unknown_columns(path.name, parts.adata, source):
            problems += unknown
            return None
        notes += [f"{note}." for note in parts.notes]
        features = genes_of_var(parts.adata.var, str(path))
        return _File(parts, _genes(parts.adata.var[features.kept], source), features, source.gene_id)
    except InputError as error:
        problems.append(str(error))
        return None


def _misplaced(path: Path, source: H5adSource) -> str | None:
    """Return what to do if the file has no counts where the config says."""
    with h5py.File(path) as file:
        if matrix_path(file, source.layer) in file:
            return None
        layers = ", ".join(map(layer_setting, layer_names(file))) or "none"
    if source.layer == "raw":
        return f"ingest.source.layer: {path.name} has no raw; layers: {layers}"
    if source.layer is not None:
        return f"ingest.source.layer: {path.name} has no layer {source.layer!r}; layers: {layers}"
    places = other_places(path, None)
    return f"{path.name} has no X" + (f"; set ingest.source.{' or '.join(places)}" if places else "")


def _unknown_columns(name: str, adata: anndata.AnnData, source: H5adSource) -> list[str]:
    """Return problems with columns that the config names and the file lacks."""
    problems = []
    for field in ("gene_id", "gene_name"):
        wanted = getattr(source, field)
        if wanted is not None and wanted not in adata.var:
            hint = choices_hint(wanted, adata.var.columns)
            problems.append(f"ingest.source.{field}: {name} has no var column {wanted!r} ({hint})")
    for column in source.columns.values():
        if column not in adata.obs:
            hint = choices_hint(column, adata.obs.columns)
            problems.append(f"ingest.source.columns: {name} has no obs column {column!r} ({hint})")
    return problems


def _named_alike(files: Sequence[_File], source: H5adSource, notes: list[str]) -> list[_File]:
    """Take the gene ids of some files from a column, if their index holds another kind of names than that of others."""
    if source.gene_id is not None:
        return list(files)
    variables = {str(f.path): f.var for f in files}
    columns = columns_of_ids(variables)
    notes += [f"{taken(Path(path).name, column)}." for path, column in columns.items()]
    return [
        replace(f, genes=_genes(f.var, source.model_copy(update={"gene_id": column})), gene_id=column)
        if (column := columns.get(str(f.path))) is not None
        else f
        for f in files
    ]


def _disagreements(files: Sequence[_File], columns: dict[str, str], needed: Sequence[str]) -> list[str]:
    """Return what keeps files from being read together."""
    problems = [f"{f.path}: {found.message}" for f in files for found in repeated_findings(f.names())]
    # "obs_id" and the Census's columns are filled in where a file lacks them.
    own = [c for c in needed if c not in ("obs_id", "dataset_id", "is_primary_data")]
    tables = [FileTables(f.path.name, list(f.genes["feature_id"]), [*f.adata.obs.columns, *columns]) for f in files]
    return problems + [f.message for f in agreement_findings(tables, own) if f.level == "error"]


def _genes(var: pd.DataFrame, source: H5adSource) -> pd.DataFrame:
    text = lambda name: (var.index if name is None else var[name]).astype(str)  # noqa: E731
    length = var["feature_length"] if "feature_length" in var else pd.Series(0, index=var.index)
    return pd.DataFrame(
        {
            "feature_id": [plain_id(x) for x in text(source.gene_id)],
            "feature_name": list(text(source.gene_name)),
            "feature_length": pd.to_numeric(length, errors="coerce").fillna(0).astype(np.int64).to_numpy(),
        }
    )


# ---- obs ---------------------------------------------------------------------------------------------------------
def _obs(files: Sequence[_File], columns: dict[str, str]) -> pd.DataFrame:
    """Join obs of all files under Census names."""
    frames = []
    for f, name in zip(files, file_names([f.path for f in files]), strict=True):
        frame = f.adata.obs
        renamed = frame.drop(columns=[c for c in columns if c in frame and columns[c] != c])
        renamed = renamed.rename(columns={old: new for new, old in columns.items()})
        if "obs_id" not in renamed:
            renamed.insert(0, "obs_id", frame.index.astype(str))
        if len(files) > 1 and "dataset_id" not in renamed:
            renamed["dataset_id"] = name
        frames.append(renamed)
    return pd.concat(frames, ignore_index=True)


# ---- counts ------------------------------------------------------------------------------------------------------
def _matrices(files: Sequence[_File]) -> Iterator[tuple[_File, Any]]:
    """Yield each file with its count matrix."""
    if len(files) == 1:
        yield files[0], _matrix(files[0].adata)
        return
    from cellarium.ml.data.distributed_anndata import DistributedAnnDataCollection

    for run in _runs(files):
        names = [str(f.parts.links) for f in run]
        limits = np.cumsum([f.adata.n_obs for f in run]).tolist()
        # obs is not validated: it was joined above, and here only counts are taken.
        collection = DistributedAnnDataCollection(names, limits, max_cache_size=1, obs_columns_to_validate=[])
        for k, f in enumerate(run):
            # Not collection[…]: that casts obs to the first file's categories.
            wanted = [np.arange(f.adata.n_obs) if i == k else None for i in range(len(run))]
            yield f, _matrix(collection.materialize(wanted, slice(None))[0])


def _runs(files: Sequence[_File]) -> list[list[_File]]:
    """Group consecutive files that agree in cellarium's schema."""
    from cellarium.ml.data.schema import AnnDataSchema

    runs: list[list[_File]] = []
    for f in files:
        try:
            AnnDataSchema(runs[-1][0].adata if runs else f.adata, []).validate_anndata(f.adata)
            runs[-1].append(f)
        except (IndexError, ValueError, KeyError):
            runs.append([f])
    return runs


def _matrix(adata: anndata.AnnData) -> Any:
    """Return the counts of all cells, sliceable by rows: CSR or dense, in memory or on disk; CSC is converted once."""
    m = adata.X
    if hasattr(m, "group") and m.dtype != _supported(m.dtype):
        m = _in_memory(m)
    if getattr(m, "format", "csr") != "csr":
        m = (m.to_memory() if hasattr(m, "to_memory") else m).tocsr()
    return m


def _supported(dtype: np.dtype) -> np.dtype:
    """Return the type itself if scipy has it, else one that holds all of its values."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype.newbyteorder("=")


def _in_memory(m: Any) -> sp.csr_matrix | sp.csc_matrix:
    """Read a sparse matrix whose values scipy has no type for."""
    kind = sp.csr_matrix if m.format == "csr" else sp.csc_matrix
    parts = [m.group[name][:] for name in ("data", "indices", "indptr")]
    return kind(tuple(x.astype(_supported(x.dtype)) for x in parts), shape=m.shape)


def _chunks(matrix: Any) -> Iterator[sp.csr_matrix]:
    dense = not hasattr(matrix, "format")
    rows = max(64, CHUNK_VALUES // max(1, matrix.shape[1])) if dense else CHUNK_ROWS
    for start in range(0, matrix.shape[0], rows):
        values = matrix[start : start + rows]
        chunk = sp.csr_matrix(values.astype(_supported(values.dtype), copy=False))
        if chunk.nnz and not 0 <= chunk.indices.min() <= chunk.indices.max() < chunk.shape[1]:
            # Checked before compiled code trusts them.
            raise InputError(
                f"ingest.source: cells {start} to {start + chunk.shape[0]} have gene indices outside 0 to "
                f"{chunk.shape[1] - 1}: the file is damaged; copy or download it again"
            )
        yield chunk
