"""Compares X with `nnz` and `raw_sum` in obs, as the Census and our own experiments have them.

TileDB keeps no checksum over an array: a fragment that was lost together with its commit file, or is not committed yet,
leaves cells that look empty. They would silently be left out like empty cells.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from pipeline.data.findings import FIRST, Finding, error, warning

_AGAIN = (
    "a fragment is missing or not written yet: copy or write the experiment again; if genes were left out on purpose, "
    "drop the obs columns nnz and raw_sum"
)


def sum_findings(obs: pd.DataFrame, *, n_expressed: np.ndarray, library_size: np.ndarray) -> Iterator[Finding]:
    """Yield differences between X and obs.

    Args:
        obs: Cells with soma_joinid; nothing is compared without nnz.
        n_expressed: Number of genes with a count in X, of all genes of the experiment; one per row of obs.
        library_size: Sum of those counts, one per row of obs.
    """
    if "nnz" not in obs or not pd.api.types.is_numeric_dtype(obs["nnz"]):
        return
    recorded = obs["nnz"].to_numpy()
    lost = (n_expressed == 0) & (recorded > 0)
    other = ~lost & (n_expressed != recorded)
    if "raw_sum" in obs and pd.api.types.is_numeric_dtype(obs["raw_sum"]):
        other |= ~lost & ~np.isclose(library_size, obs["raw_sum"].to_numpy(float), rtol=1e-5)
    first = lambda bad: "cell " + obs["soma_joinid"][bad].head(FIRST).astype(str)  # noqa: E731
    if n := int(lost.sum()):
        yield error(f"{n:,} of {len(obs):,} cells have counts by obs (nnz) and none in X", _AGAIN,
                    count=n, first=first(lost))  # fmt: skip
    if n := int(other.sum()):
        yield warning(f"{n:,} of {len(obs):,} cells have other counts in X than obs records (nnz, raw_sum)",
                      "X was changed after obs: are all genes and fragments there?", count=n,
                      first=first(other))  # fmt: skip
