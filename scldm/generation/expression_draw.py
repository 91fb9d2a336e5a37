"""Log-normalised expression from a Gaussian head: the mean of log1p of counts per 10,000, or Normal(mu, 1) as upstream
draws it.

A drawn value is a function of (seed, stream, cell id, gene id, mu). Values are no counts: they are fractional, every
gene has one, and drawn ones of unexpressed genes scatter around zero, below it too. Cells that hold such values say so
in `uns["scldm"]["scale"]`, so that nothing that needs counts takes them for counts.

Shape letters: b cells, g genes, p genes that are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from scldm.data.cell_counts import LOG1P_CP10K, SCALE
from scldm.generation.counter_random import normals
from scldm.generation.request import Request, Settings

EXPRESSION = "expression"  # in uns["scldm"]: mean or draw


def draw_expression(
    mu: np.ndarray, cell_ids: Sequence[int] | np.ndarray, *, seed: int, stream: int, genes: np.ndarray | None = None
) -> sp.csr_matrix:
    """Draw the expression of b cells, CSR float32 with every value stored, (b, p); column j is gene `genes[j]`.

    Args:
        mu: Means of log1p(counts per 10,000), (b, g) float32.
        cell_ids: Ids that the cells' counters use, (b,), >= 0.
        genes: Ids of the genes to draw, increasing; None: all.
    """
    values = mu.astype(np.float32) + normals(cell_ids, mu.shape[1], seed=seed, stream=stream)
    return stored_whole(values if genes is None else values[:, genes])


def stored_whole(values: np.ndarray) -> sp.csr_matrix:
    """Return values (b, p) as CSR float32 with every value stored, zeros too."""
    b, p = values.shape
    values = values.astype(np.float32, copy=False)
    return sp.csr_matrix((values.ravel(), np.tile(np.arange(p, dtype=np.int32), b), np.arange(b + 1) * p), shape=(b, p))


def scale_of(head: str, expression: str = "draw") -> dict[str, str]:
    """Return the entries of uns["scldm"] for cells made by a head: the scale, and whether values are means or draws.

    Nothing for counts.
    """
    return {SCALE: LOG1P_CP10K, EXPRESSION: expression} if head == "gaussian" else {}


def expression_setting_problem(expression: str) -> str | None:
    """Return what is wrong with sampler.expression where counts are drawn."""
    if expression == "mean":
        return None
    return f"sampler.expression ({expression}): the VAE draws counts, and only a gaussian head has it; leave it out"


def expression_problems(
    request: Request, settings: Settings, *, temperature: float, sizes_of: str | None = None
) -> list[str]:
    """Return the settings of a request that only counts have, and that a Gaussian head would ignore.

    Args:
        sizes_of: Place of other statistics of library sizes than the model's, if the request names one.
    """
    why = "the VAE has a gaussian head, which draws log1p CP10k values and no counts: leave it out"
    problems = []
    if not isinstance(settings.library_size, str):
        problems.append(f"library_size ({settings.library_size:g}): {why}")
    if sizes_of is not None:
        problems.append(f"library_size of {sizes_of}: {why}")
    if rows := [i + 1 for i, row in enumerate(request.rows) if row.library_size is not None]:
        problems.append(f"library_size in row {rows[0]} of the conditions: {why}")
    if temperature != 1.0:
        problems.append(f"temperature ({temperature:g}): {why}")
    return problems
