"""Finds the same cell twice among the cells of a job, and keeps its copies on one side of the split.

Overlapping files and resubmitted samples hold a cell more than once; if one copy is trained on and another one is held
out, held-out scores mean nothing. Copies are kept, and a note says how many there are. Cells of the Census are told
apart by its own `is_primary_data` (`ingest.cells.is_primary_data`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.entries import CountEntries
from pipeline.data.parallel import cluster_is_up, each_in_order
from pipeline.data.soma.store import SomaStore
from pipeline.data.validation.cell_hashes import COLUMNS, MIN_GENES, CellHashes, first_of_each
from pipeline.data.validation.counts import LEAVE_OUT_COPIES

LARGE = 200_000  # cells of an experiment of others that are read once more to find copies
TILES_PER_READ = 16
SHOWN = 3  # pairs of data sets that are named


@dataclass(frozen=True)
class Copies:
    """For each cell the position of the first cell with the same counts, (n,); its own if there is none before."""

    first: np.ndarray  # by counts alone: cells of few genes may agree by chance
    same_cell: np.ndarray  # only where that cannot be chance

    @classmethod
    def none(cls, n: int) -> Copies:
        """Return that no cell has a copy."""
        return cls(np.arange(n), np.arange(n))

    @classmethod
    def of(cls, hashes: np.ndarray, n_genes: np.ndarray) -> Copies:
        """Find copies by the hashes of cells, (n, 2), and their numbers of expressed genes, (n,)."""
        first = first_of_each(hashes)
        return cls(first, np.where(n_genes >= MIN_GENES, first, np.arange(len(first))))

    @property
    def n(self) -> int:
        """Number of cells that are copies of an earlier cell."""
        return int((self.same_cell != np.arange(len(self.same_cell))).sum())


def find_copies(store: SomaStore, cells: pd.DataFrame, notes: list[str]) -> Copies:
    """Find the copies among cells; add a note if there are any, or if they cannot be looked for.

    Args:
        cells: Table with soma_joinid, ascending.
    """
    ids = cells["soma_joinid"].to_numpy()
    if {*COLUMNS, "nnz"} <= set(store.obs_columns()):
        table = store.obs([*COLUMNS, "nnz"])
        at = np.searchsorted(table["soma_joinid"].to_numpy(), ids)
        copies = Copies.of(table[list(COLUMNS)].to_numpy()[at], table["nnz"].to_numpy()[at])
    elif len(ids) > LARGE:
        notes.append(
            f"copies of the same cell were not looked for among {len(ids):,} cells of an experiment that is read in "
            "place; `scldm validate-data` reads all counts and finds them."
        )
        return Copies.none(len(ids))
    else:
        copies = Copies.of(*hashes_of(store, ids))
    if copies.n:
        notes.append(_note(store, ids, copies))
    return copies


def keep_together(split: np.ndarray, copies: Copies, held_out: np.ndarray) -> np.ndarray:
    """Return the splits with every copy of a held-out cell on its side.

    Args:
        split: (n,).
        held_out: Cells of held-out combinations, bool (n,).
    """
    at = np.flatnonzero(held_out)
    groups, where = np.unique(copies.same_cell[at], return_index=True)
    leader = np.full(len(split), -1)
    leader[groups] = at[where]
    follows = leader[copies.same_cell]
    return np.where(follows >= 0, split[follows], split)


def copies_facts(copies: Copies) -> dict[str, Any]:
    """Return the fact for the manifest; empty if there are no copies."""
    return {"copied_cells": copies.n} if copies.n else {}


def _note(store: SomaStore, ids: np.ndarray, copies: Copies) -> str:
    later = np.flatnonzero(copies.same_cell != np.arange(len(ids)))
    where = ""
    if "dataset_id" in store.obs_columns():
        table = store.obs(["dataset_id"])
        names = table["dataset_id"].astype(str).to_numpy()[np.searchsorted(table["soma_joinid"].to_numpy(), ids)]
        pairs = Counter(zip(names[copies.same_cell[later]], names[later], strict=True))
        if len({name for pair in pairs for name in pair}) > 1:
            texts = [f"{n:,} {f'in {a} and {b}' if a != b else f'twice in {a}'}" for (a, b), n in pairs.most_common()]
            where = f" ({', '.join(texts[:SHOWN])}{', …' if len(texts) > SHOWN else ''})"
    return (
        f"{copies.n:,} of {len(ids):,} cells have exactly the counts of an earlier cell{where}: copies are kept, on "
        f"one side of the split; {LEAVE_OUT_COPIES}."
    )


# ---- experiments that do not record hashes -----------------------------------------------------------------------
def hashes_of(store: SomaStore, ids: np.ndarray, gene_lut: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read the counts of cells; return hashes (n, 2) and numbers of expressed genes (n,).

    Args:
        gene_lut: As for `SomaStore.read_ragged`: cells of two stores are compared by the genes of one vocabulary.
    """
    parallel = len(ids) >= LARGE // 2 and cluster_is_up()
    found = list(each_in_order(_read_part, (store, gene_lut), _parts(ids, store.tile), parallel=parallel))
    return np.concatenate([h for h, _ in found]), np.concatenate([n for _, n in found])


def _parts(ids: np.ndarray, tile: int) -> Iterator[np.ndarray]:
    yield from np.split(ids, np.flatnonzero(np.diff(ids // (tile * TILES_PER_READ))) + 1)


def _read_part(reading: tuple[SomaStore, np.ndarray | None], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    store, gene_lut = reading
    rows = store.read_ragged(ids, gene_lut)
    sizes = np.diff(rows.indptr)
    hashes = CellHashes(len(ids))
    hashes.add(CountEntries(np.repeat(np.arange(len(ids)), sizes), rows.genes, rows.counts))
    return hashes.values, sizes
