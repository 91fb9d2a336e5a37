"""Differential expression between two groups of real cells, with the model's denoised expression.

What is tested and what is estimated are kept apart, because denoising adds no evidence that a gene's own mean differs:
a decoder smooths, so that a gene that does not differ follows genes that do, and with thousands of cells any such
difference has a tiny p-value (`evidence="denoised"` shows it). So by default p-values are of the gene's own counts
(`group_test`), and the model gives the means, the fold change and its error (`fold_error`).

Cells of one population that were measured to different depths are not exchangeable, neither in counts nor in what an
encoder sees. So both groups are given the same library sizes first (`matched_sizes`), and then the test is exact.

Shape letters: n cells of both groups, b of them, g genes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import false_discovery_control, norm

from scldm.api.analysis.expression import LIBRARY, decoded_tiles
from scldm.api.analysis.fold_error import squared_distance
from scldm.api.analysis.group_test import FoldChange, GroupSums, draw_groupings, of_given, p_values
from scldm.api.analysis.matched_sizes import matched_sizes, thinned
from scldm.api.arguments import Arguments
from scldm.checkpoints.native import LoadedVAE
from scldm.data.align import AlignedCells
from scldm.data.class_names import class_name, class_names
from scldm.data.vocabulary import Vocabulary
from scldm.text import did_you_mean

EVIDENCE, SIZES = ("counts", "denoised"), ("matched", "own")
CHUNK = 256  # cells
FEWEST = 3  # cells of a group
LEVEL = 0.95  # of intervals
THINNING, GROUPING = 31, 32  # streams of randomness


@dataclass(frozen=True)
class Comparison:
    """Which cells are compared, and how."""

    first: np.ndarray  # (cells of the AnnData,) bool
    second: np.ndarray
    evidence: str
    library_sizes: str
    delta: float
    n_permutations: int
    seed: int


def read_comparison(
    given: Arguments, adata: Any, groupby: Any, group1: Any, group2: Any, *, evidence: Any, library_sizes: Any,
    delta: Any, n_permutations: Any, seed: Any,
) -> Comparison:  # fmt: skip
    """Return the comparison that is asked for.

    Args:
        given: Arguments of the call, with the problems of those that were checked before.

    Raises:
        ArgumentError: An argument cannot be used; all problems are listed.
    """
    given.one_of("evidence", evidence, EVIDENCE)
    given.one_of("library_sizes", library_sizes, SIZES)
    delta = given.number("delta", delta, within=(0.0, 100.0))
    n_permutations = given.whole("n_permutations", n_permutations, least=99, most=100_000)
    seed = given.seed(seed)
    given.text("groupby", groupby)
    obs = adata.obs if isinstance(adata, anndata.AnnData) else None
    first = second = np.zeros(0, dtype=bool)
    if groupby is None or (isinstance(groupby, str) and obs is not None and groupby not in obs):
        known = [] if obs is None else list(map(str, obs.columns))
        hint = did_you_mean(str(groupby), known) or f"obs has {', '.join(known) or 'no columns'}"
        given.problems.append(f"groupby must be a column of obs; got {groupby!r} ({hint})")
    elif obs is not None and isinstance(groupby, str):
        classes = np.array(class_names(obs[groupby]), dtype=object)
        first = _members(given, "group1", group1, classes)
        second = ~first & (classes != None) if group2 is None else _members(given, "group2", group2, classes)  # noqa: E711
        if both := int((first & second).sum()):
            given.problems.append(f"group1 and group2 share {both:,} cells; give each cell one group")
        for name, members in (("group1", first), ("group2", second)):
            if members.sum() < FEWEST:
                given.problems.append(f"{name} has {int(members.sum())} cells; a comparison needs at least {FEWEST}")
    given.raise_problems()
    return Comparison(first, second, str(evidence), str(library_sizes), delta, n_permutations, seed)


def _members(given: Arguments, argument: str, group: Any, classes: np.ndarray) -> np.ndarray:
    """Return which cells are in a group, a class or a list of classes."""
    names = [class_name(x) for x in (group if isinstance(group, (list, tuple, set)) else [group])]
    known = sorted({x for x in classes if x is not None})
    for name in names:
        if name not in known:
            listed = f"known: {', '.join(known[:8])}" + (", …" if len(known) > 8 else "")
            hint = did_you_mean(str(name), known) or listed
            given.problems.append(f"{argument} must be classes of groupby; no cell has {name!r} ({hint})")
    return np.isin(classes.astype(str), [str(x) for x in names]) & (classes != None)  # noqa: E711


def compare_cells(
    adata: anndata.AnnData, cells: AlignedCells, first: np.ndarray, comparison: Comparison, *, vae: LoadedVAE
) -> pd.DataFrame:
    """Return the table of two groups of real cells.

    Args:
        adata: The cells of both groups.
        cells: Their counts over the genes of the model.
        first: Which of them are in the first group, (n,) bool.
    """
    groupings = draw_groupings(first, comparison.n_permutations, np.random.default_rng([comparison.seed, GROUPING]))
    of_test, alone = (groupings, groupings[:1]) if comparison.evidence == "counts" else (groupings[:1], groupings)
    sizes = np.asarray(cells.counts.sum(1), dtype=np.float64).ravel()
    kept, seen = sizes, cells
    if comparison.library_sizes == "matched":
        kept = matched_sizes(sizes, first).astype(np.float64)
        thin = thinned(cells.counts, kept, np.random.default_rng([comparison.seed, THINNING]))
        seen = AlignedCells(thin, cells.n_missing, cells.n_extra)
    counts = count_sums(seen.counts, kept, of_test)
    denoised = GroupSums(alone, cells.counts.shape[1], weighted=False)
    start = 0
    for mu in _chunks(mu for _, mu in decoded_tiles(vae, seen, adata, LIBRARY)):
        denoised.add(start, mu)
        start += len(mu)
    own, model = of_given(count_sums(cells.counts, sizes, first[None])), of_given(denoised)
    error = squared_distance(model.log2, own.log2, (model.mean1 + model.mean2) / 2)
    p = p_values(counts if comparison.evidence == "counts" else denoised)
    about = {"n1": int(first.sum()), "n2": int((~first).sum()), "molecules_kept": float(kept.sum() / sizes.sum()),
             "evidence": comparison.evidence, "library_sizes": comparison.library_sizes,
             "n_permutations": comparison.n_permutations}  # fmt: skip
    return de_table(vae.vocabulary, model, own, error, p, comparison.delta, about)


def count_sums(counts: sp.csr_matrix, sizes: np.ndarray, groupings: np.ndarray) -> GroupSums:
    """Return the sums of counts per 10,000: a group's mean is all its molecules of a gene over all its molecules."""
    sums = GroupSums(groupings, counts.shape[1], weighted=True)
    for start in range(0, counts.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        sums.add(start, counts[rows].toarray() * LIBRARY, sizes[rows])
    return sums


def _chunks(tiles: Any) -> Any:
    """Yield arrays of at least CHUNK rows, joined from smaller ones; the last may be smaller."""
    waiting: list[np.ndarray] = []
    for tile in tiles:
        waiting.append(tile)
        if sum(map(len, waiting)) >= CHUNK:
            yield np.concatenate(waiting).astype(np.float64)
            waiting = []
    if waiting:
        yield np.concatenate(waiting).astype(np.float64)


def de_table(
    vocabulary: Vocabulary, model: FoldChange, own: FoldChange, error: np.ndarray, p: np.ndarray, delta: float,
    about: Mapping[str, Any],
) -> pd.DataFrame:  # fmt: skip
    """Return the table of a comparison, genes of small p-values first.

    Args:
        model: Means by the model.
        own: Means of the genes' own counts.
        error: Squared error of the model's log2 fold changes, (g,).
        p: P-values, (g,).
    """
    change, se = model.log2, np.sqrt(np.maximum(error, 1e-300))
    half = norm.ppf((1 + LEVEL) / 2) * se
    table = pd.DataFrame(
        {
            "gene": vocabulary.feature_names, "mean1": model.mean1, "mean2": model.mean2,
            "log2_fold_change": change, "se": se, "low": change - half, "high": change + half,
            "counts_log2_fold_change": own.log2, "p_value": p, "p_adjusted": false_discovery_control(p),
            "probability": norm.sf((delta - change) / se) + norm.cdf((-delta - change) / se),
        },
        index=pd.Index(vocabulary.feature_ids, name="feature_id"),
    )  # fmt: skip
    table = table.iloc[np.lexsort((-abs(change), p))]
    table.attrs["scldm"] = {"delta": delta, **about}
    return table
