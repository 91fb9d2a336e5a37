"""Reads cells from Cell Ranger outputs: joins samples into one table and matches their genes by id.

A sample's name is the part of its path that differs from the others'. Labels and donors are not in such files: they
come from a separate table (`ingest.source.obs`), which `tenx_obs.py` joins. `tenx_files.py` reads one output.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.config.job import TenxSource
from pipeline.config.paths.cell_files import is_tenx, prefix_advice
from pipeline.data.presence import Presence
from pipeline.data.sources.tenx_files import TenxError, TenxMatrix, open_tenx
from pipeline.data.sources.tenx_obs import describe
from pipeline.data.tables import CellTables, complete_obs, plain_id, sample_names, spread
from pipeline.data.validation.feature_types import GeneFeatures, gene_features
from pipeline.data.validation.gene_names import GeneNames, repeated_findings
from scldm.errors import InputError

WITHOUT_LABELS = ", or train without (ingest.labels=[] or [dataset_id], which is the sample)"


@dataclass(frozen=True)
class _Sample:
    name: str
    path: Path
    matrix: TenxMatrix
    kept: np.ndarray  # positions of the features that are genes of the genome
    genes: pd.DataFrame  # feature_id, feature_name, feature_length of those
    features: GeneFeatures


def read_10x(source: TenxSource, needed: Sequence[str] = (), named_by: Mapping[str, str] = {}) -> CellTables:
    """Read tables and chunks of one or many outputs.

    Args:
        needed: obs columns that the job uses: never filled in, so that their absence is noticed.
        named_by: Place that names a column which is no label, for messages.
    """
    paths = find_outputs(source)
    problems: list[str] = []
    notes: list[str] = []
    samples = []
    for path, name in zip(paths, sample_names(paths), strict=True):
        try:
            samples.append(_open(path, name, source, notes))
        except TenxError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(["ingest.source cannot be used:", *(f"  - {p}" for p in problems)]))
    var = pd.concat([s.genes for s in samples]).drop_duplicates("feature_id", ignore_index=True)
    target = pd.Index(var["feature_id"])
    columns = [target.get_indexer(s.genes["feature_id"]) for s in samples]
    for s in samples:
        if lacking := len(var) - len(s.genes):
            notes.append(f"{s.name} lacks {lacking} of {len(var)} genes.")
    notes.append("A 10x output has no feature_length; 0 is written.")
    obs = complete_obs(_obs(samples, source, needed, notes, named_by), needed, notes)

    def chunks() -> Iterator[sp.csr_matrix]:
        for s, place in zip(samples, columns, strict=True):
            try:
                for chunk in s.matrix.chunks():
                    yield spread(chunk[:, s.kept], place, len(var))
            except TenxError as error:
                raise InputError(f"ingest.source cannot be used: {error}") from error

    where = str(paths[0]) if len(paths) == 1 else f"{len(paths)} outputs of {source.path}"
    sizes = [len(s.matrix.barcodes) for s in samples]
    measured = Presence.from_files([s.name for s in samples], columns, sizes, len(var))
    left_out = [found for s in samples for found in s.features.findings()]
    return CellTables(obs, var, chunks, where, notes, left_out=left_out, measured=measured)


# ---- samples -----------------------------------------------------------------------------------------------------
def find_outputs(source: TenxSource) -> list[Path]:
    """Return the outputs that a path, folder or glob pattern stands for."""
    path = Path(source.path).expanduser()
    matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))
    if not matches:
        raise InputError(f"ingest.source.path {source.path}: no such file, folder or pattern (from {Path.cwd()})")
    found = [p for match in matches for p in _inside(match, source.genome)]
    if not found:
        has = ", ".join(sorted(p.name for p in path.iterdir())[:6]) if path.is_dir() else path.name
        if advice := prefix_advice(path):
            raise InputError(f"ingest.source.path {source.path}: {advice}")
        packed = "; unpack it first (tar -xf)" if path.suffix in (".gz", ".tar", ".tgz", ".zip") else ""
        raise InputError(
            f"ingest.source.path {source.path}: no Cell Ranger output (a folder with matrix.mtx, or an .h5 file) is "
            f"there: {has or 'nothing'}{packed}"
        )
    return found


def _inside(path: Path, genome: str | None) -> list[Path]:
    """Return the path itself, or the outputs in the folder: its genomes (version 2) or its samples."""
    if is_tenx(path) or not path.is_dir():
        return [path] if is_tenx(path) else []
    children = sorted(p for p in path.iterdir() if is_tenx(p))
    if "gene_bc_matrices" not in path.name:
        return children
    chosen = [p for p in children if genome in (None, p.name)]
    if len(chosen) != 1 and children:
        names = ", ".join(p.name for p in children)
        raise InputError(f"ingest.source.genome ({genome}): {path} holds the genomes {names}; name one of them")
    return chosen


def _open(path: Path, name: str, source: TenxSource, notes: list[str]) -> _Sample:
    matrix = open_tenx(path, source.genome)
    features = matrix.features
    try:
        chosen = gene_features(features["type"], str(path))
    except InputError as error:
        raise TenxError(str(error)) from error
    genes = pd.Series(chosen.kept.copy())
    notes += [f"{name}: {found.message}." for found in chosen.findings()]
    genomes = sorted(set(features["genome"][genes]) - {""})
    if source.genome is None and len(genomes) > 1:
        raise TenxError(f"{path} holds {len(genomes)} genomes: set ingest.source.genome to one of {', '.join(genomes)}")
    if source.genome is not None and genomes:
        if source.genome not in genomes:
            raise TenxError(
                f"{path} has no genome {source.genome!r} (ingest.source.genome); it has {', '.join(genomes)}"
            )
        genes &= features["genome"] == source.genome
    if problems := [f.message for f in repeated_findings(GeneNames(list(features["id"][genes]), "10x"))]:
        raise TenxError(f"{path}: {'; '.join(problems)}")
    ids = [plain_id(x) for x in features["id"][genes]]
    table = pd.DataFrame({"feature_id": ids, "feature_name": list(features["name"][genes]), "feature_length": 0})
    return _Sample(name, path, matrix, np.flatnonzero(genes), table, chosen)


# ---- obs ---------------------------------------------------------------------------------------------------------
def _obs(
    samples: Sequence[_Sample], source: TenxSource, needed: Sequence[str], notes: list[str],
    named_by: Mapping[str, str],
) -> pd.DataFrame:  # fmt: skip
    """Return one row per barcode, with the columns of the table that describes the cells."""
    barcodes = [b for s in samples for b in s.matrix.barcodes]
    names = [s.name for s in samples for _ in s.matrix.barcodes]
    ids = [f"{n}:{b}" for n, b in zip(names, barcodes, strict=True)] if len(samples) > 1 else barcodes
    obs = pd.DataFrame({"obs_id": ids, "barcode": barcodes, "dataset_id": names})
    if source.obs is not None:
        return describe(obs, source, [s.name for s in samples], notes)
    if source.columns:
        raise InputError("ingest.source.columns renames columns of ingest.source.obs, which is not set")
    if absent := [c for c in needed if c not in obs and c != "is_primary_data"]:
        places = list(dict.fromkeys(named_by[c] for c in absent if c in named_by))
        raise InputError(
            "".join(f"{place}: " for place in places[:1])
            + f"a 10x output holds no {', '.join(absent)}: give a table with barcode and {', '.join(absent)} in "
            f"ingest.source.obs{'' if places else WITHOUT_LABELS}"
        )
    return obs
