"""Read the manifest of a finished stage of cells, and rows of one shard.

Only the manifest is trusted: files that it does not list are ignored, and a folder without one holds no result yet.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, sparse_dataset

from scldm.errors import InputError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 3  # the newest contract of cells that this code reads


class CellShardsError(InputError, ValueError):
    """Raised for a folder or a shard that cannot be read. The message says what is wrong, where, and how to fix it."""


@dataclass(frozen=True)
class Shard:
    """An `.h5ad` file of the stage."""

    path: Path
    n_cells: int
    sha256: str

    def digest(self) -> str:
        """Return the sha256 of the file as it is now."""
        with self.path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()


@dataclass(frozen=True)
class CellsManifest:
    """Manifest of a finished stage of cells."""

    folder: Path
    stage: str
    version: str
    shards: tuple[Shard, ...]
    index: Path | None  # obs of all shards in one table
    raw: Mapping[str, Any]  # the whole manifest

    @property
    def n_cells(self) -> int:
        """Number of cells in all shards."""
        return sum(s.n_cells for s in self.shards)


def read_cells_manifest(folder: Path | str) -> CellsManifest:
    """Read and check the manifest of a stage folder.

    Raises:
        CellShardsError: There is no manifest, it is not of cells, or it is of a newer version of this code.
    """
    folder = Path(folder).expanduser()
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CellShardsError(f"{folder}: no such folder; give a stage's, for example runs/demo/generate/1a2b3c4d5e6f")
    if not path.is_file():
        raise CellShardsError(_without_manifest(folder))
    try:
        raw = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CellShardsError(f"{path} is damaged ({error}); run the job again in another folder") from error
    facts = raw.get("facts") if isinstance(raw, dict) else None
    if not isinstance(facts, dict) or not isinstance(raw.get("stage"), str):
        raise CellShardsError(f"{path} is not the manifest of a stage: it has no stage and facts")
    version = facts.get("schema_version", 1)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise CellShardsError(
            f"{path} has schema_version {version!r}, and this version of scldm reads up to {SCHEMA_VERSION}: upgrade it"
        )
    if not isinstance(facts.get("shards"), list) or not all(_is_record(r) for r in facts["shards"]):
        raise CellShardsError(
            f"{path} is of the stage {raw['stage']}, which lists no .h5ad shards of cells; stages that do: generate, "
            "embed, reconstruct, perturb, log_likelihood"
        )
    shards = tuple(Shard(_inside(folder, r["file"]), int(r["n_cells"]), r["sha256"]) for r in facts["shards"])
    index = facts.get("index")
    return CellsManifest(
        folder, raw["stage"], str(raw.get("version")), shards, None if index is None else _inside(folder, index), raw
    )


def _without_manifest(folder: Path) -> str:
    committed = len(list((folder / "cells").glob("part-*.h5ad.json")))
    if committed:
        return (
            f"{folder} is not finished: {committed} shards are committed and there is no {MANIFEST} yet; run the job's "
            "command again, which writes the missing ones"
        )
    versions = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
    hint = f"; did you mean {folder / versions[-1]}?" if versions else ""
    return f"{folder} is not a finished stage: it has no {MANIFEST}{hint}"


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("file"), str)
        and record["file"].endswith(".h5ad")
        and isinstance(record.get("n_cells"), int)
        and isinstance(record.get("sha256"), str)
    )


def _inside(folder: Path, name: str) -> Path:
    """Return a file that the manifest names; refuse one outside, which an untrusted manifest could name."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise CellShardsError(f"{folder / MANIFEST} names {name!r}, which is outside the folder; it is not ours")
    return folder / name


# ---- rows --------------------------------------------------------------------------------------------------------
def read_part(shard: Shard, name: str) -> Any:
    """Read an element of a shard: obs, var or uns.

    Raises:
        CellShardsError: The file is missing or cannot be read.
    """
    with _opened(shard) as f:
        return read_elem(f[name]) if name in f else None


def read_rows(shard: Shard, rows: np.ndarray, obs: pd.DataFrame) -> anndata.AnnData:
    """Read cells of one shard into memory: X, layers and obsm of those rows only.

    Args:
        rows: Positions in the shard, in any order and with repeats, (n,).
        obs: Their obs, from the index.
    """
    unique, inverse = np.unique(rows, return_inverse=True)
    same = len(unique) == len(rows) and bool((unique == rows).all())
    take = lambda m: m if same else m[inverse]  # noqa: E731
    with _opened(shard) as f:
        x = take(_rows(f["X"], unique)) if "X" in f else None
        layers = {k: take(_rows(f["layers"][k], unique)) for k in f.get("layers", ())}
        obsm = {k: take(_rows(f["obsm"][k], unique)) for k in f.get("obsm", ())}
        var, uns = read_elem(f["var"]), read_elem(f["uns"])
    return anndata.AnnData(x, obs=obs, var=var, layers=layers, obsm=obsm, uns=uns)


def _rows(element: Any, rows: np.ndarray) -> Any:
    """Read sorted unique rows of a CSR group or a dense dataset."""
    whole = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
    key = slice(int(rows[0]), int(rows[-1]) + 1) if whole else rows
    if isinstance(element, h5py.Group):
        return sparse_dataset(element)[key]
    return element[key]


def _opened(shard: Shard) -> h5py.File:
    try:
        return h5py.File(shard.path, "r")
    except OSError as error:
        problem = "cannot be read" if shard.path.is_file() else "is missing"
        raise CellShardsError(
            f"{shard.path} {problem} ({str(error).splitlines()[0]}); `scldm cells verify "
            f"{shlex.quote(str(shard.path.parent.parent))}` lists all damaged files"
        ) from error
