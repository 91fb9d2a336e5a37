"""Opens the source of a job as a SOMA experiment.

`.h5ad` and 10x files and synthetic cells are written once to `soma/` in the stage's folder; a SOMA experiment and the
Census are read where they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.config.ingest import Source
from pipeline.config.job import CensusSource, H5adSource, IngestConfig, SomaSource, SyntheticSource, TenxSource
from pipeline.config.s3 import S3Config
from pipeline.data.presence import Presence
from pipeline.data.soma.names import locate_counts
from pipeline.data.soma.store import SomaStore
from pipeline.data.soma.write import write_experiment
from pipeline.data.sources.synthetic import synthetic_cells
from pipeline.data.tables import CellTables
from pipeline.data.validation.checks import MIN_CELLS, checked, label_problems
from scldm.data.label_type import LabelType
from scldm.errors import InputError


@dataclass
class OpenSource:
    """An experiment and what is known about its origin."""

    store: SomaStore
    uri: str  # as recorded in the facts
    description: str
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # further facts for the manifest
    types: Mapping[str, LabelType] = field(default_factory=dict)  # of obs columns that the store holds in another type
    measured: Presence | None = None  # by cells of the store, genes of the store; None: ask the store
    content: str | None = None  # hash of all counts, if the store was written here
    truth: Callable[[], pd.DataFrame] | None = None  # what combinations have on average, of synthetic cells


def open_source(
    config: IngestConfig, folder: Path, columns: Sequence[str], *, min_cells: int = MIN_CELLS,
    named_by: Mapping[str, str] = {},
) -> OpenSource:  # fmt: skip
    """Open the experiment of a job; write it to `folder/soma` if the source is not in SOMA yet.

    Args:
        columns: obs columns that the job requires.
        min_cells: Smallest number of cells of a source that is not in SOMA yet.
        named_by: Place that names a column which is no label, for messages.
    """
    source = config.source
    if isinstance(source, SomaSource):
        store = SomaStore(source.uri, soma_config(source), source.measurement, source.layer)
        return OpenSource(store, source.uri, f"SOMA experiment {source.uri}")
    if isinstance(source, CensusSource):
        return _census(source)
    tables, description = _tables(source, [*columns, *config.cells.conditions()], named_by)
    # A filter may remove cells without a label: they are checked again after it.
    lenient = config.missing_label == "drop" or bool(config.obs_filter or config.cells.conditions())
    if absent := [c for c in named_by if c not in tables.obs]:  # no fault of the source
        raise InputError(
            "\n".join(label_problems(tables.obs, absent, drop_missing=True, names=None, named_by=named_by))
        )
    chunks = checked(
        tables, columns, drop_missing=lenient, missing_text=config.missing_text, min_cells=min_cells,
        values=config.label_values,
    )  # fmt: skip
    content = hashlib.sha256()
    store = write_experiment(folder / "soma", tables.obs, tables.var, _hashed(chunks, content))
    measured = tables.measured or Presence.everywhere(tables.where, n_cells=len(tables.obs), n_genes=len(tables.var))
    return OpenSource(
        store,
        "soma",
        description,
        tables.notes,
        types=tables.types,
        measured=measured,
        content=content.hexdigest(),
        truth=tables.truth,
    )


def with_counts(opened: OpenSource, source: Source) -> OpenSource:
    """Return a source whose measurement and layer exist; reads the names in the experiment."""
    if isinstance(source, SomaSource):
        given = {name: getattr(source, name) for name in ("measurement", "layer") if name in source.model_fields_set}
        found = locate_counts(opened.store, measurement=given.get("measurement"), layer=given.get("layer"))
        opened.store, notes = found
        opened.notes += notes
    return opened


def _hashed(chunks: Iterable[sp.csr_matrix], content: Any) -> Iterator[sp.csr_matrix]:
    """Yield the chunks unchanged, and add them to a hash."""
    for chunk in chunks:
        for values, kind in ((chunk.indptr, np.int64), (chunk.indices, np.int32), (chunk.data, np.float32)):
            content.update(np.ascontiguousarray(values, kind).data)
        yield chunk


def soma_config(source: SomaSource) -> dict[str, str]:
    """Return TileDB's settings for a source, without credentials: TileDB finds them itself on every machine."""
    if not source.uri.startswith("s3://"):
        if source.region or source.anonymous or source.s3 != S3Config():
            raise InputError(
                f"ingest.source: region, anonymous and s3 are for s3:// addresses, uri is {source.uri!r}; drop them"
            )
        return {}
    config = {**source.s3.tiledb(), **({"vfs.s3.region": source.region} if source.region else {})}
    return config | ({"vfs.s3.no_sign_request": "true"} if source.anonymous else {})


def _census(source: CensusSource) -> OpenSource:
    from pipeline.data.sources.census import locate_census

    found = locate_census(source)
    store = replace(found.store, tiledb_config={**source.s3.tiledb(), **found.store.tiledb_config})
    opened = OpenSource(store, store.uri, f"CELLxGENE Census {found.version}, {source.organism}")
    opened.facts["census_version"] = found.version
    if source.version != found.version:
        opened.facts["census_version_asked"] = source.version
        opened.notes.append(
            f"{source.version} stood for {found.version} when this was ingested, and stays so for this output; to get "
            f"the same cells anywhere, pin ingest.source.version: {found.version}."
        )
    return opened


def _tables(
    source: SyntheticSource | H5adSource | TenxSource, columns: Sequence[str], named_by: Mapping[str, str]
) -> tuple[CellTables, str]:
    """Read the cells of a source that is not in SOMA yet; return them with a description."""
    if isinstance(source, SyntheticSource):
        given = f" under {source.n_treatments} treatments and a control" if source.n_treatments else ""
        inside = " on trajectories" if source.within_types else ""
        description = f"{source.n_cells} synthetic cells of {source.n_types} types{inside}{given}, seed {source.seed}"
        return synthetic_cells(source), description
    if isinstance(source, TenxSource):
        from pipeline.data.sources.tenx import read_10x

        return read_10x(source, columns, named_by), f"10x {source.path}"
    from pipeline.data.sources.h5ad import read_h5ad

    return read_h5ad(source, columns), f"h5ad {source.path}"
