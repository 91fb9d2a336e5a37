"""Softmax-weighted sums over the entries of each cell, in plain torch.

Shape letters: b cells, n entries of all cells, m queries, h heads, c channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pool_cells(logits: Tensor, values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Pool cell by cell: (b, h, m, c).

    Args:
        logits: (n, h, m).
        values: (n, h, c).
        lengths: Entries of each cell; they sum to n.
    """
    require_tokens(lengths)
    return torch.stack(
        [
            of_cell.permute(1, 2, 0).softmax(-1) @ cell_values.transpose(0, 1)
            for of_cell, cell_values in zip(logits.split(lengths), values.split(lengths), strict=True)
        ]
    )


def pool_padded(logits: Tensor, values: Tensor, lengths: Tensor, cell_index: Tensor) -> Tensor:
    """Pool in a few large operations, padded to the longest cell, (b, h, m, c): for accelerators."""
    shortest, longest = torch.stack(lengths.aminmax()).tolist()  # the one host sync
    if shortest < 1:
        require_tokens(lengths.tolist())
    n_cells = len(lengths)
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(cell_index), device=lengths.device) - starts[cell_index]
    padded = logits.new_full((n_cells, longest, *logits.shape[1:]), float("-inf"))
    padded[cell_index, place] = logits
    padded_values = values.new_zeros(n_cells, longest, *values.shape[1:])
    padded_values[cell_index, place] = values
    return torch.einsum("bnhm,bnhc->bhmc", padded.softmax(1), padded_values)


def require_tokens(lengths: Sequence[int]) -> None:
    """Raise ValueError if a cell has no tokens: a softmax over nothing is not defined."""
    if empty := [i for i, n in enumerate(lengths) if n < 1]:
        raise ValueError(f"cells {empty[:5]} of the batch have no tokens (no expressed genes): leave them out")
