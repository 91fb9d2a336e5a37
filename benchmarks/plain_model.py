"""Upstream's mathematics written down plainly: the baseline of the speed table and an oracle of the tests.

Dense tokens padded to `genes_seq_len` and not masked, every gene of every cell through the whole decoder, the
likelihood over all b x g entries, guidance with 2 + K evaluations; attention by `scaled_dot_product_attention`. The
functions read the weights of our modules, so both sides compute with the same numbers.

Shape letters: b cells, g genes, s tokens (genes_seq_len), m latent tokens, e latent width, d model width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from scldm.data.batch import CellBatch
from scldm.nn.dit import DiT
from scldm.nn.layers import merge_heads, split_heads
from scldm.nn.likelihood import nb_log_prob
from scldm.nn.vae import VAE


def padded_tokens(cells: CellBatch, genes_seq_len: int) -> tuple[Tensor, Tensor]:
    """Expressed genes and their counts as (b, s); a pad has gene -1 and count 0."""
    genes = torch.full((cells.n_cells, genes_seq_len), -1, dtype=torch.int64)
    counts = torch.zeros(cells.n_cells, genes_seq_len, dtype=cells.counts.dtype)
    place = torch.arange(len(cells.gene_ids)) - cells.offsets[:-1][cells.cell_index]
    genes[cells.cell_index, place] = cells.gene_ids
    counts[cells.cell_index, place] = cells.counts
    return genes, counts


def encode(vae: VAE, genes: Tensor, counts: Tensor) -> Tensor:
    """Latents (b, m, e) of padded tokens (b, s), for the `log1p` input."""
    encoder, eps = vae.encoder, vae.config.eps
    assert encoder.pad is not None
    table = torch.cat([vae.gene_embedding, encoder.pad[None]])
    tokens = table[genes] * counts.log1p()[..., None]  # (b, s, d); row -1 is the pad
    q = split_heads(encoder.query(encoder.norm_query(encoder.queries)), encoder.n_heads).expand(len(genes), -1, -1, -1)
    context = encoder.key_value(encoder.norm_context(tokens))
    k, v = (split_heads(y, encoder.n_heads) for y in context.chunk(2, dim=-1))
    x = encoder.queries + encoder.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))
    x = x + encoder.mlp(encoder.norm_mlp(x))
    if encoder.positions is not None:
        x = x + encoder.positions
    for block in encoder.blocks:
        x = block(x)
    z = encoder.to_latent(x)
    return F.layer_norm(z, z.shape[-1:], eps=eps)


def decode(vae: VAE, z: Tensor, library_size: Tensor) -> tuple[Tensor, Tensor]:
    """mu (b, g) and theta (g,)."""
    decoder = vae.decoder
    x = decoder.from_latent(F.layer_norm(z, z.shape[-1:], eps=vae.config.eps))
    for block in decoder.blocks:
        x = block(x)
    genes = vae.gene_embedding.expand(len(z), -1, -1)  # (b, g, d)
    q = split_heads(decoder.query(decoder.norm_query(genes)), decoder.n_heads)
    k, v = (split_heads(y, decoder.n_heads) for y in decoder.key_value(decoder.norm_context(x)).chunk(2, dim=-1))
    y = genes + decoder.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))
    y = y + decoder.mlp(decoder.norm_mlp(y))
    logits = decoder.head(y)[..., 0] / vae.config.temperature
    assert vae.log_theta is not None
    return logits.softmax(-1) * library_size[:, None], vae.log_theta.exp()


def loss(vae: VAE, genes: Tensor, counts: Tensor, dense: Tensor, library_size: Tensor) -> Tensor:
    """Negative log-likelihood summed over all genes, mean over cells. `dense` is (b, g)."""
    mu, theta = decode(vae, encode(vae, genes, counts), library_size)
    return -nb_log_prob(dense, mu, theta).sum(1).mean()


def guided_velocity(dit: DiT, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor], scale: float) -> Tensor:
    """v_null + w (v_cond - v_null) as upstream asks for it: its batch holds every cell twice, the first half to be left
    unconditional, and the null output is computed for both halves."""
    null = dit(torch.cat([x, x]), torch.cat([t, t]), {})
    conditional = dit(x, t, conditions)
    unguided = null[len(x) :]
    return unguided + scale * (conditional - unguided)


def sample(dit: DiT, x0: Tensor, conditions: Mapping[str, Tensor], *, scale: float, steps: int) -> Tensor:
    """Euler's method over t = 0 .. 1."""
    x = x0
    for i in range(steps):
        t = torch.full((len(x),), i / steps)
        x = x + guided_velocity(dit, x, t, conditions, scale) / steps
    return x
