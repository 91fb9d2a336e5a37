"""Attention of the encoder's learned queries over entries: entry by entry, or as rows of a table.

Shape letters: n rows, m queries, d model width, h heads, c channels per head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scldm.nn.kernels.fused_pooling import Heads


@dataclass(frozen=True)
class Attention:
    """Learned queries with the LayerNorm and projection of the tokens that they attend to."""

    queries: Tensor  # (h, m, c), projected
    norm: nn.LayerNorm
    key_value: nn.Linear  # d -> 2 d

    @property
    def heads(self) -> Heads:
        """Numbers of heads, queries and channels."""
        return Heads(*self.queries.shape)

    @property
    def eps(self) -> float:
        """Epsilon of the LayerNorm."""
        return self.norm.eps

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (n, h, m) and values (n, h, c) of tokens (n, d)."""
        k, v = self.keys_values(tokens).unbind(1)
        return torch.einsum("nhc,hmc->nhm", k, self.queries) / math.sqrt(k.shape[-1]), v

    def keys_values(self, tokens: Tensor) -> Tensor:
        """Return keys and values of tokens (n, d), (n, 2, h, c)."""
        h, _, c = self.queries.shape
        return self.key_value(self.norm(tokens)).unflatten(-1, (2, h, c))

    @property
    def scaled_queries(self) -> Tensor:
        """Queries with the scale of the logits in them, (h, m, c)."""
        return self.queries / math.sqrt(self.queries.shape[-1])

    def table(self, centred: Tensor) -> Tensor:
        """Return the part of the attention that is linear in the tokens, (n, h m + h c).

        Logits, then values, of `centred` (n, d) times the norm's weight. The constant part of the logits is the same
        for all entries of a softmax and left out.
        """
        h, _, c = self.queries.shape
        weight_k, weight_v = self.key_value.weight.chunk(2)
        logits = torch.einsum("hcd,hmc->dhm", weight_k.unflatten(0, (h, c)), self.queries).flatten(1) / math.sqrt(c)
        return centred @ (torch.cat([logits, weight_v.T], dim=1) * self.norm.weight[:, None])

    def constant(self) -> Tensor:
        """Return the constant part of the values, (h, c)."""
        values = self.norm.bias @ self.key_value.weight.chunk(2)[1].T
        if self.key_value.bias is not None:
            values = values + self.key_value.bias.chunk(2)[1]
        return values.unflatten(-1, (self.queries.shape[0], -1))
