"""Differential expression between two conditions, by generated populations.

The number of generated cells is arbitrary, so that it must not decide what is significant: with enough cells any two
conditions differ. What is known of the conditions comes from real cells, and from them comes the error: that of a fold
change which may follow the noise of the real cells whole (`fold_error`), A + v. It holds the noise of a finite number
of generated cells too, which is in A.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy.stats import norm

from scldm.api.analysis.differential import Comparison, count_sums, de_table
from scldm.api.analysis.expression import LIBRARY, decoded_latents
from scldm.api.analysis.fold_error import squared_distance
from scldm.api.analysis.group_test import FoldChange, of_given
from scldm.api.arguments import Arguments
from scldm.api.parts import LATENTS
from scldm.checkpoints.native import LoadedVAE
from scldm.data.align import AlignedCells, class_ids
from scldm.data.vocabulary import Vocabulary

CONDITIONS = 33  # stream of randomness


def read_generated(given: Arguments, groupby: Any, n: Any, vocabulary: Vocabulary) -> int:
    """Return the cells to generate of each group; problems are added to `given`."""
    labels = [x.name for x in vocabulary.labels]
    if groupby not in labels:
        given.problems.append(
            f"groupby must be a label of the model for method='generated' ({', '.join(labels) or 'it has none'}); got "
            f"{groupby!r}. method='posterior' takes any column of obs"
        )
    return given.whole("n", n, least=2)


def compare_generated(
    adata: anndata.AnnData, cells: AlignedCells, first: np.ndarray, comparison: Comparison, n: int, *, vae: LoadedVAE,
    generate: Callable[[pd.DataFrame, int], anndata.AnnData],
) -> pd.DataFrame:  # fmt: skip
    """Return the table of two generated populations.

    Args:
        adata: Real cells of both groups, whose labels the generated cells have, in the same shares.
        cells: Their counts over the genes of the model.
        first: Which of them are in the first group, (n,) bool.
        n: Cells to generate of each group.
        generate: Makes cells of a table of conditions from a seed.
    """
    ids, rng = class_ids(adata, vae.vocabulary), np.random.default_rng([comparison.seed, CONDITIONS])
    sizes = np.asarray(cells.counts.sum(1), dtype=np.float64).ravel()
    moments = []
    for k, members in enumerate((first, ~first)):
        rows = rng.choice(np.flatnonzero(members), n)
        made = generate(_conditions(ids, rows, vae.vocabulary), (comparison.seed + k) % 2**64)
        moments.append(_moments(vae, made.obsm[LATENTS]))
    (mean1, variance1), (mean2, variance2) = moments
    model = FoldChange(mean1, mean2, variance1, variance2)
    own = of_given(count_sums(cells.counts, sizes, first[None]))
    error = squared_distance(model.log2, own.log2, (mean1 + mean2) / 2) + own.variance
    p = 2 * norm.sf(abs(model.log2) / np.sqrt(np.maximum(error, 1e-300)))
    about = {"n1": int(first.sum()), "n2": int((~first).sum()), "n_generated": n, "evidence": "generated"}
    return de_table(vae.vocabulary, model, own, error, p, comparison.delta, about)


def _conditions(ids: Mapping[str, np.ndarray], rows: np.ndarray, vocabulary: Vocabulary) -> pd.DataFrame:
    """Return a table with the labels of some cells, one row for each combination."""
    table = pd.DataFrame({x.name: x.decode(ids[x.name][rows].tolist()) for x in vocabulary.labels})
    names = list(table.columns)
    return table.groupby(names, dropna=False, sort=True).size().rename("n_cells").reset_index()


def _moments(vae: LoadedVAE, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of the decoder's means at 10,000 molecules, and its variance as an estimate, (g,) each."""
    total, squares = np.zeros(vae.vocabulary.n_genes), np.zeros(vae.vocabulary.n_genes)
    for mu in decoded_latents(vae, latents, LIBRARY):
        total += mu.sum(0, dtype=np.float64)
        squares += (mu.astype(np.float64) ** 2).sum(0)
    n = len(latents)
    mean = total / n
    return mean, np.maximum(squares / n - mean**2, 0.0) / (n - 1)
