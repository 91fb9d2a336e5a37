"""Decode latent tokens to a few numbers per gene, in gene tiles.

Every gene of every cell goes through attention to the m latent tokens and a SwiGLU, so this takes most of the time.
Three exact savings and one choice of kernel keep it affordable:

* the query side (LayerNorm and projection of the gene embedding) is the same for all cells: computed once per batch;
* the head reads one or two numbers per gene, so the last matrix of the SwiGLU is folded into the head;
* genes go through in tiles and, in training, are computed again in the backward pass: nothing of size b x g x d is
  kept. Tiles fit the caches of a CPU; on a GPU they are as large as its memory allows;
* if heads are narrow, as in small models, `fused_decoder` does the same in fewer and larger products on a CPU; on a
  GPU, `scldm.nn.kernels.triton_decoder` does it in one kernel, if requested.

In upstream's adaLN variant a condition of the cell modulates every norm, also the gene queries', and its Gaussian head
has a LayerNorm of its own: the first two savings do not apply then, and the plain tiles compute it.

Shape letters: b cells, g genes, t genes of a tile, m latent tokens, e latent width, d model width, h heads, c channels
per head, r outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scldm.nn.config import VAEConfig
from scldm.nn.kernels import triton_decoder
from scldm.nn.kernels.fused_decoder import decode_genes, folds
from scldm.nn.kernels.precision import Precision, in_own_precision, rounds_products, whole_products
from scldm.nn.layers import Modulation, SelfAttentionBlock, SwiGLU, adaln, gated, merge_heads, modulated, split_heads

TILE = 512  # genes; fits the caches of a CPU core at d = 32 .. 128
DEVICE_ROWS = 131_072  # cells x genes of a tile on an accelerator: few launches of large products
DEVICE_SHARE = 0.05  # of its memory, at most, for the tensors of a tile
ROW_BYTES = 56  # of a row, for each channel: residual, norm and attention, three of the SwiGLU's width, 4 bytes each


def device_tile(n_cells: int, *, d_model: int, memory: int) -> int:
    """Return the genes of a tile on an accelerator, for the cells of a batch.

    Args:
        memory: Of the device, in bytes.
    """
    rows = min(DEVICE_ROWS, int(DEVICE_SHARE * memory) // (ROW_BYTES * d_model))
    return max(TILE, rows // max(n_cells, 1))


@dataclass(frozen=True)
class Context:
    """Input of every tile besides its genes: keys and values of the latent tokens, and modulations."""

    k: Tensor  # (b, h, m, c)
    v: Tensor  # (b, h, m, c)
    attention: Modulation | None = None  # each (b, 1, d)
    mlp: Modulation | None = None
    queries: Modulation | None = None


class Decoder(nn.Module):
    """Maps latents to `n_outputs` numbers per gene; owns all parameters but the gene embedding."""

    precision: Precision | None = None

    def __init__(self, config: VAEConfig, *, n_outputs: int):
        super().__init__()
        head_eps, config = config.head_eps, config.for_decoder()
        d, self.n_heads = config.d_model, config.n_heads_cross
        self.eps = config.eps
        # Opt-in: no GPU has timed the Triton kernels yet, nor run tests/gpu.
        self.kernels: Literal["torch", "triton"] = "torch"
        self.from_latent = nn.Linear(config.latent_width, d, bias=config.bias)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(
                d,
                config.n_heads,
                bias=config.bias,
                multiple_of=config.multiple_of,
                eps=config.eps,
                adaln_condition=config.adaln,
            )
            for _ in range(config.n_layers)
        )
        self.norm_query = nn.LayerNorm(d, eps=config.eps)
        self.norm_context = nn.LayerNorm(d, eps=config.eps)
        self.query = nn.Linear(d, d, bias=config.bias)
        self.key_value = nn.Linear(d, 2 * d, bias=config.bias)
        self.out = nn.Linear(d, d, bias=config.bias)
        self.norm_mlp = nn.LayerNorm(d, eps=config.eps)
        self.mlp = SwiGLU(d, config.multiple_of)
        self.adaln = adaln(d, 6) if config.adaln else None
        self.adaln_query = adaln(d, 2) if config.adaln else None
        self.head_norm = nn.LayerNorm(d, eps=head_eps) if config.head == "gaussian" else None
        self.head = nn.Linear(d, n_outputs)

    @in_own_precision
    def forward(
        self,
        z: Tensor,
        embedding: Tensor,
        *,
        condition: Tensor | None = None,
        tile: int | None = None,
        fused: bool | None = None,
    ) -> Tensor:
        """Return the outputs (b, g, r).

        Args:
            z: Latents, (b, m, e).
            embedding: Embeddings of the requested genes, (g, d), or (b, g, d) if every cell has genes of its own.
            condition: Condition that modulates the norms of an adaLN decoder, (b, d).
            tile: Genes per tile; by default as many as fit the caches.
            fused: Whether to use a hand-written block (Triton's if `kernels` is "triton") instead of the plain one; by
                default the faster one. They agree to rounding.
        """
        if (condition is None) != (self.adaln is None):
            need = "needs" if condition is None else "takes no"
            raise ValueError(f"this decoder (adaln={self.adaln is not None}) {need} condition (b, d)")
        c = None if condition is None else condition[:, None]  # (b, 1, d)
        x = self.from_latent(F.layer_norm(z, z.shape[-1:], eps=self.eps)).to(z.dtype)  # the residual stream stays fp32
        for block in self.blocks:
            x = block(x, c)
        context = self._context(x, c)
        possible = c is None and self.head_norm is None and embedding.ndim == 2
        if self.kernels == "torch" and rounds_products(z):  # the block knows nothing of autocast
            possible = False
        if fused is None:
            narrow = folds(n_heads=self.n_heads, channels=context.k.shape[-1], dtype=z.dtype)
            fused = self.kernels == "triton" or (possible and narrow and not z.is_cuda)
        if fused:
            if not possible:
                raise ValueError(
                    "fused: not for an adaLN decoder, a Gaussian head, genes that differ between cells, or in bf16"
                )
            q = self.query(self.norm_query(embedding))  # (g, d)
            decode = triton_decoder.decode_genes if self.kernels == "triton" else decode_genes
            return decode(q, embedding, context.k, context.v, block=self, eps=self.eps, tile=tile)
        return self._plain(embedding, context, tile or self.tile_of(z))

    def tile_of(self, z: Tensor) -> int:
        """Return how many genes of cells with latents z (b, m, e) go through together."""
        if not z.is_cuda:
            return TILE
        memory = torch.cuda.get_device_properties(z.device).total_memory
        return device_tile(len(z), d_model=self.out.in_features, memory=memory)

    def _context(self, x: Tensor, c: Tensor | None) -> Context:
        attention = mlp = queries = None
        if c is not None:
            assert self.adaln is not None
            assert self.adaln_query is not None
            scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = self.adaln(c).chunk(6, dim=-1)
            attention, mlp = Modulation(scale_a, shift_a, gate_a), Modulation(scale_m, shift_m, gate_m)
            queries = Modulation(*self.adaln_query(c).chunk(2, dim=-1))
        keys_values = self.key_value(modulated(self.norm_context(x), attention))
        k, v = (split_heads(y, self.n_heads) for y in keys_values.chunk(2, dim=-1))
        return Context(k, v, attention, mlp, queries)

    def _plain(self, embedding: Tensor, context: Context, tile: int) -> Tensor:
        normed = self.norm_query(embedding)
        if context.queries is None:  # the same for all cells: projected once
            normed = self.query(normed)
        tiles = zip(normed.split(tile, dim=-2), embedding.split(tile, dim=-2), strict=True)
        if torch.is_grad_enabled():
            parts = [checkpoint(self.decode_tile, q, e, context, use_reentrant=False) for q, e in tiles]
        else:
            parts = [self.decode_tile(q, e, context) for q, e in tiles]
        return torch.cat(parts, dim=1)

    def decode_tile(self, q: Tensor, embedding: Tensor, context: Context) -> Tensor:
        """Return the outputs (b, t, r) of queries and embeddings (t, d) or (b, t, d)."""
        if context.queries is not None:
            q = self.query(modulated(q, context.queries))
        q = split_heads(q, self.n_heads).expand(len(context.k), -1, -1, -1)
        attended = self.out(merge_heads(F.scaled_dot_product_attention(q, context.k, context.v)))
        x = embedding + gated(attended, context.attention)  # (b, t, d)
        y = modulated(self.norm_mlp(x), context.mlp)
        if context.mlp is not None or self.head_norm is not None:
            x = x + gated(self.mlp(y), context.mlp)
            with whole_products(x):
                return self.head(x if self.head_norm is None else self.head_norm(x))
        hidden = F.silu(self.mlp.gate(y)) * self.mlp.up(y)
        with whole_products(x):  # logits of a softmax over all genes: bf16 would round those near 8 by 0.03
            of_hidden = F.linear(hidden.to(x.dtype), self.head.weight @ self.mlp.down.weight)
            return F.linear(x, self.head.weight, self.head.bias) + of_hidden
