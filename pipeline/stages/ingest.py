"""Ingest: vocabularies, split and statistics of a source of cells; the counts stay in (or go to) SOMA.

`.h5ad` files and synthetic cells are written once to `soma/` in the stage's folder; a SOMA experiment and the Census
are read where they are. Everything but the counts is fixed here, so that later stages read facts and never guess.
"""

from __future__ import annotations

import hashlib
import time
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from pipeline.config.job import IngestConfig
from pipeline.core.manifest import StageContext
from pipeline.data.ingest.fill_cache import cache_facts
from pipeline.data.ingest.filters import check_values, value_filter
from pipeline.data.ingest.genes import gene_lut, model_genes
from pipeline.data.ingest.held_out import columns_of, counted, held_out_facts, hold_out, notes_on, read_combinations
from pipeline.data.ingest.measured import measured_genes, over_measured
from pipeline.data.ingest.split import SPLITS, label_counts, require_splits, split_cells
from pipeline.data.ingest.statistics import CountStatistics, count_statistics
from pipeline.data.ingest.subsample import subsample_cells
from pipeline.data.labels import missing
from pipeline.data.loading.blocks import LABEL
from pipeline.data.presence import GROUP, Presence
from pipeline.data.sources.open import OpenSource, open_source
from pipeline.data.validation.checks import label_problems
from pipeline.data.validation.obs_sums import sum_findings
from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import InputError

# Above this, library sizes come from obs where it has them, and gene statistics from a sample of storage tiles.
FULL_PASS_CELLS = 200_000
SAMPLED_TILES = 50


def run(config: IngestConfig, context: StageContext) -> dict[str, Any]:
    """The stage."""
    source = open_source(config, context.folder, _columns(config))
    cells = _eligible(config, source)
    combinations = read_combinations(config.split.held_out)
    cells["split"] = split_cells(cells, config.split, tile=source.store.tile)
    if combinations:
        cells["split"] = hold_out(cells, cells["split"].to_numpy(), combinations)
    genes = model_genes(config.genes, source.store)
    source.notes += genes.notes
    var = genes.table
    var, stats, seen = _statistics(config, source, cells, var)
    cells = cells.assign(library_size=stats.library_size, n_expressed=stats.n_expressed)
    if (presence := measured_genes(config, source, cells, var)) is not None:
        stats = over_measured(stats, presence, seen)
        cells[LABEL + GROUP] = presence.group
    if empty := int((cells["library_size"] <= 0).sum()):
        source.notes.append(f"{empty} cells have no counts in the vocabulary and are left out.")
        cells = cells[cells["library_size"] > 0].reset_index(drop=True)
    require_splits(config.split, cells)

    vocabulary = _vocabulary(config, cells, var)
    if combinations:
        held_out = counted(cells, combinations)
        source.facts |= held_out_facts(held_out, context.folder)
        source.notes += notes_on(held_out, cells, config.split.by)
    facts = _write(context, cells, var, vocabulary, stats, presence)
    train = cells[cells["split"] == "train"]
    _note_unseen_classes(vocabulary, cells, source.notes)
    mean_expressed = float(train["n_expressed"].mean())
    facts = {
        **facts,
        "soma_uri": source.uri,
        "tiledb_config": dict(source.store.tiledb_config),
        "measurement": source.store.measurement,
        "layer": source.store.layer,
        "tile": source.store.tile,
        "seen_at": round(time.time() * 1000),
        "count_type": "uint16" if cells["library_size"].max() < 1 << 16 else "float32",
        "n_genes": vocabulary.n_genes,
        "n_genes_source": source.store.shape[1],
        "n_cells": {split: int((cells["split"] == split).sum()) for split in SPLITS},
        "labels": [x.name for x in vocabulary.labels],
        "n_classes": vocabulary.n_classes,
        "label_counts": label_counts(cells, config.labels),
        "mean_expressed_genes": mean_expressed,
        "max_expressed_genes": int(cells["n_expressed"].max()),
        "zero_fraction": 1 - mean_expressed / vocabulary.n_genes,
        "gene_stats_cells": int(seen.sum()),
        "source": source.description,
        **source.facts,
        **genes.facts,
        "notes": source.notes,
    }
    return facts | cache_facts(config, context, facts, content=source.content or stats.content)


# ---- source ----------------------------------------------------------------------------------------------------------
def _columns(config: IngestConfig) -> list[str]:
    """obs columns that the job cannot do without."""
    by = [] if config.split.by in ("cell", "tile") else [config.split.by]
    # A cell of unknown class may be of a held-out combination: these are needed as labels are.
    return list(dict.fromkeys([*config.labels, *by, *columns_of(config.split.held_out)]))


def _eligible(config: IngestConfig, source: OpenSource) -> pd.DataFrame:
    """Cells that pass the filter and have their labels; max_cells of them, if they are more."""
    available, wanted = source.store.obs_columns(), _columns(config)
    if absent := [c for c in wanted if c not in available]:
        empty = pd.DataFrame(columns=available)
        raise InputError("\n".join(label_problems(empty, absent, drop_missing=False, names=None)))
    extra = [c for c in ("raw_sum", "nnz", *(["dataset_id"] if config.genes.presence else [])) if c in available]
    check_values(config.cells, source.store)
    chosen = value_filter(config.cells.conditions(), config.obs_filter)
    source.facts["value_filter"] = chosen
    cells = source.store.obs([*wanted, *extra], chosen)
    if not len(cells):
        raise InputError(
            f"the filter {chosen!r} (of ingest.cells and ingest.obs_filter) leaves no cells; loosen it"
            if chosen
            else f"{source.description} holds no cells"
        )
    drop = config.missing_label == "drop"
    names = "soma_joinid " + cells["soma_joinid"].astype(str)
    if problems := label_problems(cells, wanted, drop_missing=drop, names=names):
        raise InputError("\n".join(problems))
    for column in wanted:
        if n := int((absent_here := missing(cells[column])).sum()):
            source.notes.append(f"{n} cells have no {column} and are left out.")
            cells = cells[~absent_here].reset_index(drop=True)
    if config.max_cells is not None and len(cells) > config.max_cells:
        source.notes.append(f"{config.max_cells:,} of {len(cells):,} cells were taken: max_cells.")
        some = subsample_cells(cells["soma_joinid"].to_numpy(), config.max_cells, tile=source.store.tile)
        cells = cells.iloc[some].reset_index(drop=True)
    return cells


# ---- genes and statistics ----------------------------------------------------------------------------------------
def _statistics(
    config: IngestConfig, source: OpenSource, cells: pd.DataFrame, var: pd.DataFrame
) -> tuple[pd.DataFrame, CountStatistics, np.ndarray]:
    """The genes that are kept, statistics over them, and which cells the gene statistics are from, bool (n,)."""
    store, ids, train = source.store, cells["soma_joinid"].to_numpy(), (cells["split"] == "train").to_numpy()
    if not train.any():
        require_splits(config.split, cells)
    whole = config.genes.vocabulary == "source" and not config.genes.min_cells and not config.genes.value_filter
    in_obs = {"raw_sum", "nnz"} <= set(cells) and whole
    if in_obs and len(cells) > FULL_PASS_CELLS:
        some = _some_tiles(ids, train, store.tile)
        lut = gene_lut(var, store.shape[1])
        of_some = partial(_check_sums, cells[some], source)
        stats, _ = count_statistics(store, ids[some], train[some], lut, len(var), check=of_some)
        source.notes.append(f"Gene statistics are from {int(some.sum())} of {int(train.sum())} training cells.")
        per_cell = {"library_size": cells["raw_sum"].to_numpy(float), "n_expressed": cells["nnz"].to_numpy()}
        per_cell["content"] = hashlib.sha256(per_cell["n_expressed"].astype(np.int64).tobytes()).hexdigest()
        return var, CountStatistics(**{**vars(stats), **per_cell}), some
    lut = gene_lut(var, store.shape[1])
    all_genes = bool((lut >= 0).all())  # obs sums over all genes of the source
    check = partial(_check_sums, cells, source) if all_genes else None
    stats, enough = count_statistics(store, ids, train, lut, len(var), min_cells=config.genes.min_cells, check=check)
    if not enough.any():
        raise InputError(
            f"ingest.genes.min_cells ({config.genes.min_cells}) leaves no genes: the most expressed one is in "
            f"{stats.gene_cells.max()} training cells; lower it"
        )
    if not enough.all():
        source.notes.append(f"{int((~enough).sum())} genes are expressed in fewer than {config.genes.min_cells} "
                            "training cells and are left out.")  # fmt: skip
        var = var[enough].reset_index(drop=True)
    return var, stats, train


def _check_sums(cells: pd.DataFrame, source: OpenSource, stats: CountStatistics) -> None:
    """Refuse cells whose counts are gone; note others that obs describes differently."""
    for found in sum_findings(cells, n_expressed=stats.n_expressed, library_size=stats.library_size):
        if found.level == "error":
            raise InputError(f"{source.uri}: {found.message}")
        source.notes.append(found.message)


def _some_tiles(ids: np.ndarray, train: np.ndarray, tile: int) -> np.ndarray:
    """Training cells of evenly spaced storage tiles."""
    tiles = np.unique(ids[train] // tile)
    chosen = tiles[np.linspace(0, len(tiles) - 1, min(SAMPLED_TILES, len(tiles))).round().astype(int)]
    return train & np.isin(ids // tile, chosen)


def _vocabulary(config: IngestConfig, cells: pd.DataFrame, var: pd.DataFrame) -> Vocabulary:
    labels = tuple(LabelVocabulary(x, tuple(sorted(cells[x].astype(str).unique()))) for x in config.labels)
    return Vocabulary(tuple(var["feature_id"]), tuple(var["feature_name"]), labels)


def _note_unseen_classes(vocabulary: Vocabulary, cells: pd.DataFrame, notes: list[str]) -> None:
    seen = cells[cells["split"] == "train"]
    for label in vocabulary.labels:
        if unseen := sorted(set(label.classes) - set(seen[label.name].astype(str).unique())):
            notes.append(f"{label.name} has no training cells of {', '.join(unseen)}: it cannot be learned.")


def _write(
    context: StageContext,
    cells: pd.DataFrame,
    var: pd.DataFrame,
    vocabulary: Vocabulary,
    stats: CountStatistics,
    presence: Presence | None,
) -> dict[str, Any]:
    """The files of the stage; returns the facts that name them."""
    folder = context.folder
    codes = {x.name: x.encode(cells[x.name].astype(str).to_numpy()).astype(np.int32) for x in vocabulary.labels}
    train = (cells["split"] == "train").to_numpy()
    vocabulary.save(folder / "vocabulary.json")
    of_train = {x.name: (x.classes, codes[x.name][train]) for x in vocabulary.labels}
    sizes = LibrarySizes.fit_codes(cells["library_size"].to_numpy()[train], of_train)
    sizes.save(folder / "library_size.json")
    pd.DataFrame(
        {
            "feature_id": var["feature_id"],
            "gene_joinid": var["soma_joinid"],
            "mean": stats.mean,
            "variance": stats.variance,
            "fraction": stats.gene_cells / stats.n_train,
        }
    ).to_parquet(folder / "gene_stats.parquet", index=False)
    split = pd.Categorical(cells["split"], categories=list(SPLITS))
    pd.DataFrame(
        {
            "soma_joinid": cells["soma_joinid"],
            "split": split,
            **{LABEL + name: ids for name, ids in codes.items()},
            "library_size": cells["library_size"].astype(np.float32),
            "n_expressed": cells["n_expressed"].astype(np.int32),
            **{c: cells[c] for c in cells if c == LABEL + GROUP},
        }
    ).to_parquet(folder / "cells.parquet", index=False)
    digest = hashlib.sha256(vocabulary.digest.encode())
    digest.update(cells["soma_joinid"].to_numpy(np.int64).tobytes())
    digest.update(split.codes.astype(np.int8).tobytes())
    if presence is not None:
        presence.save(folder / "presence.parquet")
        digest.update(np.packbits(presence.measured).tobytes() + cells[LABEL + GROUP].to_numpy(np.int32).tobytes())
    return {
        "vocabulary": "vocabulary.json",
        "library_size": "library_size.json",
        "gene_stats": "gene_stats.parquet",
        "cells": "cells.parquet",
        "digest": digest.hexdigest(),
        **({} if presence is None else {"presence": "presence.parquet"}),
    }
