"""Selects the rows of a source that a job applies models to, before anything is computed.

All problems with genes, labels, names and obs columns are reported together; after that only counts are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from pipeline.config.apply import RealCellsConfig, ScoredGenesConfig
from pipeline.config.ingest import MISSING_TEXT, GenesConfig, H5adSource, IngestConfig, TenxSource
from pipeline.data.ingest.filters import find_values, value_filter
from pipeline.data.ingest.genes import ModelGenes, gene_lut, model_genes
from pipeline.data.ingest.measured import presence_of_cells
from pipeline.data.labels import label_names
from pipeline.data.loading.blocks import LABEL, SomaReader
from pipeline.data.presence import GROUP
from pipeline.data.sources.open import OpenSource, open_source, with_counts
from pipeline.data.sources.tenx import WITHOUT_LABELS
from pipeline.inference.applier import JOINID, NAME
from pipeline.inference.models import ModelPaths
from scldm.data.label_type import STRING
from scldm.data.vocabulary import LabelVocabulary, UnknownNameError, Vocabulary
from scldm.errors import InputError
from scldm.text import choices_hint

T = TypeVar("T")
COPY_NOTES = ("obs has no ", "var has no ", "A 10x output has no ")  # about the copy in SOMA, which is not kept
FILLED = "unknown"  # value of the copy in columns that the input does not have


@dataclass(frozen=True)
class SourceRows:
    """Rows of a job, and what its actors share."""

    source: OpenSource
    table: pd.DataFrame  # soma_joinid, obs_name, `label:<name>` class ids, `obs:<column>` unchanged; in input order
    reader: SomaReader
    measured: np.ndarray | None  # genes that each group of data sets measured, (p, g) bool; None: all
    obs_columns: list[str]
    categories: dict[str, list[Any]]  # of obs_columns, the same in every shard
    digest: str  # hash of all of this and, for files, of the counts
    facts: dict[str, Any]


def source_rows(config: RealCellsConfig, folder: Path, models: ModelPaths) -> SourceRows:
    """Select the rows of a source.

    Args:
        folder: Folder of the stage; files are written to `soma/` in it.

    Raises:
        InputError: with all problems.
    """
    with _own_setting_names():
        return _source_rows(config, folder, models)


def _source_rows(config: RealCellsConfig, folder: Path, models: ModelPaths) -> SourceRows:
    presence = isinstance(config.genes, ScoredGenesConfig) and config.genes.presence
    vocabulary = Vocabulary.load(Path(models.vae) / "vocabulary.json")
    genes_config = GenesConfig(
        vocabulary=models.vae, match=config.genes.match, max_missing=config.genes.max_missing, presence=presence
    )
    source = _open(config, folder, vocabulary, genes_config)
    problems: list[str] = []
    genes = _collected(problems, lambda: model_genes(genes_config, source.store))
    cells = _collected(problems, lambda: _cells(config, source, vocabulary, presence))
    codes = {} if cells is None else _codes(config, cells, vocabulary, problems)
    if problems or genes is None or cells is None:
        raise InputError("\n".join(problems))
    source.notes += genes.notes
    measured = None
    if presence:
        found = presence_of_cells(source, cells, genes.table["soma_joinid"].to_numpy())
        codes[GROUP], measured = found.group, found.measured
    wanted = {*config.keep_obs, *_names(vocabulary)}
    kept = [c for c in cells if c in wanted]
    table = pd.DataFrame({JOINID: cells[JOINID], NAME: cells[NAME]})
    table = table.assign(**{LABEL + k: v for k, v in codes.items()}, **{"obs:" + c: cells[c] for c in kept})
    reader = _reader(source, folder, genes, tuple(codes))
    digest = hashlib.sha256((source.content or source.store.uri).encode())
    digest.update(pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes() + reader.gene_lut.tobytes())
    return SourceRows(
        source, table, reader, measured, kept, _categories(cells, kept, vocabulary), digest.hexdigest(),
        {**source.facts, **genes.facts},
    )  # fmt: skip


def _open(config: RealCellsConfig, folder: Path, vocabulary: Vocabulary, genes: GenesConfig) -> OpenSource:
    """Open the experiment as ingest does; required columns are not filled in."""
    as_ingest = IngestConfig(
        source=config.source, labels=[], cells=config.cells, obs_filter=config.obs_filter, genes=genes,
        missing_label="drop",
    )  # fmt: skip
    lenient = getattr(config, "unknown_labels", "error") == "none"
    needed = [*config.keep_obs, *(_names(vocabulary) if config.uses_labels and not lenient else [])]
    source = with_counts(open_source(as_ingest, folder, list(dict.fromkeys(needed)), min_cells=1), config.source)
    source.notes = [n for n in source.notes if not n.startswith(COPY_NOTES)]
    return source


def _reader(source: OpenSource, folder: Path, genes: ModelGenes, labels: tuple[str, ...]) -> SomaReader:
    store = source.store
    return SomaReader(
        uri=str((folder / "soma").resolve()) if source.uri == "soma" else source.uri,
        tiledb_config=dict(store.tiledb_config),
        measurement=store.measurement,
        layer=store.layer,
        gene_lut=gene_lut(genes.table, store.shape[1]),
        labels=labels,
        count_type="float32",
    )


def _cells(config: RealCellsConfig, source: OpenSource, vocabulary: Vocabulary, presence: bool) -> pd.DataFrame:
    """Return soma_joinid, the name of each cell, and the obs columns that are used or kept."""
    available = source.store.obs_columns()
    problems = [
        f"keep_obs: obs has no column {c!r} ({choices_hint(c, available)})"
        for c in config.keep_obs
        if c not in available
    ]
    if problems:
        raise InputError("\n".join(problems))
    chosen = value_filter(find_values(config.cells, source.store), config.obs_filter)
    extra = ["obs_id", *(["dataset_id"] if presence or source.measured is not None else [])]
    wanted = dict.fromkeys([*config.keep_obs, *_names(vocabulary), *extra])
    cells = source.store.obs([c for c in wanted if c in available], chosen)
    for label in vocabulary.labels:
        if label.name in cells and FILLED not in label.classes and (cells[label.name].astype(str) == FILLED).all():
            cells = cells.drop(columns=label.name)
    if not len(cells):
        raise InputError(f"the filter {chosen!r} (of cells and obs_filter) leaves no cells" if chosen
                         else f"{source.description} holds no cells")  # fmt: skip
    names = cells.pop("obs_id") if "obs_id" in cells else cells[JOINID]
    return cells.assign(**{NAME: _unique(names.astype(str), cells, source)})


def _unique(names: pd.Series, cells: pd.DataFrame, source: OpenSource) -> pd.Series:
    """Return the names of the input, prefixed with dataset_id if several files share names."""
    if not names.duplicated().any():
        return names
    if "dataset_id" in cells and not (longer := cells["dataset_id"].astype(str) + ":" + names).duplicated().any():
        source.notes.append("obs names are shared between files; they are written as <dataset_id>:<name>.")
        return longer
    twice = names[names.duplicated()].unique()
    raise InputError(
        f"{len(twice)} obs names occur more than once (first: {', '.join(twice[:3])}), so results could not be told "
        "apart; make them unique (adata.obs_names_make_unique())"
    )


def _codes(
    config: RealCellsConfig, cells: pd.DataFrame, vocabulary: Vocabulary, problems: list[str]
) -> dict[str, np.ndarray]:
    """Return class ids of the labels that the flow uses; the null id if a cell has none."""
    codes = {}
    lenient = getattr(config, "unknown_labels", "error") == "none"
    for label in vocabulary.labels if config.uses_labels else ():
        if label.name not in cells:
            if lenient:
                codes[label.name] = np.full(len(cells), label.null_id, np.int32)
                continue
            columns = f"map one with source.columns: {{{label.name}: <column of the file>}}, or "
            renamed = isinstance(config.source, (H5adSource, TenxSource))
            problems.append(
                f"obs has no column {label.name!r}, a label of the model; {columns if renamed else ''}go without: "
                "unknown_labels: none"
            )
            continue
        values = _names_in(cells[label.name], label)
        absent = pd.isna(values)
        unknown = ~absent & ~pd.Series(values, dtype=object).isin(label.classes).to_numpy()
        if (absent | unknown).any() and not lenient:
            problems.append(_unknown_cells(label, values, absent, unknown, cells[NAME]))
            continue
        known = [None if out else v for v, out in zip(values, absent | unknown, strict=True)]
        codes[label.name] = label.encode(known).astype(np.int32)
    return codes


def _names_in(column: pd.Series, label: LabelVocabulary) -> np.ndarray:
    """Return the class of each cell; a text like "nan" is missing unless it is a class of the model."""
    names = label_names(column, [text for text in MISSING_TEXT if text not in label.classes])
    if label.values is None:
        return names
    classes = {name: label.find(name) or name for name in pd.unique(names[~pd.isna(names)])}
    return np.array([classes.get(name) for name in names], dtype=object)


def _unknown_cells(
    label: LabelVocabulary, values: np.ndarray, absent: np.ndarray, unknown: np.ndarray, names: pd.Series
) -> str:
    parts = []
    if absent.any():
        parts.append(f"{int(absent.sum())} cells have no {label.name} (first: {', '.join(names[absent][:3])})")
    if unknown.any():
        try:
            label.encode(sorted(set(values[unknown])))
        except UnknownNameError as error:
            parts.append(f"{int(unknown.sum())} cells (first: {', '.join(names[unknown][:3])}): {error}")
    return f"label {label.name}: " + "; ".join(parts) + ". Set unknown_labels: none to use them without that label"


def _names(vocabulary: Vocabulary) -> list[str]:
    return [x.name for x in vocabulary.labels]


def _categories(cells: pd.DataFrame, kept: list[str], vocabulary: Vocabulary) -> dict[str, list[Any]]:
    """Return the categories of columns: the model's classes if they cover all values, else the input's categories."""
    of_model = {x.name: list(x.classes) for x in vocabulary.labels if x.type.values == STRING and not x.type.order}
    found: dict[str, list[Any]] = {}
    for column in kept:
        values = cells[column]
        if column in of_model and values.dropna().astype(str).isin(of_model[column]).all():
            found[column] = of_model[column]
        elif isinstance(values.dtype, pd.CategoricalDtype):
            found[column] = values.cat.categories.tolist()
    return found


def _collected(problems: list[str], call: Callable[[], T]) -> T | None:
    """Call a function; return None after adding its InputError to `problems`."""
    try:
        return call()
    except InputError as error:
        problems.append(str(error))
        return None


@contextmanager
def _own_setting_names() -> Iterator[None]:
    """Rename settings in errors: ingest.source and ingest.genes of readers are top-level keys of these jobs.

    Advice to change ingest.labels is left out, because the labels are the model's.
    """
    try:
        yield
    except InputError as error:
        text = str(error).replace("name one in ingest.labels, or map it", "map it").replace(WITHOUT_LABELS, "")
        text = text.replace("ingest.genes.vocabulary", "genes").replace("ingest.", "")
        raise InputError(text) from error
