"""The step of ingest that finds out which genes were measured, if the job asks for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from pipeline.config.job import CensusSource, IngestConfig
from pipeline.data.ingest.statistics import CountStatistics
from pipeline.data.presence import Presence, presence_of_cells
from pipeline.data.sources.open import OpenSource


def measured_genes(
    config: IngestConfig, source: OpenSource, cells: pd.DataFrame, genes: pd.DataFrame
) -> Presence | None:
    """Genes of the vocabulary that each cell's data set measured; None takes every absent count as a zero.

    Adds a note to `source` that says what absent counts are taken for.
    """
    places = genes["soma_joinid"].to_numpy()
    if not config.genes.presence:
        _note_zeros(config, source, cells, places)
        return None
    found = presence_of_cells(source, cells, places)
    n_genes = found.measured.shape[1]
    if found.is_whole:
        source.notes.append(f"Every cell measured all of the {n_genes} genes: ingest.genes.presence masks nothing.")
        return None
    n = found.measured.sum(1)
    source.notes.append(
        f"{len(n)} groups of data sets measured between {n.min()} and {n.max()} of {n_genes} genes; what a cell's "
        "group did not measure is left out of its likelihood and never shown as a zero."
    )
    if nobody := int((found.cells_per_gene() == 0).sum()):
        source.notes.append(f"{nobody} genes were measured in no cell: nothing can be learned of them.")
    source.facts["presence_groups"] = len(n)
    return found


def over_measured(stats: CountStatistics, presence: Presence, seen: np.ndarray) -> CountStatistics:
    """Gene statistics over the training cells that measured the gene.

    Args:
        seen: Cells that the gene statistics are of, bool (n,).
    """
    return replace(stats, n_train=np.maximum(presence.cells_per_gene(seen), 1))


def _note_zeros(config: IngestConfig, source: OpenSource, cells: pd.DataFrame, places: np.ndarray) -> None:
    of_files = source.measured and source.measured.of_cells(cells["soma_joinid"].to_numpy()).of_genes(places)
    if of_files and not of_files.is_whole and (of_files.measured != of_files.measured[0]).any():
        what = "that a file does not list are"
    elif isinstance(config.source, CensusSource):
        what = "that a data set of the Census did not measure are"
    else:
        return
    source.notes.append(
        f"Genes {what} taken as zeros in its cells; ingest.genes.presence=true leaves them out instead."
    )
