"""Cells as a collection of Zarr v3 stores, as annbatch reads it for training.

Layout (annbatch's DatasetCollection): a group with `encoding-type: annbatch-preshuffled`, and in it `dataset_0`,
`dataset_1`, …, each an AnnData of up to 2,097,152 cells whose sparse values lie in chunks of 32,768 inside shards, one
file each. Readers order datasets by their name, so that numbers have one width here.

The collection appears under its name when it is whole. A run that was killed goes on behind the last whole dataset.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import zarr
from zarr.codecs import BloscCodec, BloscShuffle

from scldm.cells.cells import Cells
from scldm.errors import InputError

ENCODING = {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}
CELLS_PER_DATASET = 250_000  # in memory at once, with all that goes with it
SPARSE_CHUNK, SPARSE_SHARD = 32_768, 1 << 26  # values
DENSE_CHUNK, DENSE_SHARD = 1024, 1 << 17  # cells
SLICE = 1000  # cells that stay together on their way through a shuffle


def export_zarr(
    cells: Cells, out: Path, *, shuffle: int | None = None, cells_per_dataset: int = CELLS_PER_DATASET
) -> int:
    """Write the collection `out` (a folder that ends in .zarr); the number of datasets.

    Args:
        shuffle: Seed of a shuffle: slices of 1,000 cells are dealt to datasets, cells inside a dataset permuted. None
            keeps the order.

    Raises:
        InputError: the name is not one that annbatch opens, or something is in the way.
    """
    if out.suffix != ".zarr":
        raise InputError(f"{out}: name a folder that ends in .zarr; annbatch opens no other")
    if out.exists():
        raise InputError(f"{out} is there already; name another folder, or remove it")
    if not cells.n_obs or not cells.n_vars:
        raise InputError(f"{cells.folder} holds {cells.n_obs} cells x {cells.n_vars} genes: nothing to train on")
    partial = out.with_name(f".{out.name}.partial")
    what = {"cells": [s.sha256 for s in cells.shards], "shuffle": shuffle, "cells_per_dataset": cells_per_dataset}
    mark = partial.with_suffix(".json")
    _begin(partial, mark, what)
    with warnings.catch_warnings():  # of defaults to come, and that consolidated metadata is younger than the format
        warnings.simplefilter("ignore", UserWarning)
        n = _write_all(cells, partial, _parts(cells.n_obs, cells_per_dataset, shuffle), shuffle)
    partial.rename(out)
    mark.unlink()
    return n


def _write_all(cells: Cells, partial: Path, parts: list[np.ndarray], shuffle: int | None) -> int:
    """The datasets that are missing, then what says that all are there."""
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


def _begin(partial: Path, mark: Path, what: dict[str, Any]) -> None:
    """An empty start, or what a killed export of the same cells left."""
    if partial.is_dir() and mark.is_file() and json.loads(mark.read_text()) == json.loads(json.dumps(what)):
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tmp = mark.with_suffix(f".{os.getpid()}.tmp")
    tmp.write_text(json.dumps(what))
    tmp.replace(mark)


def _parts(n: int, size: int, shuffle: int | None) -> list[np.ndarray]:
    """Rows of each dataset, in their order."""
    if shuffle is None:
        return [np.arange(i, min(i + size, n)) for i in range(0, n, size)]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([shuffle, n])))
    slices = [np.arange(i, min(i + SLICE, n)) for i in range(0, n, SLICE)]
    order = np.concatenate([slices[i] for i in rng.permutation(len(slices))])
    return [rng.permutation(order[i : i + size]) for i in range(0, n, size)]


def _write(group: zarr.Group, name: str, adata: anndata.AnnData) -> None:
    """One dataset; marked when it is whole."""
    with anndata.settings.override(zarr_write_format=3):
        anndata.experimental.write_dispatched(group, name, adata, callback=_sharded)
    group[name].attrs["scldm-complete"] = True


def _sharded(write: Any, store: Any, key: str, element: Any, dataset_kwargs: Any, *, iospec: Any) -> None:
    """Chunks and shards for what has values of many cells; the rest as anndata writes it."""
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
