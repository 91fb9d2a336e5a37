"""Inputs of the encoder: how a count enters it. Upstream's seven, and the count-aware one of new models.

Every input implements the attention over a cell's entries three times. `entries` is the plain form: token, LayerNorm,
keys and values, for each entry on its own. `packed` gives queries, keys and values of one standard attention, which is
what accelerators are good at. `pool` is the fast form on a CPU, over tables with one row per gene and one per distinct
count; it relies on the token being linear in a gene's part a_g and a count's part u_c:

    multiplicative   token = f(c) E_g            LayerNorm leaves s (E_g - mean) w + b, with the scalar
                                                 s = f / sqrt(f^2 var(E_g) + eps)
    additive         token = a_g + u_c           s (a_g - mean + u_c - mean) w + b, s from the variance of the sum
    count-aware      token = E_g                 and a learned function of the count adds to the logit and scales the
                                                 value, channel by channel

Shape letters: n entries, g genes, u distinct counts or hidden units, m queries, d model width, h heads, c channels per
head, c' channels of keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scldm.nn.attention_tables import Attention
from scldm.nn.kernels.fused_pooling import PoolingEntries, pool_tables

N_BINS, BIN_HIDDEN, COUNT_HIDDEN = 10, 64, 32  # the first two are upstream's
COUNT_STD = 0.1  # initial standard deviation of the last layer's weights, count-aware


@dataclass(frozen=True)
class Tokens:
    """Entries of all cells and the genes they point to."""

    embedding: Tensor  # (g, d)
    counts: Tensor  # (n,)
    entries: PoolingEntries


class CountInput(nn.Module, ABC):
    """Base class of inputs: a token for each entry, and the attention over a cell's tokens."""

    @abstractmethod
    def token(self, embedding: Tensor, counts: Tensor) -> Tensor:
        """Return the input of the LayerNorm, (n, d), for gene embeddings (n, d) and counts (n,)."""

    def entries(self, attention: Attention, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return logits (n, h, m) and values (n, h, c), entry by entry: the reference of `pool`."""
        logits, values = attention(self.token(tokens.embedding[tokens.entries.genes], tokens.counts))
        if tokens.entries.log_number is not None:
            logits = logits + tokens.entries.log_number[:, None, None]
        return logits, values

    def packed(self, attention: Attention, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (h, m, c'), keys (n, h, c') and values (n, h, c) of a standard attention with scale 1."""
        k, v = attention.keys_values(self.token(tokens.embedding[tokens.entries.genes], tokens.counts)).unbind(1)
        return attention.scaled_queries, k, v

    @abstractmethod
    def pool(self, attention: Attention, tokens: Tokens) -> Tensor:
        """Return the softmax-weighted values of each cell, (b, h, m, c)."""


class Multiplicative(CountInput):
    """Multiplies the gene embedding by a function of the count.

    Through the LayerNorm only the sign and, by epsilon, a trace of the factor survive: such an encoder sees which genes
    are expressed and hardly how much (docs/design.md).
    """

    def __init__(self, mode: str):
        super().__init__()
        self.mode = mode

    def factor(self, counts: Tensor) -> Tensor:
        """Return the factor of each count, (n,)."""
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

    def token(self, embedding: Tensor, counts: Tensor) -> Tensor:
        return embedding * self.factor(counts)[:, None]

    def pool(self, attention: Attention, tokens: Tokens) -> Tensor:
        centred = tokens.embedding - tokens.embedding.mean(-1, keepdim=True)
        variance = centred.square().mean(-1)[tokens.entries.genes]
        factor = self.factor(tokens.counts)
        scale = factor / (factor.square() * variance + attention.eps).sqrt()
        pooled = pool_tables(attention.table(centred), tokens.entries, attention.heads, scale=scale)
        return pooled + attention.constant()[:, None]


class Additive(CountInput):
    """Adds a part that depends on the gene and a part that depends on the count."""

    def gene_part(self, embedding: Tensor) -> Tensor:
        """Return the genes' part, (g, d), of embeddings (g, d)."""
        return embedding

    @abstractmethod
    def count_part(self, counts: Tensor) -> Tensor:
        """Return the counts' part, (u, d), of counts (u,)."""

    def token(self, embedding: Tensor, counts: Tensor) -> Tensor:
        return self.gene_part(embedding) + self.count_part(counts)

    def pool(self, attention: Attention, tokens: Tokens) -> Tensor:
        distinct, kinds = torch.unique(tokens.counts, return_inverse=True)
        genes, counts = self.gene_part(tokens.embedding), self.count_part(distinct)
        genes, counts = (x - x.mean(-1, keepdim=True) for x in (genes, counts))
        spread = genes.index_select(0, tokens.entries.genes) + counts.index_select(0, kinds)  # (n, d)
        scale = (spread.square().mean(-1) + attention.eps).rsqrt()
        pooled = pool_tables(
            attention.table(genes),
            replace(tokens.entries, kinds=kinds),
            attention.heads,
            scale=scale,
            added=attention.table(counts),
        )
        return pooled + attention.constant()[:, None]


class Projected(Additive):
    """Implements upstream's `proj`: the raw count times a vector, plus a vector."""

    def __init__(self, d_model: int):
        super().__init__()
        self.count_embedding = nn.Linear(1, d_model)

    def count_part(self, counts: Tensor) -> Tensor:
        return self.count_embedding(counts[:, None])


class Mixed(Additive):
    """Implements upstream's `projconcat`: a linear layer on the embedding and d copies of log1p(count)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.mix = nn.Linear(2 * d_model, d_model)

    def gene_part(self, embedding: Tensor) -> Tensor:
        return nn.functional.linear(embedding, self.mix.weight[:, : embedding.shape[1]], self.mix.bias)

    def count_part(self, counts: Tensor) -> Tensor:
        return counts.log1p()[:, None] * self.mix.weight[:, self.mix.weight.shape[0] :].sum(1)


class SoftBinned(Additive):
    """Implements upstream's `softbin`: a mixture of bin vectors, weighted by a small network of the raw count."""

    def __init__(self, d_model: int):
        super().__init__()
        self.mlp_count = nn.Sequential(nn.Linear(1, BIN_HIDDEN), nn.SiLU(), nn.Linear(BIN_HIDDEN, N_BINS))
        self.bin_embeddings = nn.Parameter(torch.randn(N_BINS, d_model))

    def count_part(self, counts: Tensor) -> Tensor:
        return self.mlp_count(counts[:, None]).softmax(-1) @ self.bin_embeddings


class CountAware(CountInput):
    """Adds a learned function of log1p(count) to the attention logit, and scales the value by another.

    The bias is per head and query, the gain per head and channel.

    It starts as a plain set encoder with a small random dependence on the count: without any it learns more slowly
    (`benchmarks/README.md`).
    """

    def __init__(self, d_model: int, n_heads: int, n_queries: int):
        super().__init__()
        self.logits, self.shape = n_heads * n_queries, (n_heads, n_queries)
        self.mlp = nn.Sequential(nn.Linear(1, COUNT_HIDDEN), nn.SiLU(), nn.Linear(COUNT_HIDDEN, self.logits + d_model))
        nn.init.normal_(self.mlp[2].weight, std=COUNT_STD)
        nn.init.zeros_(self.mlp[2].bias)

    def token(self, embedding: Tensor, counts: Tensor) -> Tensor:
        return embedding

    def entries(self, attention: Attention, tokens: Tokens) -> tuple[Tensor, Tensor]:
        logits, values = super().entries(attention, tokens)
        bias, gain = self.mlp(tokens.counts.log1p()[:, None]).tensor_split([self.logits], dim=-1)
        return logits + bias.unflatten(-1, self.shape), values * (1 + gain.view_as(values))

    def packed(self, attention: Attention, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """See `CountInput.packed`; keys and values are computed once for each gene.

        The bias is linear in the hidden units of the count, so these are further channels of the key, and their weights
        further channels of the queries. Its constant is the same for all entries of a softmax and left out.
        """
        hidden, last = self.mlp[:2](tokens.counts.log1p()[:, None]), self.mlp[2]  # (n, u)
        of_genes = attention.keys_values(tokens.embedding)  # (g, 2, h, c)
        k, v = F.embedding(tokens.entries.genes, of_genes.flatten(1)).unflatten(1, of_genes.shape[1:]).unbind(1)
        gain = F.linear(hidden, last.weight[self.logits :], last.bias[self.logits :]).view_as(v)
        of_queries = last.weight[: self.logits].unflatten(0, self.shape)  # (h, m, u)
        q = torch.cat([attention.scaled_queries, of_queries.to(k.dtype)], dim=-1)
        return (
            q.to(k.dtype),
            torch.cat([k, hidden[:, None].expand(-1, k.shape[1], -1).to(k.dtype)], dim=-1),
            v * (1 + gain),
        )

    def pool(self, attention: Attention, tokens: Tokens) -> Tensor:
        distinct, kinds = torch.unique(tokens.counts, return_inverse=True)
        centred = tokens.embedding - tokens.embedding.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1) + attention.eps).rsqrt()
        zeros, constant = centred.new_zeros(self.logits), attention.constant().flatten()
        table = attention.table(centred) * scale[:, None] + torch.cat([zeros, constant])
        one = torch.cat([zeros, torch.ones_like(constant)])  # the gain is 1 + …
        count_table = self.mlp(distinct.log1p()[:, None]) + one
        return pool_tables(table, replace(tokens.entries, kinds=kinds), attention.heads, count_table=count_table)


def count_input(mode: str, *, d_model: int, n_heads: int, n_queries: int) -> CountInput:
    """Build the input of a configuration."""
    match mode:
        case "count_aware":
            return CountAware(d_model, n_heads, n_queries)
        case "proj":
            return Projected(d_model)
        case "projconcat":
            return Mixed(d_model)
        case "softbin":
            return SoftBinned(d_model)
    return Multiplicative(mode)
