"""Read the counts of an AnnData and check that they are counts; it may be in memory, on disk (`backed="r"`) or a view.

Cells that hold log1p CP10k values instead, drawn from a Gaussian head, say so in `uns["scldm"]["scale"]`.

Shape letters: b cells, n genes of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp

from scldm.errors import InputError

RAW = "raw"  # as the name of a layer: adata.raw, where no layer has that name
SCALE, LOG1P_CP10K = "scale", "log1p_cp10k"  # entry of uns["scldm"] of cells that hold no counts


class CellsError(InputError, ValueError):
    """Raised for cells that a model cannot take. The message says what is wrong, where, and how to fix it."""


def matrix_of(adata: anndata.AnnData, layer: str | None, *, argument: str = "adata") -> sp.csr_matrix:
    """Return the values of cells, (b, n) CSR; what is on disk is read whole.

    Args:
        layer: Layer of the values; None for X.
        argument: Name of the caller's argument, for messages.

    Raises:
        CellsError: There is no such matrix, or anndata cannot read it.
    """
    names = layers_of(adata)
    if layer is not None and layer not in adata.layers:
        raise CellsError(f"{argument}: there is no layer {layer!r}; there are: {names}")
    try:
        x = adata.X if layer is None else adata.layers[layer]
        if x is None:
            raise CellsError(f"{argument}.X is empty; name the layer of raw counts: {names}")
        return sp.csr_matrix(x.to_memory() if hasattr(x, "to_memory") else x[:])
    except (ValueError, TypeError, IndexError, OSError) as error:
        if isinstance(error, CellsError):
            raise
        raise CellsError(
            f"{argument}: anndata cannot read the values of these cells ({str(error).splitlines()[0]}); of a view, "
            "take cells and genes one after the other: adata[cells].copy()[:, genes].copy(); of a file, read it into "
            "memory with .to_memory()"
        ) from error


def raw_cells(adata: anndata.AnnData, *, argument: str = "adata") -> anndata.AnnData:
    """Return the values and genes of `adata.raw` as cells of their own.

    Raises:
        CellsError: There is no raw.
    """
    if adata.raw is None:
        raise CellsError(f"{argument}: layer is 'raw', and there is no raw; there are layers: {layers_of(adata)}")
    return adata.raw.to_adata()


def count_problem(values: sp.csr_matrix, adata: anndata.AnnData) -> str | None:
    """Return why values are no raw counts, with the first of them; None if they are counts."""
    stored = values.data
    bad = ~np.isfinite(stored) | (stored < 0) | (stored != np.rint(stored))
    if not bad.any():
        return None
    k = int(np.argmax(bad))
    cell = adata.obs_names[int(np.searchsorted(values.indptr, k, side="right")) - 1]
    return f"{int(bad.sum())} values are no raw counts, the first is {stored[k]:g} in cell {cell}"


def is_log_normalised(uns: Mapping[str, Any]) -> bool:
    """Return whether the provenance of cells (their uns) says that X holds log1p CP10k values."""
    about = uns.get("scldm", {})
    return isinstance(about, Mapping) and str(about.get(SCALE, "")) == LOG1P_CP10K


def layers_of(adata: anndata.AnnData) -> str:
    """Return the names of layers as a list in a message."""
    return ", ".join(map(str, adata.layers)) or "there is none"
