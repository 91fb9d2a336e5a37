"""Library sizes of other cells than those that a model was trained on: generate.library_size={of: …}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.config.input_paths import library_size_file
from pipeline.config.job import H5adSource
from pipeline.data.labels import label_names
from pipeline.data.sources.h5ad import read_h5ad
from pipeline.data.tables import CellTables
from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

WHERE = "generate.library_size.of"
REMEDY = "ingest these cells and name the pipeline"


def read_library_sizes(place: str, vocabulary: Vocabulary) -> LibrarySizes:
    """Return statistics by condition, from a JSON file of ours or over all cells of an `.h5ad` file.

    Cells of a file are counted over the genes of the model; obs columns that are called as its labels give conditions.

    Args:
        place: As the setting names it: an ingest, a pipeline, a model, or a file.
        vocabulary: Of the model that generates.

    Raises:
        InputError: There are no statistics, or the file holds no counts of these genes.
    """
    path = library_size_file(place)
    if path.suffix == ".json":
        return _read_json(path, place)
    tables, kept = _open(path, vocabulary)
    sizes = np.concatenate([_sizes(chunk, kept, place) for chunk in tables.chunks()])
    counted = sizes > 0
    if not counted.any():
        raise InputError(f"{WHERE}: no cell of {place} has a count in a gene of the model; {REMEDY}")
    names = {x.name: label_names(tables.obs[x.name]) for x in vocabulary.labels if x.name in tables.obs}
    found = LibrarySizes.fit(sizes[counted], {})
    for some in _conditions(names):
        known = counted & np.all([pd.notna(names[x]) for x in some], axis=0)
        if known.any():
            own = LibrarySizes.fit(sizes[known], {x: names[x][known] for x in some})
            found = LibrarySizes({**own.table, **found.table})  # what is found first, `all` too, is over most cells
    return found


def library_size_problems(place: str, vocabulary: Vocabulary | None) -> list[str]:
    """Return why statistics cannot be taken from a place, before a job starts: of a file, from its first cells.

    Args:
        vocabulary: Of the model that generates; None if it is not known yet.
    """
    try:
        path = library_size_file(place)
        if path.suffix == ".json":
            _read_json(path, place)
        else:
            tables, kept = _open(path, vocabulary)
            _sizes(next(iter(tables.chunks())), kept, place)
    except FileNotFoundError:
        return []  # reported with all missing input files
    except InputError as error:
        return [str(error)]
    return []


def _conditions(names: dict[str, np.ndarray]) -> Iterator[list[str]]:
    """Yield each label, and all together."""
    yield from ([x] for x in names)
    if len(names) > 1:
        yield list(names)


def _read_json(path: Path, place: str) -> LibrarySizes:
    try:
        sizes = LibrarySizes.load(path)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{WHERE}: {path} holds no library-size statistics ({error})") from error
    if sizes.missing is not None:
        raise InputError(
            f"{WHERE}: {place} has no library-size statistics ({sizes.missing}); name other cells, or set "
            "generate.library_size to a number"
        )
    return sizes


def _open(path: Path, vocabulary: Vocabulary | None) -> tuple[CellTables, np.ndarray | None]:
    """Return the cells of a file, and which of its genes the model has, bool; None: not known yet."""
    tables = read_h5ad(H5adSource(type="h5ad", path=str(path)))
    if vocabulary is None:
        return tables, None
    kept = tables.var["feature_id"].isin(vocabulary.feature_ids).to_numpy()
    if not kept.any():
        raise InputError(
            f"{WHERE}: none of the genes of {path} is one of the model's {vocabulary.n_genes} (here "
            f"{', '.join(tables.var['feature_id'][:2])}, there {', '.join(vocabulary.feature_ids[:2])}); {REMEDY}"
        )
    return tables, kept


def _sizes(chunk: sp.csr_matrix, kept: np.ndarray | None, place: str) -> np.ndarray:
    """Return the sum of counts of each cell, (n,)."""
    if ((chunk.data < 0) | (chunk.data != np.rint(chunk.data))).any():
        raise InputError(f"{WHERE}: X of {place} holds values that are no counts; {REMEDY}")
    own = chunk if kept is None else chunk[:, np.flatnonzero(kept)]
    return np.asarray(own.sum(1), dtype=np.float64).ravel()
