"""Splits cells into training, validation and test: a function of each cell alone.

The split is decided by a hash of (salt, joinid or storage tile) or of (salt, donor or data set), so it never changes
when other cells are added or removed, and a donor is never in two splits. The copies of a cell (`copies.py`) are on
one side. Combinations of labels may be held out as
well (`held_out.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from pipeline.config.job import SplitConfig
from pipeline.data.ingest.copies import Copies
from pipeline.data.ingest.subsample import mix
from pipeline.data.validation.counts import LEAVE_OUT_COPIES, all_copies
from scldm.errors import InputError

SPLITS = ("train", "validation", "test")


def split_cells(
    cells: pd.DataFrame, config: SplitConfig, *, tile: int = 2048, copies: Copies | None = None
) -> np.ndarray:
    """Return the split of each cell, by a hash of (salt, value).

    Args:
        cells: Table with soma_joinid, and with the column named by `by`.
        tile: Number of cells in a storage tile, for `by: tile`.
        copies: Which cells have the same counts. By cell or tile, they go where the first one goes; donors and data
            sets that share a cell go to the same split, that of the first.
    """
    salt = np.frombuffer(hashlib.blake2b(config.salt.encode(), digest_size=8).digest(), np.uint64)[0]
    if config.by in ("cell", "tile"):
        keys = (cells["soma_joinid"].to_numpy() // (tile if config.by == "tile" else 1)).astype(np.uint64)
        if copies is not None:  # a tile is left only by what must be a copy, not by what agrees by chance
            keys = keys[copies.first if config.by == "cell" else copies.same_cell]
    else:
        codes, values = pd.factorize(cells[config.by])
        codes = codes if copies is None else _joined(codes, copies, len(values))
        digests = [hashlib.blake2b(str(v).encode(), digest_size=8).digest() for v in values]
        keys = np.frombuffer(b"".join(digests), np.uint64)[codes]
    u = mix(keys ^ salt) / 2.0**64
    return np.where(u < config.test, "test", np.where(u < config.test + config.validation, "validation", "train"))


def _joined(codes: np.ndarray, copies: Copies, n_groups: int) -> np.ndarray:
    """Return for each cell the first of the groups that are connected by copies with its own."""
    pairs = np.unique(np.stack([codes, codes[copies.same_cell]]), axis=1)
    graph = sp.coo_matrix((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(n_groups, n_groups))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component][codes]


def require_splits(config: SplitConfig, split: np.ndarray, obs: pd.DataFrame, copies: Copies | None = None) -> None:
    """Raise InputError if a requested split has no cells.

    Args:
        copies: Which cells have the same counts, if that is known.
    """
    counts = dict(zip(*np.unique(split, return_counts=True), strict=True))
    requested = {"train": 1.0, "validation": config.validation, "test": config.test}
    if not counts.get("train", 0) and config.held_out is not None:
        raise InputError("ingest.split.held_out: the combinations hold out every cell; leave some to train on")
    if lacking := [s for s in SPLITS if requested[s] > 0 and not counts.get(s, 0)]:
        n_different = len(obs) if copies is None else len(np.unique(copies.first))
        if n_different < len(obs) and config.by in ("cell", "tile"):
            raise InputError(
                f"no cell fell into {' and '.join(lacking)}: {all_copies(len(obs), n_different)}; see how the cells "
                f"were made: {LEAVE_OUT_COPIES}"
            )
        groups = f" of {obs[config.by].nunique()} different {config.by}" if config.by not in ("cell", "tile") else ""
        held_out = [f"ingest.split.{s}" for s in lacking if s != "train"]
        shares = f"raise {' and '.join(held_out)}, or set 0" if held_out else "lower the shares of the other splits"
        by = "" if config.by == "cell" else ", or set ingest.split.by: cell"
        raise InputError(
            f"no cell{groups} fell into {' and '.join(lacking)} ({len(obs)} cells); {shares}, change "
            f"ingest.split.salt{by}"
        )


def label_counts(obs: pd.DataFrame, split: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Count the cells of each class of each label in each split."""
    counts = {}
    for label in labels:
        table = pd.crosstab(obs[label].astype(str).to_numpy(), split).reindex(columns=list(SPLITS), fill_value=0)
        counts[label] = {str(name): {s: int(row[s]) for s in SPLITS} for name, row in table.iterrows()}
    return counts
