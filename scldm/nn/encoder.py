"""From a set of gene counts to a few latent tokens.

One cross-attention block pools the expressed genes into m learned queries, self-attention blocks mix them, a linear
layer brings them to the latent width, and a LayerNorm without affine ends it. The latent is deterministic.

Shape letters: b cells, n expressed entries of all cells, m latent tokens, e latent width, d model width, h heads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scldm.batch import CellBatch
from scldm.nn.config import VAEConfig
from scldm.nn.fused_pooling import Entries, Heads, pool_tables
from scldm.nn.layers import SelfAttentionBlock, SwiGLU, merge_heads, split_heads
from scldm.nn.pooling import GeneTables, PadToken, gene_tables, joint_table, pool_cells, pool_padded


class MultiplicativeCounts(nn.Module):
    """Upstream's inputs: the gene embedding times a function of the count.

    Through the LayerNorm only the sign and, by epsilon, a trace of the factor survive: such an encoder sees which genes
    are expressed and hardly how much (DESIGN 5.2).
    """

    def __init__(self, mode: str, eps: float):
        super().__init__()
        self.mode, self.eps = mode, eps

    def factor(self, counts: Tensor) -> Tensor:
        match self.mode:
            case "log1p":
                return counts.log1p()
            case "log1pzero":
                return torch.where(counts == 0, -1.0, counts.log1p())
            case "sqrt":
                return (counts + 1).sqrt()
            case "anscombe":
                return (counts + 1).sqrt().asinh()
        raise ValueError(f"unknown input mode {self.mode!r}")

    def scale(self, counts: Tensor, variance: Tensor) -> Tensor:
        """What remains of the factor behind the LayerNorm, (n,)."""
        factor = self.factor(counts)
        return factor / (factor.square() * variance + self.eps).sqrt()

    def forward(
        self, scores: Tensor, values: Tensor, variance: Tensor, constant: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        scale = self.scale(counts, variance)[:, None, None]
        return scores * scale, values * scale + constant

    def pool(
        self, table: Tensor, variance: Tensor, constant: Tensor, entries: Entries, heads: Heads, counts: Tensor
    ) -> Tensor:
        """The same, pooled: (b, h, m, c)."""
        scale = self.scale(counts, variance[entries.genes])
        return pool_tables(table, entries, heads, scale=scale) + constant[:, None]


class CountAwareLogits(nn.Module):
    """A learned function of log1p(count) adds to the attention logit and scales the value, per head and query / head.

    At the start it is the identity of a plain set encoder: no bias, gain one.
    """

    def __init__(self, n_heads: int, n_queries: int, eps: float, hidden: int = 32):
        super().__init__()
        self.eps = eps
        self.shape = (n_heads, n_queries)
        self.mlp = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, n_heads * n_queries + n_heads))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(
        self, scores: Tensor, values: Tensor, variance: Tensor, constant: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        scale = (variance + self.eps).rsqrt()[:, None, None]
        h, m = self.shape
        bias, gain = self.mlp(counts.log1p()[:, None]).split([h * m, h], dim=-1)
        return scores * scale + bias.view(-1, h, m), (values * scale + constant) * (1 + gain)[..., None]

    def pool(
        self, table: Tensor, variance: Tensor, constant: Tensor, entries: Entries, heads: Heads, counts: Tensor
    ) -> Tensor:
        """The same, pooled, (b, h, m, c): the function of the count is computed once for each distinct count."""
        distinct, kinds = torch.unique(counts, return_inverse=True)
        offset = torch.cat([table.new_zeros(heads.logits), constant.flatten()])
        one = torch.cat([table.new_zeros(heads.logits), table.new_ones(heads.n_heads)])
        table = table * (variance + self.eps).rsqrt()[:, None] + offset
        count_table = self.mlp(distinct.log1p()[:, None]) + one
        return pool_tables(table, replace(entries, kinds=kinds), heads, count_table=count_table)


class Encoder(nn.Module):
    """Cells to latents; owns everything but the gene embedding."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        d, self.n_heads = config.d_model, config.n_heads_cross
        self.eps = config.eps
        self.plain = False  # True: autograd through every entry, the reference of the hand-written pooling
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
        self.counts: nn.Module = (
            CountAwareLogits(self.n_heads, config.n_latent_tokens, config.eps)
            if config.input == "count_aware"
            else MultiplicativeCounts(config.input, config.eps)
        )
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

    def forward(self, cells: CellBatch, embedding: Tensor) -> Tensor:
        """Latents (b, m, e) of cells, given the gene embeddings (g, d)."""
        x = self.queries + self.out(merge_heads(self._pool(cells, embedding)))  # (b, m, d)
        x = x + self.mlp(self.norm_mlp(x))
        if self.positions is not None:
            x = x + self.positions
        for block in self.blocks:
            x = block(x)
        z = self.to_latent(x)
        return F.layer_norm(z, z.shape[-1:], eps=self.eps)

    def _pool(self, cells: CellBatch, embedding: Tensor) -> Tensor:
        q = split_heads(self.query(self.norm_query(self.queries)), self.n_heads)  # (h, m, c)
        ids, lengths = cells.gene_ids, cells.lengths
        if not ids.is_cuda and self.plain is False:
            return self._pool_by_tables(cells, embedding, q)
        if not ids.is_cuda:  # tables for the genes of this batch only; on an accelerator the sync would cost more
            genes, ids = torch.unique(ids, return_inverse=True)
            embedding = embedding[genes]
        if self.pad is not None:  # the last row of the tables
            embedding = torch.cat([embedding, self.pad[None]])
        tables, constant = gene_tables(
            embedding, q, norm=self.norm_context, key_value=self.key_value, n_heads=self.n_heads
        )
        logits, values = self._entries(tables, constant, ids, cells.counts.to(embedding.dtype))
        if lengths.is_cuda and self.pad is None:
            return pool_padded(logits, values, lengths, cells.cell_index)
        sizes = lengths.tolist()
        return pool_cells(logits, values, sizes, pad=self._pad_token(tables, constant, sizes))

    def _pool_by_tables(self, cells: CellBatch, embedding: Tensor, q: Tensor) -> Tensor:
        ids, counts, sizes = cells.gene_ids, cells.counts.to(embedding.dtype), cells.lengths.tolist()
        if len(ids) < len(embedding):  # few cells: a table of their genes only
            genes, ids = torch.unique(ids, return_inverse=True)
            embedding = embedding[genes]
        log_number = None
        if self.pad is not None:
            embedding = torch.cat([embedding, self.pad[None]])
            ids, counts, sizes, log_number = self._with_pads(cells, ids, counts, sizes, pad=len(embedding) - 1)
        table, variance, constant = joint_table(
            embedding, q, norm=self.norm_context, key_value=self.key_value, n_heads=self.n_heads
        )
        heads = Heads(self.n_heads, q.shape[1], q.shape[2])
        return self.counts.pool(table, variance, constant, Entries(ids, sizes, log_number=log_number), heads, counts)

    def _with_pads(
        self, cells: CellBatch, ids: Tensor, counts: Tensor, sizes: list[int], *, pad: int
    ) -> tuple[Tensor, Tensor, list[int], Tensor]:
        """One more entry for each cell that has pads: gene `pad`, count 0, standing for all of its pads."""
        numbers = self._pad_numbers(sizes)
        missing = torch.tensor(numbers)
        padded = missing > 0
        place = torch.arange(len(ids)) + (padded.cumsum(0) - padded.long())[cells.cell_index]
        new_sizes = cells.lengths + padded
        total = int(new_sizes.sum())
        new_ids = ids.new_full((total,), pad).index_copy(0, place, ids)
        new_counts = counts.new_zeros(total).index_copy(0, place, counts)
        log_number = counts.new_zeros(total)
        log_number[new_sizes.cumsum(0)[padded] - 1] = missing[padded].to(counts.dtype).log()
        return new_ids, new_counts, new_sizes.tolist(), log_number

    def _pad_numbers(self, sizes: list[int]) -> list[int]:
        assert self.genes_seq_len is not None
        longest = max(sizes)
        if longest > self.genes_seq_len:
            raise ValueError(f"a cell has {longest} tokens, more than genes_seq_len ({self.genes_seq_len})")
        return [self.genes_seq_len - n for n in sizes]

    def _entries(self, tables: GeneTables, constant: Tensor, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, h, m) and values (n, h, c) of expressed genes."""
        return self.counts(tables.scores[ids], tables.values[ids], tables.variance[ids], constant, counts)

    def _pad_token(self, tables: GeneTables, constant: Tensor, sizes: list[int]) -> PadToken | None:
        if self.pad is None:
            return None
        last = torch.tensor([len(tables.variance) - 1], device=tables.variance.device)
        logits, values = self._entries(tables, constant, last, tables.variance.new_zeros(1))
        return PadToken(logits[0], values[0], self._pad_numbers(sizes))
