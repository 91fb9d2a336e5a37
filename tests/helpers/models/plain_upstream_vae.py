"""Upstream's transformer VAE written out from its state dict, with a loop for each cell: a reference for small models.

A size that its encoder and decoder can set apart is an argument of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """Sizes of an encoder or a decoder that its weights do not show."""

    n_heads: int
    n_heads_cross: int
    eps: float


class PlainVAE:
    """Computes the latent and the mean of one cell from weights under upstream's names."""

    def __init__(self, state: Mapping[str, Tensor], encoder: Side, decoder: Side):
        self.state, self.encoder, self.decoder = state, encoder, decoder

    def encode(self, counts: Tensor, genes_seq_len: int) -> Tensor:
        """Return the latent (m, e) of a cell's counts (g,), whose input is log1p; pads are tokens of gene 0."""
        genes = counts.nonzero()[:, 0]
        ids = F.pad(genes + 1, (0, genes_seq_len - len(genes)))
        amounts = F.pad(counts[genes], (0, genes_seq_len - len(genes))).log1p()
        tokens = self.state["input_layer.gene_embedding.weight"][ids] * amounts[:, None]
        side, points = self.encoder, self.state["encoder.ca_layer.inducing_points"]
        x = self._cross("encoder.ca_layer.", tokens, points, side)
        x = x + self.state.get("encoder.pos_embed", torch.zeros(()))
        x = self._blocks("encoder.encoder_layers.", x.view(points.shape), side)
        z = self._linear("encoder.encoder_latent_input.0", x)
        return F.layer_norm(z, z.shape[-1:], eps=side.eps)

    def mean(self, z: Tensor, library_size: float) -> Tensor:
        """Return the mean counts (g,) of a negative-binomial head."""
        side = self.decoder
        x = self._linear("decoder.decoder_latent_input.1", F.layer_norm(z, z.shape[-1:], eps=side.eps))
        x = self._blocks("decoder.decoder_layers.", x, side)
        own = self.state.get("decoder.gene_embedding.weight", self.state["input_layer.gene_embedding.weight"])
        x = self._cross("decoder.decoder_cross_attention.", x, own[1:], side)
        return self._linear("decoder_head.params", x)[:, 0].softmax(0) * library_size

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def _blocks(self, prefix: str, x: Tensor, side: Side) -> Tensor:
        depth = len({name.removeprefix(prefix).split(".")[0] for name in self.state if name.startswith(prefix)})
        for at in (f"{prefix}{i}." for i in range(depth)):
            q, k, v = self._linear(f"{at}attn.c_attn", self._norm(f"{at}ln_1", x, side.eps)).chunk(3, dim=-1)
            x = x + self._linear(f"{at}attn.c_proj", attend(q, k, v, side.n_heads))
            x = self._mlp(at, x, side.eps)
        return x

    def _cross(self, at: str, x: Tensor, q: Tensor, side: Side) -> Tensor:
        k, v = self._linear(f"{at}attn.c_attn", self._norm(f"{at}ln_1", x, side.eps)).chunk(2, dim=-1)
        projected = self._linear(f"{at}attn.c_attn_q", self._norm(f"{at}ln_1q", q, side.eps))
        y = q + self._linear(f"{at}attn.c_proj", attend(projected, k, v, side.n_heads_cross))
        return self._mlp(at, y, side.eps)

    def _mlp(self, at: str, x: Tensor, eps: float) -> Tensor:
        y = self._norm(f"{at}ln_2", x, eps)
        return x + self._linear(
            f"{at}mlp.c_proj", F.silu(self._linear(f"{at}mlp.w1", y)) * self._linear(f"{at}mlp.w2", y)
        )


def attend(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    """Softmax attention, one head after the other."""
    parts = zip(*(x.chunk(n_heads, dim=-1) for x in (q, k, v)), strict=True)
    return torch.cat([(a @ b.T / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in parts], dim=-1)
