"""Opens the output of the ingest stage for the stages after it.

Paths in the facts are relative to the stage's folder; everything here that is sent to a worker is plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipeline.core.manifest import Manifest
from pipeline.data.ingest.genes import gene_lut
from pipeline.data.ingest.split import SPLITS
from pipeline.data.loading.blocks import LABEL, JoinedReader, SomaBlocks, SomaReader
from pipeline.data.loading.cache import CacheBlocks, cached
from pipeline.data.presence import GROUP, read_measured
from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

if TYPE_CHECKING:
    import anndata


@dataclass(frozen=True)
class IngestedDataset:
    """Vocabulary, cells and counts of a finished ingest."""

    folder: Path
    facts: Mapping[str, Any]

    @classmethod
    def open(cls, manifest: Manifest) -> IngestedDataset:
        """Open the dataset of a finished ingest."""
        return cls(Path(manifest.folder).resolve(), manifest.facts)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.folder / self.facts["vocabulary"])

    @cached_property
    def library_sizes(self) -> LibrarySizes:
        """Library-size statistics of the training cells."""
        return LibrarySizes.load(self.folder / self.facts["library_size"])

    @property
    def n_cells(self) -> dict[str, int]:
        """Number of cells of each split."""
        return dict(self.facts["n_cells"])

    @cached_property
    def cells(self) -> pd.DataFrame:
        """Table of all cells, ascending by soma_joinid.

        Columns: soma_joinid, split, a class id `label:<name>` per label, library_size and n_expressed over the
        vocabulary; as one more label (`presence.GROUP`), the row of `measured`, if there is one; and, if there are old
        cells (ingest.replay), `replayed`. An old cell without a label has its null class.
        """
        return pd.read_parquet(self.folder / self.facts["cells"])

    @cached_property
    def gene_stats(self) -> pd.DataFrame:
        """Statistics over training cells, in the order of the vocabulary.

        Columns: feature_id, gene_joinid, mean, variance, fraction.
        """
        return pd.read_parquet(self.folder / self.facts["gene_stats"])

    @cached_property
    def truth(self) -> pd.DataFrame | None:
        """What each combination of synthetic labels has on average; None if that is not known.

        Columns: the labels, feature_id, share, mean_log; see `synthetic_treatments.combination_truth`.
        """
        path = self.facts.get("truth")
        return None if path is None else pd.read_parquet(self.folder / path)

    @cached_property
    def measured(self) -> np.ndarray | None:
        """Genes that each group of data sets measured, (p, g) bool; None: all. `cells` holds the group of a cell."""
        path = self.facts.get("presence")
        return None if path is None else read_measured(self.folder / path)

    def measured_by(self, joinids: np.ndarray) -> np.ndarray | None:
        """Return the genes that were measured in each of some cells, (n, g) bool; None: all."""
        if self.measured is None:
            return None
        rows = self.cells["soma_joinid"].searchsorted(joinids)
        return self.measured[self.cells[LABEL + GROUP].to_numpy()[rows]]

    @property
    def _codes(self) -> tuple[str, ...]:
        """Codes that are read with a cell's counts: classes of its labels, and the group of what it measured."""
        return (*(x.name for x in self.vocabulary.labels), *([] if "presence" not in self.facts else [GROUP]))

    @property
    def soma_uri(self) -> str:
        """Absolute address; a relative one in the facts is inside the stage's folder, which can thus be moved."""
        uri = self.facts["soma_uri"]
        return uri if "://" in uri or Path(uri).is_absolute() else str(self.folder / uri)

    @cached_property
    def reader(self) -> SomaReader | JoinedReader:
        """Reader of counts over the vocabulary."""
        old = self.facts.get("replay")
        if old is None:
            return self._reader
        places = pd.read_parquet(self.folder / old["genes"])
        uri = old["soma_uri"]
        second = replace(
            self._reader,
            uri=uri if "://" in uri or Path(uri).is_absolute() else str(self.folder / uri),
            tiledb_config=dict(old["tiledb_config"]),
            measurement=old["measurement"],
            layer=old["layer"],
            gene_lut=gene_lut(places, old["n_genes_source"]),
            seen_at=int(old["seen_at"]),
        )
        return JoinedReader(self._reader, second, int(old["start"]))

    @property
    def _reader(self) -> SomaReader:
        """Reader of the cells of the source."""
        places = self.gene_stats[["gene_joinid"]].rename(columns={"gene_joinid": "soma_joinid"})
        return SomaReader(
            uri=self.soma_uri,
            tiledb_config=dict(self.facts["tiledb_config"]),
            measurement=self.facts["measurement"],
            layer=self.facts["layer"],
            gene_lut=gene_lut(places, self.facts["n_genes_source"]),
            labels=self._codes,
            count_type=self.facts["count_type"],
            genes_per_cell=int(self.facts["mean_expressed_genes"]) + 1,
            seen_at=int(self.facts.get("seen_at", 0)),
        )

    def blocks(self, split: str) -> SomaBlocks | CacheBlocks:
        """Return the cells of a split, with old ones, read from the cache if ingest wrote one."""
        source = self.streamed(split)
        if (cache := self.facts.get("cache")) is None:
            return source
        folder = (self.folder / cache["folder"]).resolve()
        return cached(source, folder, self.cells["soma_joinid"].to_numpy(np.int64))

    def streamed(self, split: str) -> SomaBlocks:
        """Return the cells of a split, with old ones, read from SOMA."""
        return self._blocks(self.cells_of(split, replayed=True))

    def all_blocks(self) -> SomaBlocks:
        """Return the cells of all splits, read from SOMA."""
        return self._blocks(self.cells)

    def anndata(self, split: str, max_cells: int | None = None, seed: int = 0) -> anndata.AnnData:
        """Load cells of a split, without old ones: counts over the vocabulary (CSR), labels as categoricals.

        Args:
            max_cells: Largest number of cells, drawn by seed; None loads all.
        """
        import anndata
        import scipy.sparse as sp

        cells = self.cells_of(split)
        if max_cells is not None and len(cells) > max_cells:
            rng = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))
            cells = cells.iloc[np.sort(rng.choice(len(cells), max_cells, replace=False))]
        table = self._blocks(cells).read(cells["soma_joinid"].to_numpy()).combine_chunks()
        gene, count = table["gene"].combine_chunks(), table["count"].combine_chunks()
        values = count.flatten().to_numpy().astype(np.float32)
        indices, indptr = gene.flatten().to_numpy().astype(np.int32), gene.offsets.to_numpy()
        counts = sp.csr_matrix((values, indices, indptr), shape=(len(cells), self.vocabulary.n_genes))
        obs = pd.DataFrame(
            {x.name: pd.Categorical.from_codes(cells[LABEL + x.name], x.classes) for x in self.vocabulary.labels},
            index=cells["soma_joinid"].astype(str).to_numpy(),
        )
        obs["library_size"] = cells["library_size"].to_numpy()
        var = pd.DataFrame(
            {"feature_name": list(self.vocabulary.feature_names)}, index=list(self.vocabulary.feature_ids)
        )
        return anndata.AnnData(counts, obs=obs, var=var)

    def composition(self, split: str, *, replayed: bool = False) -> pd.DataFrame:
        """Return the combinations of labels in a split: a column of class names per label, and n_cells.

        Args:
            replayed: Whether old cells count too; those that lack a label never do.
        """
        cells = self.cells_of(split, replayed=replayed)
        names = {
            x.name: np.asarray([*x.classes, None], dtype=object)[cells[LABEL + x.name]] for x in self.vocabulary.labels
        }
        table = pd.DataFrame(names, index=cells.index)
        if not names:
            return pd.DataFrame({"n_cells": [len(cells)]})
        return (
            table.value_counts(sort=False).rename("n_cells").reset_index().sort_values(list(names), ignore_index=True)
        )

    def cells_of(self, split: str, *, replayed: bool = False) -> pd.DataFrame:
        """Return the rows of `cells` of a split.

        Args:
            replayed: Whether old cells are among them.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        chosen = (self.cells["split"] == split).to_numpy()
        if not replayed and "replayed" in self.cells:
            chosen &= ~self.cells["replayed"].to_numpy()
        cells = self.cells[chosen]
        if not len(cells):
            raise InputError(f"the {split} split has no cells; set ingest.split.{split} above 0 and ingest again")
        return cells

    def _blocks(self, cells: pd.DataFrame) -> SomaBlocks:
        codes = {name: cells[LABEL + name].to_numpy(np.int32) for name in self._codes}
        return SomaBlocks(cells["soma_joinid"].to_numpy(np.int64), codes, int(self.facts["tile"]), self.reader)
