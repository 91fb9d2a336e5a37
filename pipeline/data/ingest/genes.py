"""Resolves the genes of the model, and the position of each of them in the source.

A gene's id is its position in the vocabulary. The vocabulary is the source's own, a list from a file, or a model's; in
the last two cases the source's genes are matched by Ensembl id (ignoring versions) or by symbol, and genes without a
match are counted. A gene that the source lacks keeps its id and gets the joinid -1: it was not measured.

Shape letters: g genes of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from pipeline.config.input_paths import vocabulary_file
from pipeline.config.job import GenesConfig
from pipeline.data.soma.store import SomaStore
from pipeline.data.tables import plain_id
from pipeline.data.validation.feature_types import genes_of_var
from pipeline.data.validation.gene_names import IDS_OF_SOMA, GeneNames, gene_findings
from scldm.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from scldm.checkpoints.convert.gene_list import GeneList

LACKING = -1
FIRST = 5  # genes that a note names


@dataclass(frozen=True)
class ModelGenes:
    """Genes in the order of their ids, and how they were matched."""

    table: pd.DataFrame  # soma_joinid (LACKING if the source has no such gene), feature_id, feature_name
    facts: dict[str, Any]
    notes: list[str]


def model_genes(config: GenesConfig, store: SomaStore) -> ModelGenes:
    """Return the genes that a job requests.

    Raises:
        InputError: the vocabulary cannot be read, too few of its genes are in the source, or a filter leaves none.
    """
    var, notes = _genes_of(store, config.value_filter)
    if config.vocabulary == "source":
        var = _checked(var, store)
        return ModelGenes(var, {"genes": {"vocabulary": "source"}}, notes)
    wanted = read_vocabulary(config.vocabulary, known={*var["feature_id"], *var["feature_name"]})
    keys = _keys(list(wanted.feature_ids if config.match == "id" else wanted.feature_names), config.match)
    found = _keys(list(var["feature_id" if config.match == "id" else "feature_name"]), config.match)
    clear = ~found.duplicated(keep=False)
    at = pd.Index(found[clear]).get_indexer(keys)
    at[keys.duplicated(keep=False)] = -1  # two genes of the vocabulary would share one of the source
    matched = at >= 0
    ambiguous = int((~matched & (keys.isin(found[~clear]) | keys.duplicated(keep=False))).sum())
    n, missing = int(matched.sum()), int((~matched).sum())
    _require_enough(config, wanted, keys, found, matched)
    places = np.flatnonzero(clear)[at]

    names = np.array(wanted.feature_names, dtype=object)
    bare = matched & (
        names == np.array(wanted.feature_ids, dtype=object)
    )  # a list of ids: the source knows the symbols
    names[bare] = var["feature_name"].to_numpy(object)[places[bare]]
    table = pd.DataFrame(
        {
            "soma_joinid": np.where(matched, var["soma_joinid"].to_numpy()[places], LACKING),
            "feature_id": list(wanted.feature_ids),
            "feature_name": names,
        }
    )
    lacking = [wanted.feature_ids[i] for i in np.flatnonzero(~matched)[:FIRST]]
    counts = {"matched": n, "missing": missing, "extra": len(var) - n, "ambiguous": ambiguous}
    facts = {"genes": {"vocabulary": config.vocabulary, "match": config.match, **counts}}
    return ModelGenes(table, facts, notes + _notes(config, len(table), counts, lacking))


def places_of(store: SomaStore, genes: pd.DataFrame, match: Literal["id", "symbol"]) -> np.ndarray:
    """Return the joinid of each gene of a vocabulary in another store, (g,); LACKING if it has none, or not one alone.

    Args:
        genes: feature_id and feature_name of the vocabulary.
    """
    var, _ = _genes_of(store, None)
    column = "feature_id" if match == "id" else "feature_name"
    keys, found = (_keys(list(x[column]), match) for x in (genes, var))
    clear = ~found.duplicated(keep=False)
    at = pd.Index(found[clear]).get_indexer(keys)
    at[keys.duplicated(keep=False)] = -1
    return np.where(at >= 0, var["soma_joinid"].to_numpy()[clear.to_numpy()][at], LACKING)


def read_vocabulary(path: str, known: Collection[str] = ()) -> GeneList:
    """Read genes from a file, or from a model.

    Args:
        known: Genes of the source: what is one of them is no header of a list.
    """
    from scldm.checkpoints.convert.gene_list import read_genes  # imports torch, which readers of counts do without

    try:
        return read_genes(vocabulary_file(path), known)
    except CheckpointError as error:
        raise InputError(f"ingest.genes.vocabulary: {error}; or set ingest.genes.vocabulary=source") from error


def gene_lut(table: pd.DataFrame, n_genes_source: int) -> np.ndarray:
    """Return a table from a gene's joinid in the source to its id, -1 for genes outside the vocabulary; int32."""
    joinids = table["soma_joinid"].to_numpy()
    lut = np.full(n_genes_source, -1, dtype=np.int32)
    lut[joinids[joinids != LACKING]] = np.flatnonzero(joinids != LACKING)
    return lut


def _genes_of(store: SomaStore, value_filter: str | None) -> tuple[pd.DataFrame, list[str]]:
    """Return the genes of the source that pass the filter (soma_joinid, feature_id, feature_name), and notes."""
    var = store.var(value_filter=value_filter)
    features = genes_of_var(var, store.uri)
    var = var[features.kept].reset_index(drop=True)
    ids = next((c for c in ("feature_id", "var_id") if c in var), None)
    if ids is None:
        raise InputError(f"var of {store.uri} has no feature_id; columns: {', '.join(map(str, var.columns))}")
    name = var["feature_name"] if "feature_name" in var else var[ids]
    var = pd.DataFrame(
        {"soma_joinid": var["soma_joinid"], "feature_id": var[ids].astype(str), "feature_name": name.astype(str)}
    )
    if not len(var):
        raise InputError(f"ingest.genes.value_filter {value_filter!r} leaves no genes; loosen it")
    if len(twice := var["feature_id"][var["feature_id"].duplicated()].unique()):
        raise InputError(
            f"{len(twice)} gene ids of {store.uri} occur more than once (first: {', '.join(twice[:3])}); {IDS_OF_SOMA}"
        )
    return var, [f"{found.message}." for found in features.findings()]


def _checked(var: pd.DataFrame, store: SomaStore) -> pd.DataFrame:
    """Return the genes with plain ids, as those of files have; raise InputError for what validate-data refuses."""
    errors = [f for f in gene_findings(GeneNames(list(var["feature_id"]), "SOMA")) if f.level == "error"]
    if errors:
        raise InputError("\n".join([f"{store.uri} cannot be used:", *(f"  - {f.message}" for f in errors)]))
    return var.assign(feature_id=[plain_id(x) for x in var["feature_id"]])


def _keys(names: list[str], match: str) -> pd.Series:
    return pd.Series([plain_id(x) for x in names] if match == "id" else names, dtype=str)


def _require_enough(
    config: GenesConfig, wanted: GeneList, keys: pd.Series, found: pd.Series, matched: np.ndarray
) -> None:
    missing = int((~matched).sum())
    if matched.any() and missing <= config.max_missing * len(matched):
        return
    first = [wanted.feature_ids[i] for i in np.flatnonzero(~matched)[:3]]
    other = "symbol" if config.match == "id" else "id"
    raise InputError(
        f"ingest.genes.vocabulary: {missing} of {len(matched)} genes of {config.vocabulary} are not in the source "
        f"(first: {', '.join(first)}), more than ingest.genes.max_missing ({config.max_missing:g}) allows. By "
        f"{config.match} the vocabulary has {', '.join(keys[:3])} and the source {', '.join(found[:3])}: check the "
        f"organism, try ingest.genes.match: {other}, or raise max_missing"
    )


def _notes(config: GenesConfig, n_genes: int, counts: dict[str, int], lacking: list[str]) -> list[str]:
    notes = [
        f"{counts['matched']} of {n_genes} genes of the vocabulary are in the source; {counts['extra']} genes of the "
        "source are not in the vocabulary, and their counts are left out."
    ]
    if counts["ambiguous"]:
        notes.append(
            f"{counts['ambiguous']} genes share their {config.match} with another gene and are taken as missing."
        )
    if counts["missing"]:
        what = (
            "left out of the likelihood"
            if config.presence
            else "taken as zeros, which ingest.genes.presence=true fixes"
        )
        more = f" and {counts['missing'] - len(lacking)} more" if counts["missing"] > len(lacking) else ""
        notes.append(
            f"{counts['missing']} genes of the vocabulary were not measured: they are {what}. The source lacks "
            f"{', '.join(lacking)}{more}."
        )
    return notes
