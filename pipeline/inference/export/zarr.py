"""Exports cells to a collection of Zarr v3 stores, which annbatch reads for training.

Layout (annbatch's DatasetCollection): a group with `encoding-type: annbatch-preshuffled`, and in it `dataset_0`,
`dataset_1`, …, each an AnnData of up to 2,097,152 cells whose sparse values lie in chunks of 32,768 inside shards, one
file each. Readers sort datasets by name, so all numbers have the same width here.

The collection gets its name when it is complete. An interrupted run resumes after the last complete dataset.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import zarr
from zarr.codecs import BloscCodec, BloscShuffle

from pipeline.core.files import replaces
from scldm.cells.cells import Cells
from scldm.errors import InputError

ENCODING = {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}
CELLS_PER_DATASET = 250_000  # in memory together, with their arrays
SPARSE_CHUNK, SPARSE_SHARD = 32_768, 1 << 26  # values
DENSE_CHUNK, DENSE_SHARD = 1024, 1 << 17  # cells
SLICE = 1000  # cells that stay together when datasets are shuffled


def export_zarr(
    cells: Cells, out: Path, *, shuffle: int | None = None, cells_per_dataset: int = CELLS_PER_DATASET
) -> int:
    """Write the collection `out`, a folder that ends in .zarr; return the number of datasets.

    Args:
        shuffle: Seed of a shuffle: slices of 1,000 cells are distributed over datasets, and cells are permuted inside a
            dataset. None keeps the order.

    Raises:
        InputError: annbatch does not open such a name, or `out` exists.
    """
    if out.suffix != ".zarr":
        raise InputError(f"{out}: name a folder that ends in .zarr; annbatch opens no other")
    if out.exists():
        raise InputError(f"{out} exists already; name another folder, or remove it")
    if not cells.n_obs or not cells.n_vars:
        raise InputError(f"{cells.folder} holds {cells.n_obs} cells x {cells.n_vars} genes: nothing to train on")
    partial = out.with_name(f".{out.name}.partial")
    settings = {"cells": [s.sha256 for s in cells.shards], "shuffle": shuffle, "cells_per_dataset": cells_per_dataset}
    mark = partial.with_suffix(".json")
    _begin(partial, mark, settings)
    with warnings.catch_warnings():  # about future defaults, and consolidated metadata that is not in the format yet
        warnings.simplefilter("ignore", UserWarning)
        n = _write_all(cells, partial, _parts(cells.n_obs, cells_per_dataset, shuffle), shuffle)
    partial.rename(out)
    mark.unlink()
    return n


def _write_all(cells: Cells, partial: Path, parts: list[np.ndarray], shuffle: int | None) -> int:
    """Write the datasets that are missing, then the metadata that marks the collection as complete."""
    group = zarr.open_group(partial, mode="a", zarr_format=3)
    width = max(1, len(str(len(parts) - 1)))
    for k, rows in enumerate(parts):
        name = f"dataset_{k:0{width}d}"
        if name in group and group[name].attrs.get("scldm-complete"):
            continue
        if name in group:
            shutil.rmtree(partial / name)
        _write(group, name, cells[rows])
    group.attrs.update({**ENCODING, "scldm-shuffle": shuffle})
    zarr.consolidate_metadata(group.store)
    return len(parts)


def _begin(partial: Path, mark: Path, settings: dict[str, Any]) -> None:
    """Keep what an interrupted export of the same cells left, or start empty."""
    if partial.is_dir() and mark.is_file() and json.loads(mark.read_text()) == json.loads(json.dumps(settings)):
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with replaces(mark) as tmp:
        tmp.write_text(json.dumps(settings))


def _parts(n: int, size: int, shuffle: int | None) -> list[np.ndarray]:
    """Return the rows of each dataset, in order."""
    if shuffle is None:
        return [np.arange(i, min(i + size, n)) for i in range(0, n, size)]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([shuffle, n])))
    slices = [np.arange(i, min(i + SLICE, n)) for i in range(0, n, SLICE)]
    order = np.concatenate([slices[i] for i in rng.permutation(len(slices))])
    return [rng.permutation(order[i : i + size]) for i in range(0, n, size)]


def _write(group: zarr.Group, name: str, adata: anndata.AnnData) -> None:
    """Write one dataset, and mark it as complete."""
    with anndata.settings.override(zarr_write_format=3):
        anndata.experimental.write_dispatched(group, name, adata, callback=_sharded)
    group[name].attrs["scldm-complete"] = True


def _sharded(write: Any, store: Any, key: str, element: Any, dataset_kwargs: Any, *, iospec: Any) -> None:
    """Write large elements in chunks and shards, and the others as anndata does."""
    options = {"compressors": (BloscCodec(cname="lz4", clevel=3, shuffle=BloscShuffle.shuffle),)}
    kwargs = dict(dataset_kwargs)
    if iospec.encoding_type == "csr_matrix":
        chunk = min(SPARSE_CHUNK, max(1, element.nnz))
        shard = min(SPARSE_SHARD, -(-max(1, element.nnz) // chunk) * chunk)
        kwargs |= {"chunks": (chunk,), "shards": (shard,), **options}
    elif (
        iospec.encoding_type == "array"
        and any(part in f"{store.name}/{key}" for part in ("obsm/", "layers/"))
        and len(element)
    ):
        chunk = min(DENSE_CHUNK, len(element))
        shard = min(DENSE_SHARD, -(-len(element) // chunk) * chunk)
        kwargs |= {"chunks": (chunk, *element.shape[1:]), "shards": (shard, *element.shape[1:]), **options}
    write(store, key, element, dataset_kwargs=kwargs)
