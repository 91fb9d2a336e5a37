"""Ingest a source of cells: vocabularies, split and statistics; the counts stay in SOMA, or are written to it.

`.h5ad` files and synthetic cells are written once to `soma/` in the stage's folder; a SOMA experiment and the Census
are read where they are. Everything but the counts is decided here, so that later stages read facts and never guess.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.config.context import StageContext
from pipeline.config.ingest import ReplayConfig
from pipeline.config.input_paths import ingest_of
from pipeline.config.job import H5adSource, IngestConfig
from pipeline.core.progress import ProgressReader, ProgressWriter
from pipeline.data.ingest.copies import Copies, copies_facts, find_copies, keep_together
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.ingest.filters import find_values, value_filter
from pipeline.data.ingest.genes import gene_lut, model_genes
from pipeline.data.ingest.held_out import (
    Combination,
    columns_of,
    counted,
    find_classes,
    held_out_facts,
    hold_out,
    notes_on,
    read_combinations,
)
from pipeline.data.ingest.label_values import (
    canonical_column,
    canonical_combinations,
    fit_values,
    has_training_cells,
    in_order,
    read_tables,
    values_facts,
    values_notes,
    with_values,
)
from pipeline.data.ingest.measured import measured_genes, over_measured
from pipeline.data.ingest.replay import (
    FOLDER,
    GENES,
    REPLAYED,
    SPARE_CELLS,
    NewCells,
    Replayed,
    of_pipeline,
    of_source,
    old_cells_beside,
    replay,
    require_type,
    with_old_cells,
    with_old_sizes,
)
from pipeline.data.ingest.split import SPLITS, label_counts, require_splits, split_cells
from pipeline.data.ingest.statistics import CountStatistics, count_statistics
from pipeline.data.ingest.subsample import subsample_cells
from pipeline.data.labels import label_names, spellings
from pipeline.data.loading.blocks import LABEL
from pipeline.data.loading.cache_writer import CacheInput, write_cache
from pipeline.data.presence import GROUP, Presence
from pipeline.data.sources.open import OpenSource, open_source, with_counts
from pipeline.data.validation.checks import label_problems
from pipeline.data.validation.counts import same_total_findings
from pipeline.data.validation.names import class_counts, spelling_findings
from pipeline.data.validation.obs_sums import sum_findings
from scldm.data.label_type import LabelType
from scldm.data.labels.vectors import NamedVectors
from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import InputError

# Above this, library sizes come from obs if it has them, and gene statistics from a sample of storage tiles.
FULL_PASS_CELLS = 200_000
SAMPLED_TILES = 50
TRUTH = "truth.parquet"


def run(config: IngestConfig, context: StageContext) -> dict[str, Any]:
    """Run the stage; returns its facts."""
    tables = read_tables(config)
    opened = open_source(config, context.folder, _columns(config), named_by=_named_by(config))
    source = with_counts(opened, config.source)
    # Two tables with a row for each cell: what the source says, and what is computed here. They are never one, because
    # a source may have columns called split, library_size or n_expressed.
    obs = _eligible(config, source, tables)
    split, combinations, copies = _split(config, source, obs)
    cells = pd.DataFrame({"soma_joinid": obs["soma_joinid"], "split": split})
    genes = model_genes(config.genes, source.store)
    source.notes += genes.notes
    var = genes.table
    var, stats, seen = _statistics(config, source, obs, split, var)
    cells = cells.assign(library_size=stats.library_size, n_expressed=stats.n_expressed)
    if config.source.type == "soma":  # other sources are checked while they are written
        source.notes += [found.message for found in same_total_findings(stats.library_size)]
    if (presence := measured_genes(config, source, obs, var)) is not None:
        stats = over_measured(stats, presence, seen)
        cells[LABEL + GROUP] = presence.group
    if empty := int((cells["library_size"] <= 0).sum()):
        source.notes.append(f"{empty} cells have no counts in the vocabulary and are left out.")
        obs, cells = (x[(cells["library_size"] > 0).to_numpy()].reset_index(drop=True) for x in (obs, cells))
    split = cells["split"].to_numpy()
    require_splits(config.split, split, obs, copies)

    replayed = _replayed(config, context, NewCells(
        source.store, var, n_train=int((split == "train").sum()),
        held_out=cells["soma_joinid"].to_numpy()[split != "train"], combinations=combinations,
    ))  # fmt: skip
    vocabulary = _vocabulary(config, obs, split, var, source.types, replayed, tables)
    if combinations:
        _record_held_out(config, source, obs, split, combinations, context.folder)
    source.facts |= _truth_facts(source, context.folder)
    facts = _write(context, obs, cells, var, vocabulary, stats, presence, replayed)
    _note_unseen_classes(vocabulary, obs[split == "train"], source.notes, replayed)
    largest, n_cells = cells[["library_size", "n_expressed"]].max(), {s: int((split == s).sum()) for s in SPLITS}
    if replayed is not None:
        largest = np.maximum(largest, replayed.cells[["library_size", "n_expressed"]].max())
        n_cells["train"] += len(replayed.cells)
        source.notes += replayed.notes
        seen_at = replayed.facts["seen_at"] or round(time.time() * 1000)
        source.facts["replay"] = replayed.facts | {"seen_at": seen_at}
    mean_expressed = float(cells.loc[split == "train", "n_expressed"].mean())
    facts = {
        **facts,
        **_store_facts(source),
        "count_type": "uint16" if largest["library_size"] < 1 << 16 else "float32",
        "n_genes": vocabulary.n_genes,
        "n_genes_source": source.store.shape[1],
        "n_cells": n_cells,
        **_label_facts(vocabulary),
        "label_counts": label_counts(obs, split, config.labels),
        "mean_expressed_genes": mean_expressed,
        "max_expressed_genes": int(largest["n_expressed"]),
        "zero_fraction": 1 - mean_expressed / vocabulary.n_genes,
        "gene_stats_cells": int(seen.sum()),
        "source": source.description,
        **source.facts,
        **genes.facts,
        **copies_facts(copies),
        "notes": source.notes,
    }
    content = source.content or stats.content
    return facts | _cache_facts(
        config, context, facts, content=content if replayed is None else f"{content} {replayed.content}"
    )


def _record_held_out(
    config: IngestConfig, source: OpenSource, obs: pd.DataFrame, split: np.ndarray, combinations: list[Combination],
    folder: Path,
) -> None:  # fmt: skip
    """Add facts and notes about held-out combinations to those of the source."""
    table = counted(obs, combinations)
    source.facts |= held_out_facts(table, folder)
    source.notes += notes_on(table, obs, split, config.split.by)


def _store_facts(source: OpenSource) -> dict[str, Any]:
    store = source.store
    return {
        "soma_uri": source.uri, "tiledb_config": dict(store.tiledb_config), "measurement": store.measurement,
        "layer": store.layer, "tile": store.tile, "seen_at": round(time.time() * 1000),
    }  # fmt: skip


def _label_facts(vocabulary: Vocabulary) -> dict[str, Any]:
    names = [x.name for x in vocabulary.labels]
    return {"labels": names, "n_classes": vocabulary.n_classes, **values_facts(vocabulary.values)}


# ---- source ----------------------------------------------------------------------------------------------------------
def _columns(config: IngestConfig) -> list[str]:
    """Return the obs columns that the job requires."""
    by = [] if config.split.by in ("cell", "tile") else [config.split.by]
    # A cell of unknown class may belong to a held-out combination: their columns are required like labels.
    return list(dict.fromkeys([*config.labels, *by, *columns_of(config.split.held_out)]))


def _split(config: IngestConfig, source: OpenSource, obs: pd.DataFrame) -> tuple[np.ndarray, list[Combination], Copies]:
    """Return the split of each cell, the combinations that are held out whole, and the cells that are there twice."""
    combinations = canonical_combinations(config, read_combinations(config.split.held_out))
    combinations = find_classes(obs, combinations)
    census = config.source.type == "census"  # which says itself which cells it has twice: is_primary_data
    copies = Copies.none(len(obs)) if census else find_copies(source.store, obs, source.notes)
    split = split_cells(obs, config.split, tile=source.store.tile, copies=copies)
    if combinations:
        held_out = hold_out(obs, np.full(len(obs), ""), combinations)
        split = keep_together(np.where(held_out == "", split, held_out), copies, held_out != "")
    if not (split == "train").any():
        require_splits(config.split, split, obs, copies)
    return split, combinations, copies


def _named_by(config: IngestConfig) -> dict[str, str]:
    """Return the place that names a column which only held-out combinations need, for messages."""
    return {c: where for c, where in columns_of(config.split.held_out).items() if c not in config.labels}


def _eligible(config: IngestConfig, source: OpenSource, tables: Mapping[str, NamedVectors]) -> pd.DataFrame:
    """Return obs of the cells that pass the filter and have their labels; at most max_cells of them."""
    available, wanted = source.store.obs_columns(), _columns(config)
    if absent := [c for c in wanted if c not in available]:
        empty = pd.DataFrame(columns=available)
        problems = label_problems(empty, absent, drop_missing=False, names=None, named_by=_named_by(config))
        raise InputError("\n".join(problems))
    extra = [c for c in ("raw_sum", "nnz", *(["dataset_id"] if config.genes.presence else [])) if c in available]
    chosen = value_filter(find_values(config.cells, source.store), config.obs_filter)
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
    problems = label_problems(
        cells, wanted, drop_missing=drop, names=names, missing_text=config.missing_text, values=config.label_values
    )
    if problems:
        raise InputError("\n".join(problems))
    cells = with_values(config, _with_labels(config, source, cells, wanted), tables)
    if config.max_cells is not None and len(cells) > config.max_cells:
        source.notes.append(f"{config.max_cells:,} of {len(cells):,} cells were taken: max_cells.")
        some = subsample_cells(cells["soma_joinid"].to_numpy(), config.max_cells, tile=source.store.tile)
        cells = cells.iloc[some].reset_index(drop=True)
    return cells


def _with_labels(config: IngestConfig, source: OpenSource, cells: pd.DataFrame, wanted: Sequence[str]) -> pd.DataFrame:
    """Return the cells that have all labels, with labels as names of classes; their types go to `source.types`."""
    source.types = {c: LabelType.of(cells[c]) for c in wanted} | dict(source.types)
    for column in wanted:
        names = label_names(cells[column], config.missing_text)
        if n := int((no_label := pd.isna(names)).sum()):
            found = spellings(cells[column], config.missing_text)
            source.notes.append(f"{n} cells have no {column} and are left out ({found}).")
        cells = cells.assign(**{column: pd.Categorical(names)})[~no_label].reset_index(drop=True)
    for column in (c for c in wanted if c not in config.label_values):
        source.notes += [f.message for f in spelling_findings(column, class_counts(cells[column], ()))]
    return cells.assign(**{c: cells[c].cat.remove_unused_categories() for c in wanted})


# ---- old cells -------------------------------------------------------------------------------------------------------
def _replayed(config: IngestConfig, context: StageContext, new: NewCells) -> Replayed | None:
    """Return the old cells of the job; None if it replays none."""
    if config.replay is None:
        return None
    columns = list(dict.fromkeys([*config.labels, *columns_of(config.split.held_out)]))
    folder = context.folder / FOLDER
    if config.replay.pipeline is not None:
        old = of_pipeline(ingest_of(config.replay.pipeline), columns, context.folder, context.output)
    elif config.replay.source is not None:
        old = of_source(config.replay.source, config, columns, folder)
    else:
        source = H5adSource(type="h5ad", path=str(_generated(config.replay, context, new, folder)))
        old = of_source(source, config, columns, folder)
        old.opened.description = f"cells that {config.replay.model} generated"
    found = replay(old, new, config)
    return replace(found, labels=found.labels.apply(lambda names: canonical_column(config, str(names.name), names)))


def _generated(config: ReplayConfig, context: StageContext, new: NewCells, folder: Path) -> Path:
    """Let the old model generate old cells, as a job of generation does; return their folder."""
    from pipeline.inference.replay import request_old_cells  # torch and Ray, which other sources do without
    from pipeline.stages.generate import run as generate

    assert config.model is not None
    folder.mkdir(exist_ok=True)
    n = old_cells_beside(new.n_train, config.share)
    request = request_old_cells(config.model, n + SPARE_CELLS, seed=config.seed)
    facts = generate(request, replace(context, folder=folder, request=None))
    return folder / facts["cells"]


# ---- genes and statistics ----------------------------------------------------------------------------------------
def _statistics(
    config: IngestConfig, source: OpenSource, obs: pd.DataFrame, split: np.ndarray, var: pd.DataFrame
) -> tuple[pd.DataFrame, CountStatistics, np.ndarray]:
    """Return the genes that are kept, statistics over them, and which cells the gene statistics are from, bool (n,)."""
    store, ids, train = source.store, obs["soma_joinid"].to_numpy(), split == "train"
    whole = config.genes.vocabulary == "source" and not config.genes.min_cells and len(var) == store.shape[1]
    in_obs = {"raw_sum", "nnz"} <= set(obs) and whole
    if in_obs and len(obs) > FULL_PASS_CELLS:
        some = _some_tiles(ids, train, store.tile)
        lut = gene_lut(var, store.shape[1])
        check_sample = partial(_check_sums, obs[some], source)
        stats, _ = count_statistics(store, ids[some], train[some], lut, len(var), check=check_sample)
        source.notes.append(f"Gene statistics are from {int(some.sum())} of {int(train.sum())} training cells.")
        per_cell = {"library_size": obs["raw_sum"].to_numpy(float), "n_expressed": obs["nnz"].to_numpy()}
        per_cell["content"] = hashlib.sha256(per_cell["n_expressed"].astype(np.int64).tobytes()).hexdigest()
        return var, CountStatistics(**{**vars(stats), **per_cell}), some
    lut = gene_lut(var, store.shape[1])
    all_genes = bool((lut >= 0).all())  # obs sums over all genes of the source
    check = partial(_check_sums, obs, source) if all_genes else None
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


def _check_sums(obs: pd.DataFrame, source: OpenSource, stats: CountStatistics) -> None:
    """Raise InputError for cells whose counts are lost; add notes about other differences from obs."""
    for found in sum_findings(obs, n_expressed=stats.n_expressed, library_size=stats.library_size):
        if found.level == "error":
            raise InputError(f"{source.uri}: {found.message}")
        source.notes.append(found.message)


def _some_tiles(ids: np.ndarray, train: np.ndarray, tile: int) -> np.ndarray:
    """Return the training cells of evenly spaced storage tiles, bool (n,)."""
    tiles = np.unique(ids[train] // tile)
    chosen = tiles[np.linspace(0, len(tiles) - 1, min(SAMPLED_TILES, len(tiles))).round().astype(int)]
    return train & np.isin(ids // tile, chosen)


def _vocabulary(
    config: IngestConfig,
    obs: pd.DataFrame,
    split: np.ndarray,
    var: pd.DataFrame,
    types: Mapping[str, LabelType],
    replayed: Replayed | None,
    tables: Mapping[str, NamedVectors],
) -> Vocabulary:
    classes = {x: set(obs[x].astype(str).unique()) for x in config.labels}
    if replayed is not None:
        require_type(replayed, types)
        classes = {x: known | replayed.classes(x) for x, known in classes.items()}
    trained = {x: has_training_cells(obs[x], split) for x in config.label_values}
    if replayed is not None:
        trained = {x: known | replayed.classes(x) for x, known in trained.items()}
    values = fit_values(config, classes, trained, tables)
    labels = tuple(
        LabelVocabulary(x, in_order(values.get(x), classes[x]), types[x], values.get(x)) for x in config.labels
    )
    return Vocabulary(tuple(var["feature_id"]), tuple(var["feature_name"]), labels)


def _truth_facts(source: OpenSource, folder: Path) -> dict[str, str]:
    """Write what the combinations of a synthetic source have on average; {} of a source that does not know it."""
    if source.truth is None:
        return {}
    source.truth().to_parquet(folder / TRUTH, index=False)
    return {"truth": TRUTH}


def _note_unseen_classes(
    vocabulary: Vocabulary, seen: pd.DataFrame, notes: list[str], replayed: Replayed | None
) -> None:
    for label in vocabulary.labels:
        old = set() if replayed is None else replayed.classes(label.name)
        unseen = sorted(set(label.classes) - old - set(seen[label.name].astype(str).unique()))
        if label.values is not None:
            notes += values_notes(label.values, label.name, unseen)
        elif unseen:
            notes.append(f"{label.name} has no training cells of {', '.join(unseen)}: it cannot be learned.")


def _write(
    context: StageContext,
    obs: pd.DataFrame,
    cells: pd.DataFrame,
    var: pd.DataFrame,
    vocabulary: Vocabulary,
    stats: CountStatistics,
    presence: Presence | None,
    replayed: Replayed | None,
) -> dict[str, Any]:
    """Write the files of the stage; return the facts that name them."""
    folder = context.folder
    codes = {x.name: x.encode(obs[x.name].astype(str).to_numpy()).astype(np.int32) for x in vocabulary.labels}
    train = (cells["split"] == "train").to_numpy()
    vocabulary.save(folder / "vocabulary.json")
    of_train = {x.name: (x.classes, codes[x.name][train]) for x in vocabulary.labels}
    sizes = LibrarySizes.fit_codes(cells["library_size"].to_numpy()[train], of_train)
    if replayed is not None:
        sizes = with_old_sizes(sizes, vocabulary, replayed)
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
    if replayed is not None:
        codes = {x.name: np.append(codes[x.name], x.encode(replayed.labels[x.name])) for x in vocabulary.labels}
        cells, presence = with_old_cells(cells, presence, replayed)
        pd.DataFrame({"soma_joinid": replayed.genes}).to_parquet(folder / GENES, index=False)
    split = pd.Categorical(cells["split"], categories=list(SPLITS))
    pd.DataFrame(
        {
            "soma_joinid": cells["soma_joinid"],
            "split": split,
            **{LABEL + name: ids.astype(np.int32) for name, ids in codes.items()},
            "library_size": cells["library_size"].astype(np.float32),
            "n_expressed": cells["n_expressed"].astype(np.int32),
            **{c: cells[c] for c in cells if c in (LABEL + GROUP, REPLAYED)},
        }
    ).to_parquet(folder / "cells.parquet", index=False)
    digest = hashlib.sha256(vocabulary.digest.encode())
    digest.update(cells["soma_joinid"].to_numpy(np.int64).tobytes())
    digest.update(split.codes.astype(np.int8).tobytes())
    if presence is not None:
        presence.save(folder / "presence.parquet")
        digest.update(np.packbits(presence.measured).tobytes() + cells[LABEL + GROUP].to_numpy(np.int32).tobytes())
    if replayed is not None:
        digest.update(replayed.content.encode())
    return {
        "vocabulary": "vocabulary.json",
        "library_size": "library_size.json",
        "gene_stats": "gene_stats.parquet",
        "cells": "cells.parquet",
        "digest": digest.hexdigest(),
        **({} if presence is None else {"presence": "presence.parquet"}),
    }


# ---- cache -----------------------------------------------------------------------------------------------------------
def _cache_facts(config: IngestConfig, context: StageContext, facts: dict[str, Any], *, content: str) -> dict[str, Any]:
    """Write the cache if the job asks for one; return {"cache": {folder, bytes, shards, kept}}, or {} without one.

    Args:
        facts: Facts of this ingest, whose files are written.
        content: Hash of the counts, as far as the statistics have read them.
    """
    if not config.cache:
        return {}
    data = IngestedDataset(context.folder, facts)
    # Cells that this stage wrote are identified by their counts alone, so that the next job that writes the same
    # cells shares their cache.
    where = None if facts["soma_uri"] == "soma" else data.soma_uri
    cells = CacheInput(
        data.all_blocks(),
        data.cells["library_size"].to_numpy(np.float32),
        {"uri": where, "content": content},
        facts["mean_expressed_genes"],
    )
    progress = ProgressWriter(context.folder)
    with ProgressReader(context.folder, "ingest cache"):
        cache = write_cache(cells, _cache_root(config.cache, context), on_shard=progress.update)
    # Relative if it is under the output folder, so that this can be moved as a whole.
    folder = os.path.relpath(cache.folder, context.folder.absolute()) if config.cache is True else str(cache.folder)
    n_shards = cache.n_written + cache.n_kept
    return {"cache": {"folder": folder, "bytes": cache.n_bytes, "shards": n_shards, "kept": cache.n_kept}}


def _cache_root(cache: str | bool, context: StageContext) -> Path:
    if isinstance(cache, str):
        return Path(cache).expanduser().absolute()
    if context.output is None:
        raise ValueError("ingest.cache: true stands for <output>/cache, and this context has no output folder")
    return context.output.absolute() / "cache"
