"""Which features of a source are genes: 10x outputs, and files made of them, hold other kinds of features as well.

Antibodies, guides and hashtags are counted too, on another scale, and the model is of gene expression. Cell Ranger
writes the type of a feature into `features.tsv`, and scanpy into the var column `feature_types`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.data.findings import Finding, warning
from scldm.errors import InputError
from scldm.text import shown

GENES = "Gene Expression"
COLUMN = "feature_types"
_OTHERS = ("antibody capture", "antigen capture", "crispr guide capture", "multiplexing capture", "peaks", "custom")


@dataclass(frozen=True)
class GeneFeatures:
    """The features of a source that are genes."""

    kept: np.ndarray  # which features are genes, bool (n,)
    left_out: Mapping[str, int]  # type -> number of features that are not

    @property
    def positions(self) -> np.ndarray | None:
        """Return the positions of the genes, int64; None if all features are genes."""
        return np.flatnonzero(self.kept) if self.left_out else None

    def findings(self) -> list[Finding]:
        """Return a warning if features are left out."""
        if not self.left_out:
            return []
        kinds = ", ".join(f"{n:,} {shown(kind)}" for kind, n in self.left_out.items())
        what = f"{sum(self.left_out.values()):,} of {len(self.kept):,} features are no genes ({kinds})"
        return [warning(what, "they are left out: the model is of gene expression", count=int((~self.kept).sum()))]


def gene_features(types: pd.Series, where: str) -> GeneFeatures:
    """Choose the genes by the types of features, in any case of letters.

    Raises:
        InputError: No feature is a gene; the message names the types that there are.
    """
    texts = types.astype(object).where(types.notna(), "").astype(str).str.strip()
    kept = (texts.str.casefold() == GENES.casefold()).to_numpy()
    counts = {str(kind) or "without a type": int(n) for kind, n in texts[~kept].value_counts().items()}
    if len(types) and not kept.any():
        kinds = ", ".join(f"{n:,} {shown(kind)}" for kind, n in counts.items())
        raise InputError(f"{where} has no {GENES} features, only others ({kinds}); name a source with genes")
    return GeneFeatures(kept, counts)


def genes_of_var(var: pd.DataFrame, where: str) -> GeneFeatures:
    """Choose the genes of a table by its column feature_types, if it has one that holds the types of 10x.

    Raises:
        InputError: No feature is a gene.
    """
    if COLUMN in var:
        known = var[COLUMN].dropna().astype(str).str.strip().str.casefold()
        if known.isin([GENES.casefold(), *_OTHERS]).any():
            return gene_features(var[COLUMN], f"{where} (var column {COLUMN})")
    return GeneFeatures(np.ones(len(var), bool), {})
