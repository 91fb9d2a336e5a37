"""Real cells in an AnnData, brought to the genes of a model: a gene that the data lack counts as zero, one that the
model lacks is left out, and how many of each there are is known.

Genes are found by Ensembl id, whose version does not count, or by symbol, as a job does it.

Shape letters: b cells, g genes of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm.data.batch import CellBatch
from scldm.data.vocabulary import UnknownNameError, Vocabulary
from scldm.errors import InputError

_VERSION = re.compile(r"^(ENS[A-Z]*\d{6,})\.\d+$")
MATCH = {"id": "feature_id", "symbol": "feature_name"}
Match = Literal["id", "symbol"]


class CellsError(InputError, ValueError):
    """Cells that a model cannot take; the message says what, where, and how to mend it."""


@dataclass(frozen=True)
class AlignedCells:
    """Counts over the genes of a model."""

    counts: sp.csr_matrix  # (b, g) float32, indices in order
    n_missing: int  # genes of the model that the data lack
    n_extra: int  # genes of the data that the model lacks

    def batch(self, start: int, stop: int, conditions: Mapping[str, np.ndarray] | None = None) -> CellBatch:
        """Cells start .. stop - 1 as the networks take them.

        Args:
            conditions: Label -> class ids of all cells.
        """
        labels: dict[str, Tensor] = {k: torch.from_numpy(v[start:stop]) for k, v in (conditions or {}).items()}
        return CellBatch.from_csr(self.counts[start:stop], first=start, conditions=labels)


def align(
    adata: anndata.AnnData,
    vocabulary: Vocabulary,
    *,
    layer: str | None = None,
    match: Match = "id",
    genes: str | None = None,
    max_missing: float = 0.2,
) -> AlignedCells:
    """Counts of cells over the genes of a model.

    Args:
        layer: Where the counts are: a layer's name, or None for X.
        match: How genes are found: by id, or by symbol.
        genes: var column that holds them; None takes the index, or a column feature_id (feature_name for symbols).
        max_missing: Largest share of the model's genes that the data may lack.

    Raises:
        CellsError: no counts, cells without any count, or too few genes in common.
    """
    names = _gene_names(adata.var, match, genes)
    of_model = vocabulary.feature_ids if match == "id" else vocabulary.feature_names
    wanted, have = _keys(of_model, match), _keys(names, match)
    for what, keys in (("the data name", have), ("the model names", wanted)):
        if (match == "id" or what == "the data name") and len(twice := keys[keys.duplicated()].unique()):
            raise CellsError(
                f"{what} {len(twice)} genes more than once (first: {', '.join(twice[:3])}); give a var column "
                "of unique ids with genes="
            )
    place = pd.Index(wanted[~wanted.duplicated(keep=False)])
    gene_of = np.flatnonzero(~wanted.duplicated(keep=False))
    found = place.get_indexer(have)
    target = np.where(found >= 0, gene_of[found], -1)  # column of the data -> gene of the model
    n_missing = vocabulary.n_genes - int((target >= 0).sum())
    if n_missing > max_missing * vocabulary.n_genes:
        raise CellsError(
            f"{n_missing} of the model's {vocabulary.n_genes} genes are not in the data, more than max_missing "
            f"({max_missing:g}) allows. By {match} the model has {', '.join(wanted[:3])} and the data "
            f"{', '.join(have[:3])}: check the organism, or try match={'symbol' if match == 'id' else 'id'!r} or genes="
        )
    counts = _spread(_counts(adata, layer), target, vocabulary.n_genes)
    _require_counts(counts, adata)
    return AlignedCells(counts, n_missing, int((target < 0).sum()))


def class_ids(adata: anndata.AnnData, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Class ids of the labels that obs has; the null id where a cell, or obs, has none.

    Raises:
        CellsError: classes that the model does not know; all of them at once.
    """
    ids, problems = {}, []
    for label in vocabulary.labels:
        values = list(adata.obs[label.name]) if label.name in adata.obs else [None] * adata.n_obs
        try:
            ids[label.name] = label.encode(None if pd.isna(v) else str(v) for v in values)
        except UnknownNameError as error:
            problems.append(str(error))
    if problems:
        raise CellsError("\n".join(problems))
    return ids


def _gene_names(var: pd.DataFrame, match: Match, column: str | None) -> list[str]:
    if column is not None:
        if column not in var:
            raise CellsError(f"var has no column {column!r}; it has {', '.join(map(str, var.columns)) or 'none'}")
        return [str(x) for x in var[column]]
    return [str(x) for x in var.get(MATCH[match], var.index)]


def _keys(names: list[str] | tuple[str, ...], match: Match) -> pd.Series:
    return pd.Series([_VERSION.sub(r"\1", x) for x in names] if match == "id" else list(names), dtype=str)


def _counts(adata: anndata.AnnData, layer: str | None) -> sp.csr_matrix:
    if layer is not None and layer not in adata.layers:
        raise CellsError(f"there is no layer {layer!r}; there are: {', '.join(adata.layers) or 'none'}")
    x = adata.X if layer is None else adata.layers[layer]
    if x is None:
        raise CellsError(
            f"adata.X is empty; name the layer of raw counts: {', '.join(adata.layers) or 'there is none'}"
        )
    return sp.csr_matrix(x)


def _spread(counts: sp.csr_matrix, target: np.ndarray, n_genes: int) -> sp.csr_matrix:
    """Columns moved to the genes of the model; zeros that were stored are left out."""
    coo = counts.tocoo()
    gene = target[coo.col]
    kept = (gene >= 0) & (coo.data != 0)
    moved = sp.csr_matrix(
        (coo.data[kept].astype(np.float32), (coo.row[kept], gene[kept])), shape=(counts.shape[0], n_genes)
    )
    moved.sort_indices()
    return moved


def _require_counts(counts: sp.csr_matrix, adata: anndata.AnnData) -> None:
    values = counts.data
    bad = ~np.isfinite(values) | (values < 0) | (values != np.rint(values))
    if bad.any():
        k = int(np.argmax(bad))
        cell = adata.obs_names[int(np.searchsorted(counts.indptr, k, side="right")) - 1]
        raise CellsError(
            f"{int(bad.sum())} values are no raw counts, the first is {values[k]:g} in cell {cell}; the model takes "
            "counts, not normalised or log-transformed values: name their layer "
            f"({', '.join(adata.layers) or 'there is none'})"
        )
    empty = np.diff(counts.indptr) == 0
    if empty.any():
        first = ", ".join(map(str, adata.obs_names[empty][:3]))
        raise CellsError(
            f"{int(empty.sum())} cells express none of the model's genes (first: {first}); leave them out: "
            "adata[adata.X.sum(1) > 0]"
        )
