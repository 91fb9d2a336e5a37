"""Determines which genes were measured in each cell: ingest.genes.presence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from pipeline.config.job import CensusSource, IngestConfig
from pipeline.data.ingest.statistics import CountStatistics
from pipeline.data.presence import Presence
from pipeline.data.sources.open import OpenSource
from scldm.errors import InputError


def measured_genes(
    config: IngestConfig, source: OpenSource, cells: pd.DataFrame, genes: pd.DataFrame
) -> Presence | None:
    """Return the genes of the vocabulary that each cell's data set measured; None: every absent count is a zero.

    A note about the meaning of absent counts is added to `source`.
    """
    places = genes["soma_joinid"].to_numpy()
    if not config.genes.presence:
        _note_zeros(config, source, cells, places)
        return None
    found = presence_of_cells(source, cells, places)
    n_genes = found.measured.shape[1]
    if found.is_complete:
        source.notes.append(f"Every cell measured all of the {n_genes} genes: ingest.genes.presence masks nothing.")
        return None
    n = found.measured.sum(1)
    source.notes.append(
        f"{len(n)} groups of data sets measured between {n.min()} and {n.max()} of {n_genes} genes; what a cell's "
        "group did not measure is left out of its likelihood and never shown as a zero."
    )
    if n_unmeasured := int((found.cells_per_gene() == 0).sum()):
        source.notes.append(f"{n_unmeasured} genes were measured in no cell: nothing can be learned about them.")
    source.facts["presence_groups"] = len(n)
    return found


def over_measured(stats: CountStatistics, presence: Presence, seen: np.ndarray) -> CountStatistics:
    """Return gene statistics over the training cells that measured the gene.

    Args:
        seen: Cells that the gene statistics are taken from, bool (n,).
    """
    return replace(stats, n_train=np.maximum(presence.cells_per_gene(seen), 1))


def _note_zeros(config: IngestConfig, source: OpenSource, cells: pd.DataFrame, places: np.ndarray) -> None:
    by_file = source.measured and source.measured.of_cells(cells["soma_joinid"].to_numpy()).of_genes(places)
    if by_file and not by_file.is_complete and (by_file.measured != by_file.measured[0]).any():
        genes_text = "that a file does not list are"
    elif isinstance(config.source, CensusSource):
        genes_text = "that a data set of the Census did not measure are"
    else:
        return
    source.notes.append(
        f"Genes {genes_text} taken as zeros in its cells; ingest.genes.presence=true leaves them out instead."
    )


def presence_of_cells(source: OpenSource, cells: pd.DataFrame, places: np.ndarray) -> Presence:
    """Return the genes of the vocabulary that the data sets of some cells measured.

    Args:
        cells: Table with soma_joinid, and dataset_id unless the source was written by ingest.
        places: soma_joinid of each gene of the vocabulary, -1 if the source lacks it, (g,).

    Raises:
        InputError: neither the store nor the vocabulary shows that anything was not measured.
    """
    joinids, n_source = cells["soma_joinid"].to_numpy(), source.store.shape[1]
    if source.measured is not None:
        return source.measured.of_cells(joinids).of_genes(places)
    if "dataset_id" in cells:
        data_set = cells["dataset_id"].astype("category").cat.remove_unused_categories().cat
        if n := int((data_set.codes < 0).sum()):
            raise InputError(
                f"ingest.genes.presence (true): {n} cells have no dataset_id, which tells what they measured"
            )
        names = tuple(map(str, data_set.categories))
        known = source.store.measured_by(names)
        if known is not None:
            return Presence(names, known, data_set.codes.to_numpy(np.int32)).of_genes(places)
    if (places >= 0).all():
        raise InputError(
            f"ingest.genes.presence (true): nothing tells what was measured: {source.store.uri} has no "
            "feature_dataset_presence_matrix with a dataset_id in obs, as the Census has; set it to false"
        )
    return Presence.everywhere(source.description, n_cells=len(cells), n_genes=n_source).of_genes(places)
