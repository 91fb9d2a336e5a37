"""Encode a set of gene counts as a few latent tokens.

One cross-attention block pools the expressed genes into m learned queries, self-attention blocks mix them, a linear
layer projects them to the latent width, and a LayerNorm without affine parameters ends it. The latent is deterministic.

Shape letters: b cells, n expressed entries of all cells, m latent tokens, e latent width, d model width, h heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scldm.data.batch import CellBatch
from scldm.nn.attention_tables import Attention
from scldm.nn.config import VAEConfig
from scldm.nn.inputs import Tokens, count_input
from scldm.nn.kernels.fused_pooling import PoolingEntries
from scldm.nn.kernels.pooling import pool_cells, pool_packed
from scldm.nn.kernels.precision import Precision, in_own_precision, rounds_products
from scldm.nn.layers import SelfAttentionBlock, SwiGLU, merge_heads, split_heads


class Encoder(nn.Module):
    """Maps cells to latents; owns all parameters but the gene embedding."""

    precision: Precision | None = None

    def __init__(self, config: VAEConfig):
        super().__init__()
        d, self.n_heads = config.d_model, config.n_heads_cross
        self.eps = config.eps
        self.plain = False  # True: autograd through every entry, the reference of the hand-written pooling
        self.packed: bool | None = None  # True: one standard attention; None: on an accelerator
        self.genes_seq_len = config.genes_seq_len
        # Upstream's pad row, which its attention does not mask.
        self.pad = None if config.genes_seq_len is None else nn.Parameter(torch.zeros(d))
        self.queries = nn.Parameter(torch.randn(config.n_latent_tokens, d) * d**-0.5)
        self.norm_query = nn.LayerNorm(d, eps=config.eps)
        self.norm_context = nn.LayerNorm(d, eps=config.eps)
        self.query = nn.Linear(d, d, bias=config.bias)
        self.key_value = nn.Linear(d, 2 * d, bias=config.bias)
        self.out = nn.Linear(d, d, bias=config.bias)
        self.norm_mlp = nn.LayerNorm(d, eps=config.eps)
        self.mlp = SwiGLU(d, config.multiple_of)
        self.counts = count_input(config.input, d_model=d, n_heads=self.n_heads, n_queries=config.n_latent_tokens)
        self.positions = (
            nn.Parameter(torch.zeros(1, config.n_latent_tokens, d), requires_grad=False)
            if config.zero_positions
            else None
        )
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(d, config.n_heads, bias=config.bias, multiple_of=config.multiple_of, eps=config.eps)
            for _ in range(config.n_layers)
        )
        self.to_latent = nn.Linear(d, config.latent_width, bias=config.bias)

    @in_own_precision
    def forward(self, cells: CellBatch, embedding: Tensor) -> Tensor:
        """Return latents (b, m, e) of cells, given the gene embeddings (g, d)."""
        x = self.queries + self.out(merge_heads(self.pool(cells, embedding)))  # (b, m, d)
        x = x + self.mlp(self.norm_mlp(x))
        if self.positions is not None:
            x = x + self.positions
        for block in self.blocks:
            x = block(x)
        z = self.to_latent(x)
        return F.layer_norm(z, z.shape[-1:], eps=self.eps)

    def pool(self, cells: CellBatch, embedding: Tensor) -> Tensor:
        q = split_heads(self.query(self.norm_query(self.queries)), self.n_heads)  # (h, m, c)
        attention = Attention(q, self.norm_context, self.key_value)
        packed = cells.gene_ids.is_cuda if self.packed is None else self.packed
        if packed and self.pad is None:
            tokens = Tokens(embedding, cells.counts.to(embedding.dtype), PoolingEntries(cells.gene_ids, ()))
            return pool_packed(*self.counts.packed(attention, tokens), cells)
        tokens = self._tokens(cells, embedding)
        # The hand-written pooling knows nothing of autocast: in bf16 the plain form is correct, and slow on a CPU.
        if self.plain or cells.gene_ids.is_cuda or rounds_products(embedding):
            logits, values = self.counts.entries(attention, tokens)
            return pool_cells(logits.to(embedding.dtype), values, tokens.entries.sizes)  # the softmax is fp32
        return self.counts.pool(attention, tokens)

    def _tokens(self, cells: CellBatch, embedding: Tensor) -> Tokens:
        if not cells.gene_ids.is_cuda and len(cells.gene_ids) and int(cells.gene_ids.max()) >= len(embedding):
            raise ValueError(
                f"gene id {int(cells.gene_ids.max())} is outside the model's {len(embedding)} genes: the cells are of "
                "another vocabulary"
            )
        ids, counts, sizes = cells.gene_ids, cells.counts.to(embedding.dtype), cells.lengths.tolist()
        if len(ids) < len(embedding):  # few cells: a table of their genes only
            genes, ids = torch.unique(ids, return_inverse=True)
            embedding = embedding[genes]
        if self.pad is None:
            return Tokens(embedding, counts, PoolingEntries(ids, sizes))
        embedding = torch.cat([embedding, self.pad[None]])
        assert self.genes_seq_len is not None
        return with_pads(embedding, cells, ids, counts, genes_seq_len=self.genes_seq_len)


def with_pads(embedding: Tensor, cells: CellBatch, ids: Tensor, counts: Tensor, *, genes_seq_len: int) -> Tokens:
    """Add one entry for each cell that upstream would pad.

    It is the last row of the embedding with count 0, and stands for all of the cell's pads, which are identical and not
    masked.
    """
    lengths = cells.lengths
    longest = int(lengths.max())
    if longest > genes_seq_len:
        raise ValueError(f"a cell has {longest} tokens, more than genes_seq_len ({genes_seq_len})")
    n_pads = genes_seq_len - lengths
    padded = (n_pads > 0).long()
    sizes = lengths + padded
    before = padded.cumsum(0) - padded  # pads of earlier cells
    place = torch.arange(len(ids), device=ids.device) + before[cells.cell_index]
    total, of_pads = int(sizes.sum()), sizes.cumsum(0)[padded.bool()] - 1
    new_ids = ids.new_full((total,), len(embedding) - 1).index_copy(0, place, ids)
    new_counts = counts.new_zeros(total).index_copy(0, place, counts)
    log_number = counts.new_zeros(total).index_copy(0, of_pads, n_pads[padded.bool()].to(counts.dtype).log())
    return Tokens(embedding, new_counts, PoolingEntries(new_ids, sizes.tolist(), log_number=log_number))
