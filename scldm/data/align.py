"""Align real cells in an AnnData to the genes of a model.

A gene that the data lack counts as zero and a gene that the model lacks is left out; both are counted.

Genes are matched by Ensembl id, ignoring its version, or by symbol, as in a job.

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
from scldm.data.cell_counts import RAW, CellsError, count_problem, layers_of, matrix_of, raw_cells
from scldm.data.class_names import class_names
from scldm.data.vocabulary import UnknownNameError, Vocabulary

_VERSION = re.compile(r"^(ENS[A-Z]*\d{6,})\.\d+$")
MATCH = {"id": "feature_id", "symbol": "feature_name"}
Match = Literal["id", "symbol"]


@dataclass(frozen=True)
class AlignedCells:
    """Counts over the genes of a model, with the number of genes that did not match."""

    counts: sp.csr_matrix  # (b, g) float32, indices in order
    n_missing: int  # genes of the model that the data lack
    n_extra: int  # genes of the data that the model lacks

    def batch(self, start: int, stop: int, conditions: Mapping[str, np.ndarray] | None = None) -> CellBatch:
        """Return cells start .. stop - 1 as a batch for the networks.

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
    """Return the counts of cells over the genes of a model.

    Args:
        adata: Cells with raw counts.
        vocabulary: Genes of the model.
        layer: Layer of the counts, "raw" for adata.raw; None for X.
        match: Whether genes are matched by id or by symbol.
        genes: var column of the ids or symbols; None takes feature_id (feature_name for symbols), or else the index; if
            that holds none of the model's genes, the column of var that holds most of them.
        max_missing: Largest share of the model's genes that the data may lack.

    Raises:
        CellsError: There are no counts, cells without any count, or too few genes in common.
    """
    if layer == RAW and RAW not in adata.layers:
        adata, layer = raw_cells(adata), None
    model_names = vocabulary.feature_ids if match == "id" else vocabulary.feature_names
    wanted = _keys(model_names, match)
    have = _keys(_gene_names(adata.var, match, genes, wanted), match)
    for subject, keys in (("the data name", have), ("the model names", wanted)):
        if (match == "id" or subject == "the data name") and len(repeated := keys[keys.duplicated()].unique()):
            raise CellsError(
                f"{subject} {len(repeated)} genes more than once (first: {', '.join(repeated[:3])}); give a var column "
                "of unique ids with genes="
            )
    place = pd.Index(wanted[~wanted.duplicated(keep=False)])
    gene_of = np.flatnonzero(~wanted.duplicated(keep=False))
    position = place.get_indexer(have)
    target = np.where(position >= 0, gene_of[position], -1)  # column of the data -> gene of the model
    n_missing = vocabulary.n_genes - int((target >= 0).sum())
    if n_missing > max_missing * vocabulary.n_genes:
        raise CellsError(
            f"{n_missing} of the model's {vocabulary.n_genes} genes are not in the data, more than max_missing "
            f"({max_missing:g}) allows. By {match} the model has {', '.join(wanted[:3])} and the data "
            f"{', '.join(have[:3])}: check the organism, or try match={'symbol' if match == 'id' else 'id'!r} or genes="
        )
    counts = _spread(matrix_of(adata, layer), target, vocabulary.n_genes)
    _require_counts(counts, adata)
    return AlignedCells(counts, n_missing, int((target < 0).sum()))


def class_ids(adata: anndata.AnnData, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Return the class ids of each label, (b,); cells without a class, and labels that obs lacks, get the null id.

    Raises:
        CellsError: The model does not know some classes; the message names all of them.
    """
    ids, problems = {}, []
    for label in vocabulary.labels:
        values = adata.obs[label.name] if label.name in adata.obs else [None] * adata.n_obs
        try:
            ids[label.name] = label.encode(class_names(values))
        except UnknownNameError as error:
            problems.append(str(error))
    if problems:
        raise CellsError("\n".join(problems))
    return ids


def _gene_names(var: pd.DataFrame, match: Match, column: str | None, wanted: pd.Series) -> list[str]:
    if column is not None:
        if column not in var:
            raise CellsError(f"var has no column {column!r}; it has {', '.join(map(str, var.columns)) or 'none'}")
        return [str(x) for x in var[column]]
    usual = [str(x) for x in var.get(MATCH[match], var.index)]
    if _keys(usual, match).isin(wanted).any():
        return usual
    texts = {c: [str(x) for x in var[c]] for c in var if not pd.api.types.is_numeric_dtype(var[c].dtype)}
    held = {c: int(_keys(names, match).isin(wanted).sum()) for c, names in texts.items()}
    best = max(held, key=lambda c: held[c], default=None)
    return usual if best is None or not held[best] else texts[best]


def _keys(names: list[str] | tuple[str, ...], match: Match) -> pd.Series:
    return pd.Series([_VERSION.sub(r"\1", x) for x in names] if match == "id" else list(names), dtype=str)


def _spread(counts: sp.csr_matrix, target: np.ndarray, n_genes: int) -> sp.csr_matrix:
    """Move columns to the genes of the model and drop stored zeros."""
    coo = counts.tocoo()
    gene = target[coo.col]
    kept = (gene >= 0) & (coo.data != 0)
    moved = sp.csr_matrix(
        (coo.data[kept].astype(np.float32), (coo.row[kept], gene[kept])), shape=(counts.shape[0], n_genes)
    )
    moved.sort_indices()
    return moved


def _require_counts(counts: sp.csr_matrix, adata: anndata.AnnData) -> None:
    if problem := count_problem(counts, adata):
        raise CellsError(
            f"{problem}; the model takes counts, not normalised or log-transformed values: name their layer "
            f"({layers_of(adata)})"
        )
    empty = np.diff(counts.indptr) == 0
    if empty.any():
        first = ", ".join(map(str, adata.obs_names[empty][:3]))
        raise CellsError(
            f"{int(empty.sum())} cells express none of the model's genes (first: {first}); leave them out: "
            "adata[adata.X.sum(1) > 0]"
        )
