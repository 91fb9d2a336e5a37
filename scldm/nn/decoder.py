"""From latent tokens to one logit per gene, in gene tiles.

Every gene of every cell goes through attention to the m latent tokens and a SwiGLU, so this is where the time goes.
What keeps it affordable, exactly:

* the query side (LayerNorm and projection of the gene embedding) is the same for all cells: computed once per batch;
* the head reads one or two numbers per gene, so the last matrix of the SwiGLU is folded into the head;
* genes go through in tiles and, in training, are computed again in the backward pass: nothing of size b x g x d is
  kept;
* where heads are narrow, as in small models, `scldm.nn.fused_decoder` does the same in fewer and larger products.

Shape letters: b cells, g genes, m latent tokens, e latent width, d model width, h heads, c channels per head, r
outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scldm.nn.config import VAEConfig
from scldm.nn.fused_decoder import decode_genes, folds
from scldm.nn.layers import SelfAttentionBlock, SwiGLU, merge_heads, split_heads

TILE = 512  # genes; fits the caches of a CPU core at d = 32 .. 128


class Decoder(nn.Module):
    """Latents to `n_outputs` numbers per gene; owns everything but the gene embedding."""

    def __init__(self, config: VAEConfig, *, n_outputs: int):
        super().__init__()
        d, self.n_heads = config.d_model, config.n_heads_cross
        self.eps = config.eps
        self.from_latent = nn.Linear(config.latent_width, d, bias=config.bias)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(d, config.n_heads, bias=config.bias, multiple_of=config.multiple_of, eps=config.eps)
            for _ in range(config.n_layers)
        )
        self.norm_query = nn.LayerNorm(d, eps=config.eps)
        self.norm_context = nn.LayerNorm(d, eps=config.eps)
        self.query = nn.Linear(d, d, bias=config.bias)
        self.key_value = nn.Linear(d, 2 * d, bias=config.bias)
        self.out = nn.Linear(d, d, bias=config.bias)
        self.norm_mlp = nn.LayerNorm(d, eps=config.eps)
        self.mlp = SwiGLU(d, config.multiple_of)
        self.head = nn.Linear(d, n_outputs)

    def forward(self, z: Tensor, embedding: Tensor, *, tile: int | None = None, fused: bool | None = None) -> Tensor:
        """Outputs (b, g, r).

        Args:
            z: Latents, (b, m, e).
            embedding: Embeddings of the genes asked for, (g, d).
            tile: Genes at a time; by default what fits the caches.
            fused: Whether the hand-written block computes it or the plain one; by default what is quicker. The two
                agree to rounding.
        """
        x = self.from_latent(F.layer_norm(z, z.shape[-1:], eps=self.eps))
        for block in self.blocks:
            x = block(x)
        k, v = (split_heads(y, self.n_heads) for y in self.key_value(self.norm_context(x)).chunk(2, dim=-1))
        q = self.query(self.norm_query(embedding))  # (g, d)
        if fused is None:
            fused = folds(n_heads=self.n_heads, channels=k.shape[-1], dtype=k.dtype)
        if fused:
            return decode_genes(q, embedding, k, v, block=self, eps=self.eps, tile=tile)
        tile = tile or TILE
        tiles = zip(split_heads(q, self.n_heads).split(tile, dim=1), embedding.split(tile), strict=True)
        if torch.is_grad_enabled():
            parts = [checkpoint(self._tile, q_tile, e, k, v, use_reentrant=False) for q_tile, e in tiles]
        else:
            parts = [self._tile(q_tile, e, k, v) for q_tile, e in tiles]
        return torch.cat(parts, dim=1)

    def _tile(self, q: Tensor, embedding: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(h, t, c) queries and (t, d) embeddings of t genes against (b, h, m, c) keys and values: (b, t, r)."""
        q = q.expand(len(k), *q.shape)
        x = embedding + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))  # (b, t, d)
        y = self.norm_mlp(x)
        hidden = F.silu(self.mlp.gate(y)) * self.mlp.up(y)
        return F.linear(x, self.head.weight, self.head.bias) + F.linear(hidden, self.head.weight @ self.mlp.down.weight)
