"""Softmax-weighted sums over the entries of each cell, in plain torch.

Shape letters: b cells, n entries of all cells, s entries of the cell with the most, m queries, h heads, c channels per
head, c' channels of keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scldm.data.batch import CellBatch, require_tokens

FLASH_WIDTH = 256  # widest heads that FlashAttention takes


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


def pool_packed(q: Tensor, k: Tensor, v: Tensor, cells: CellBatch) -> Tensor:
    """Pool as one standard attention, of the same queries over the entries of each cell, (b, h, m, c).

    In half precision FlashAttention reads the entries as they are packed. Otherwise they are padded to the cell with
    the most, for `scaled_dot_product_attention`. Nothing of size n h m exists either way.

    Args:
        q: Queries with the scale of the logits in them, (h, m, c').
        k: (n, h, c').
        v: (n, h, c), c <= c'.
        cells: What the entries belong to.
    """
    b, longest = cells.n_cells, cells.longest
    if longest is None:  # waits for the device
        require_tokens(cells.lengths.tolist())
        longest = int(cells.lengths.max())
    if takes_packed(k):
        return _pool_flash(q, k, v, cells.offsets, longest)
    place = torch.arange(len(k), device=k.device) - cells.offsets[cells.cell_index]
    keys, values = (_padded(x, cells.cell_index, place, (b, longest)) for x in (k, v))  # (b, h, s, …)
    known = torch.arange(longest, device=k.device) < cells.lengths[:, None]  # (b, s)
    return F.scaled_dot_product_attention(
        q.expand(b, -1, -1, -1), keys, values, attn_mask=known[:, None, None], scale=1.0
    )  # fmt: skip


def takes_packed(k: Tensor) -> bool:
    """Return whether FlashAttention takes keys (n, h, c'): half precision, heads of at most 256, an Ampere or newer."""
    half = k.dtype in (torch.bfloat16, torch.float16)
    return half and k.is_cuda and k.shape[-1] <= FLASH_WIDTH and torch.cuda.get_device_capability(k.device) >= (8, 0)


def _padded(x: Tensor, cell_index: Tensor, place: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return (n, h, c) as (b, h, s, c), with zeros where a cell has no entry."""
    return x.new_zeros(*shape, *x.shape[1:]).index_put((cell_index, place), x).transpose(1, 2)


def _pool_flash(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # seconds to import

    (_, m, width), b, c = q.shape, len(offsets) - 1, v.shape[-1]
    queries = q.transpose(0, 1).repeat(b, 1, 1)  # (b m, h, c')
    of_queries = torch.arange(b + 1, device=q.device, dtype=torch.int32) * m
    values = F.pad(v, (0, width - c))  # of the same width as keys
    pooled = varlen_attn(queries, k, values, of_queries, offsets.int(), m, longest, scale=1.0)
    assert isinstance(pooled, Tensor)
    return pooled[..., :c].unflatten(0, (b, m)).transpose(1, 2)
