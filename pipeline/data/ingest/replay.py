"""Adds old cells to the training cells: ingest.replay, so that a model that is trained on does not forget them.

Old cells are cells of the store like any other, in the split `train` only. So nothing after ingest knows of them: their
order, the latent cache and a resumed training are those of one set of cells. They are read where they are, by ids that
follow those of the new cells. A column `replayed` keeps them out of what describes the new data: statistics, floors,
`like: train`.

Shape letters: n cells, g genes of the vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.config.ingest import ReplayConfig, Source
from pipeline.config.job import CensusSource, IngestConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.copies import LARGE, hashes_of
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.ingest.filters import find_values, value_filter
from pipeline.data.ingest.genes import LACKING, gene_lut, places_of
from pipeline.data.ingest.held_out import Combination, in_combinations
from pipeline.data.ingest.measured import presence_of_cells
from pipeline.data.ingest.statistics import count_statistics
from pipeline.data.ingest.subsample import subsample_cells
from pipeline.data.labels import label_names
from pipeline.data.loading.blocks import LABEL
from pipeline.data.presence import GROUP, Presence
from pipeline.data.soma.store import SomaStore
from pipeline.data.sources.open import OpenSource, open_source, with_counts
from pipeline.data.tables import UNKNOWN
from pipeline.data.validation.cell_hashes import MIN_GENES
from scldm.data.label_type import LabelType
from scldm.data.library_size import ALL, LibrarySizes
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import InputError

REPLAYED = "replayed"  # column of the table of cells, if there are old ones
FOLDER = "replay"  # in the folder of ingest: what is written of old cells
GENES = "replay_genes.parquet"
SPARE_CELLS = 16  # generated beyond the share: one may be empty, or be left out


@dataclass
class OldCells:
    """Cells that may be replayed, and where they are."""

    opened: OpenSource
    cells: pd.DataFrame  # soma_joinid, ascending; names of classes by label and column of combinations, None: none
    measured: Presence | None = None  # by rows of `cells`, genes of the store; None: `opened` tells


@dataclass(frozen=True)
class Replayed:
    """The old cells of an ingest."""

    cells: pd.DataFrame  # soma_joinid as of the joined store, library_size, n_expressed, and n rows of `labels`
    labels: pd.DataFrame  # names of classes by label, None: none
    genes: np.ndarray  # joinid of each gene in the store of the old cells, (g,)
    presence: Presence
    facts: dict[str, Any]  # how they are read, and how many they are
    content: str  # hash of their counts
    notes: list[str] = field(default_factory=list)

    def classes(self, label: str) -> set[str]:
        """Return the classes that the old cells have."""
        return set(self.labels[label].dropna())


@dataclass(frozen=True)
class NewCells:
    """What old cells are added to."""

    store: SomaStore
    genes: pd.DataFrame  # soma_joinid, feature_id, feature_name of the vocabulary
    n_train: int
    held_out: np.ndarray  # soma_joinids
    combinations: Sequence[Combination]  # held out


# ---- where they are ----------------------------------------------------------------------------------------------
def of_pipeline(ingest: Manifest, columns: Sequence[str], folder: Path, output: Path | None) -> OldCells:
    """Return the training cells of an earlier ingest: what it held out stays unseen.

    Args:
        columns: Labels, and columns of held-out combinations.
        folder: Of the new ingest.
        output: Root folder of outputs; a place below it is recorded relative to `folder`, so that all can be moved.
    """
    data = IngestedDataset.open(ingest)
    f, cells = data.facts, data.cells_of("train")
    known = {x.name: np.array([*x.classes, None], dtype=object) for x in data.vocabulary.labels if x.name in columns}
    names = {name: classes[cells[LABEL + name]] for name, classes in known.items()}
    uri = data.soma_uri
    store = SomaStore(uri, dict(f["tiledb_config"]), f["measurement"], f["layer"], int(f.get("seen_at", 0)))
    inside = output is not None and "://" not in uri and Path(uri).resolve().is_relative_to(output.resolve())
    where = os.path.relpath(Path(uri).resolve(), folder.resolve()) if inside else uri
    opened = OpenSource(store, where, f"training cells of {ingest.folder} ({f.get('source', 'not stated')})")
    return OldCells(
        opened,
        pd.DataFrame({"soma_joinid": cells["soma_joinid"].to_numpy(), **names}),
        _measured_in_store(data, cells),
    )


def _measured_in_store(data: IngestedDataset, cells: pd.DataFrame) -> Presence:
    """Return what an earlier ingest knows of the genes of its store: one outside its vocabulary was not measured."""
    n, n_genes = len(cells), int(data.facts["n_genes_source"])
    if data.measured is None:
        return Presence.everywhere("old cells", n_cells=n, n_genes=n_genes)
    places = data.gene_stats["gene_joinid"].to_numpy()
    measured = np.zeros((len(data.measured), n_genes), bool)
    measured[:, places[places != LACKING]] = data.measured[:, places != LACKING]
    names = tuple(f"old cells {k + 1}" for k in range(len(measured)))
    return Presence(names, measured, cells[LABEL + GROUP].to_numpy(np.int32))


def of_source(source: Source, config: IngestConfig, columns: Sequence[str], folder: Path) -> OldCells:
    """Return the cells of a source; one that is not in SOMA is written to `folder`/soma."""
    assert config.replay is not None
    own = IngestConfig(source=source, labels=[], cells=config.replay.cells, missing_text=config.missing_text)
    folder.mkdir(exist_ok=True)
    opened = with_counts(open_source(own, folder, ()), source)
    if opened.uri == "soma":
        opened.uri = f"{FOLDER}/soma"
    available = opened.store.obs_columns()
    present = [c for c in columns if c in available]
    extra = ["dataset_id"] if "dataset_id" in available else []
    chosen = value_filter(find_values(own.cells, opened.store))
    cells = opened.store.obs(list(dict.fromkeys([*present, *extra])), chosen)
    if not len(cells):
        raise InputError(f"ingest.replay: {opened.description} has no cells under ingest.replay.cells; loosen it")
    names = {c: label_names(cells[c], config.missing_text) for c in present}
    # A file that lacks a column of the Census is written with "unknown" in it, which is no class.
    names = {c: x for c, x in names.items() if not (c in UNKNOWN and set(x) == {"unknown"})}
    return OldCells(opened, cells[["soma_joinid", *(c for c in extra if c not in present)]].assign(**names))


# ---- which of them -----------------------------------------------------------------------------------------------
def replay(old: OldCells, new: NewCells, config: IngestConfig) -> Replayed:
    """Draw the old cells, by seed, and read their counts once.

    Raises:
        InputError: There are too few of them, or they have none of the genes.
    """
    assert config.replay is not None
    store, notes = old.opened.store, [f"Old cells: {note}" for note in old.opened.notes]
    places = places_of(store, new.genes, config.genes.match)
    _require_genes(places, new.genes, old, config.genes.match)
    eligible = ~in_combinations(old.cells, list(new.combinations))
    if n := int((~eligible).sum()):
        notes.append(f"{n:,} old cells are of combinations that are held out, and are not replayed.")
    rows = np.flatnonzero(eligible)
    _require_some(len(rows))
    rows = rows[_drawn(old.cells["soma_joinid"].to_numpy()[rows], new.n_train, config.replay, store.tile)]
    ids = old.cells["soma_joinid"].to_numpy()[rows]
    lut = gene_lut(pd.DataFrame({"soma_joinid": places}), store.shape[1])
    stats, _ = count_statistics(store, ids, np.ones(len(ids), bool), lut, len(places))
    kept = (stats.library_size > 0) & ~_copies_of_held_out(store, ids, places, new, notes)
    if n := int((stats.library_size <= 0).sum()):
        notes.append(f"{n:,} old cells have no counts in the vocabulary, and are not replayed.")
    _require_some(int(kept.sum()))
    start = _after(new.store)
    counted = {"library_size": stats.library_size[kept], "n_expressed": stats.n_expressed[kept]}
    return Replayed(
        pd.DataFrame({"soma_joinid": ids[kept] + start, **counted}),
        _labels(old, rows[kept], config.labels, notes),
        places,
        _presence(old, rows[kept], places, config, notes),
        _facts(old, int(kept.sum()), new.n_train, config.replay.seed) | {"start": start},
        stats.content,
        notes,
    )


def _labels(old: OldCells, rows: np.ndarray, names: Sequence[str], notes: list[str]) -> pd.DataFrame:
    """Return the classes of the drawn cells; a label that they lack is None in all."""
    lacking = np.full(len(rows), None)
    labels = pd.DataFrame({x: old.cells[x].to_numpy(object)[rows] if x in old.cells else lacking for x in names})
    notes += [
        f"{int(labels[x].isna().sum()):,} old cells have no {x}: they are trained on without it."
        for x in names
        if labels[x].isna().any()
    ]
    return labels


def _facts(old: OldCells, n: int, n_train: int, seed: int) -> dict[str, Any]:
    """Return how many cells are replayed, where they are from, and how they are read."""
    store = old.opened.store
    return {
        "source": old.opened.description,
        "n_cells": n,
        "share": round(n / (n + n_train), 6),
        "seed": seed,
        "soma_uri": old.opened.uri,
        "tiledb_config": dict(store.tiledb_config),
        "measurement": store.measurement,
        "layer": store.layer,
        "seen_at": store.seen_at,
        "n_genes_source": store.shape[1],
        "genes": GENES,
        **{k: v for k, v in old.opened.facts.items() if k == "census_version"},
    }


def old_cells_beside(n_train: int, share: float) -> int:
    """Return the number of old cells that are this share of all training cells."""
    return max(1, round(share / (1 - share) * n_train))


def require_type(replayed: Replayed, types: Mapping[str, LabelType]) -> None:
    """Raise InputError if classes of the old cells are no values of the label in the new ones, as B of a number."""
    for name in replayed.labels:
        for found in sorted(replayed.classes(name)):
            try:
                types[name].column([found], [found], gaps=False)
            except (ValueError, KeyError) as error:
                raise InputError(
                    f"ingest.replay: old cells have the {name} {found!r}, and {name} is {types[name].values} in the "
                    "new cells; give both the same type, or read one under another name (ingest.source.columns)"
                ) from error


def _drawn(joinids: np.ndarray, n_train: int, config: ReplayConfig, tile: int) -> np.ndarray:
    """Return the positions of the cells that make up the share of all training cells."""
    n = old_cells_beside(n_train, config.share)
    if n > len(joinids):
        most = len(joinids) / (len(joinids) + n_train)
        raise InputError(
            f"ingest.replay.share ({config.share:g}) takes {n:,} old cells beside {n_train:,} new training cells, and "
            f"there are {len(joinids):,}; set at most ingest.replay.share={np.floor(most * 1000) / 1000:g}"
        )
    return subsample_cells(joinids, n, tile=tile, seed=config.seed)


def _require_some(n: int) -> None:
    if not n:
        raise InputError(
            "no old cell is left to replay: all are held out or have no counts in the vocabulary; name other old "
            "cells, or set ingest.replay=null"
        )


def _require_genes(places: np.ndarray, genes: pd.DataFrame, old: OldCells, match: str) -> None:
    if (places == LACKING).all():
        there = ", ".join(old.opened.store.var()["feature_id"].astype(str)[:2]) if len(places) else ""
        raise InputError(
            f"ingest.replay: none of the {len(places)} genes is in the {old.opened.description} (by {match}: here "
            f"{', '.join(genes['feature_id'][:2])}, there {there}); check the organism and the kind of gene ids"
        )


def _copies_of_held_out(
    store: SomaStore, ids: np.ndarray, places: np.ndarray, new: NewCells, notes: list[str]
) -> np.ndarray:
    """Return which old cells have the counts of a held-out cell in the genes that both stores have, bool (n,)."""
    none = np.zeros(len(ids), bool)
    if not len(new.held_out):
        return none
    if len(new.held_out) > LARGE:
        notes.append(f"Old cells were not compared with the {len(new.held_out):,} held-out cells: there are too many.")
        return none
    own = new.genes["soma_joinid"].to_numpy()
    shared = (places != LACKING) & (own != LACKING)
    (hashes, n_genes), (held_out, _) = (
        hashes_of(s, cells, gene_lut(pd.DataFrame({"soma_joinid": np.where(shared, genes, LACKING)}), s.shape[1]))
        for s, cells, genes in ((store, ids, places), (new.store, new.held_out, own))
    )
    known = {tuple(h) for h in held_out.tolist()}
    copies = np.array([tuple(h) in known for h in hashes.tolist()], bool) & (n_genes >= MIN_GENES)
    if n := int(copies.sum()):
        notes.append(f"{n:,} old cells have exactly the counts of a held-out cell, and are not replayed.")
    return copies


def _presence(old: OldCells, rows: np.ndarray, places: np.ndarray, config: IngestConfig, notes: list[str]) -> Presence:
    """Return the genes of the vocabulary that the drawn cells measured; a gene that the store lacks was not."""
    if lacking := int((places == LACKING).sum()):
        notes.append(f"{lacking} of {len(places)} genes were not measured in the old cells; they do not count there.")
    if old.measured is not None:
        return old.measured.of_cells(rows).of_genes(places)
    cells = old.cells.iloc[rows]
    told = old.opened.measured is not None
    if told or (config.genes.presence and isinstance(config.replay and config.replay.source, CensusSource)):
        return presence_of_cells(old.opened, cells, places)
    everywhere = Presence.everywhere("old cells", n_cells=len(cells), n_genes=old.opened.store.shape[1])
    return everywhere.of_genes(places)


def _after(store: SomaStore) -> int:
    """Return the first id after those of a store that begins a storage tile."""
    return -(-store.shape[0] // store.tile) * store.tile


# ---- with the new ones -------------------------------------------------------------------------------------------
def with_old_cells(
    cells: pd.DataFrame, presence: Presence | None, replayed: Replayed
) -> tuple[pd.DataFrame, Presence | None]:
    """Return the table of new cells followed by old ones, and what was measured in any; None: all genes in every cell.

    Args:
        cells: soma_joinid, split, library_size, n_expressed and, with a presence, the group.
    """
    old = replayed.cells.assign(split="train", **{REPLAYED: True})
    joined = pd.concat([cells.assign(**{REPLAYED: False}), old], ignore_index=True)
    if presence is None and replayed.presence.is_complete:
        return joined, None
    n_genes = replayed.presence.measured.shape[1]
    first = presence or Presence.everywhere("new cells", n_cells=len(cells), n_genes=n_genes)
    of_new = first.group if presence is None else cells[LABEL + GROUP].to_numpy()
    group = np.append(of_new, replayed.presence.group + len(first.names)).astype(np.int32)
    measured = np.concatenate([first.measured, replayed.presence.measured])
    both = Presence((*first.names, *replayed.presence.names), measured, group)
    return joined.assign(**{LABEL + GROUP: group}), both


def with_old_sizes(sizes: LibrarySizes, vocabulary: Vocabulary, replayed: Replayed) -> LibrarySizes:
    """Add the library sizes of conditions that only old cells have; all others are those of the new cells."""
    found: dict[str, Any] = {}
    for labels in ([x] for x in vocabulary.labels), [list(vocabulary.labels)]:
        for some in labels:
            found |= _sizes_of(some, replayed)
    return LibrarySizes({**{k: v for k, v in found.items() if k != ALL}, **sizes.table})


def _sizes_of(labels: Sequence[LabelVocabulary], replayed: Replayed) -> Mapping[str, Any]:
    codes = {x.name: x.encode(replayed.labels[x.name]) for x in labels}
    known = np.all([codes[x.name] < x.null_id for x in labels], axis=0) if labels else np.zeros(0, bool)
    if not known.any():
        return {}
    of_cells = {x.name: (x.classes, codes[x.name][known]) for x in labels}
    return LibrarySizes.fit_codes(replayed.cells["library_size"].to_numpy()[known], of_cells).table
