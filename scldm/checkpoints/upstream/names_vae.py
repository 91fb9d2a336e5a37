"""Parameter names of the transformer VAE: upstream's to ours, and back.

Upstream's gene tables have a row for the pad (id 0); its genes are 1 .. g. Ours have genes 0 .. g-1; the pad's row of
the encoder is a parameter of its own, in models that do not mask pads. The pad's rows of the decoder's embedding and of
theta are never read by upstream's decoder, and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scldm.checkpoints.upstream.name_rules import Names
from scldm.nn.config import VAEConfig

_BLOCK = {
    "ln_1.KIND": "norm_attention.KIND",
    "ln_2.KIND": "norm_mlp.KIND",
    "attn.c_attn.KIND": "attention.qkv.KIND",
    "attn.c_proj.KIND": "attention.out.KIND",
    "mlp.w1.KIND": "mlp.gate.KIND",
    "mlp.w2.KIND": "mlp.up.KIND",
    "mlp.c_proj.KIND": "mlp.down.KIND",
    "adaln_modulation.1.KIND": "adaln.1.KIND",
}
_CROSS = {
    "ln_1.KIND": "norm_context.KIND",
    "ln_1q.KIND": "norm_query.KIND",
    "ln_2.KIND": "norm_mlp.KIND",
    "attn.c_attn.KIND": "key_value.KIND",
    "attn.c_attn_q.KIND": "query.KIND",
    "attn.c_proj.KIND": "out.KIND",
    "mlp.w1.KIND": "mlp.gate.KIND",
    "mlp.w2.KIND": "mlp.up.KIND",
    "mlp.c_proj.KIND": "mlp.down.KIND",
    "adaln_modulation.1.KIND": "adaln.1.KIND",
    "adaln_modulation_q.1.KIND": "adaln_query.1.KIND",
}
_WHOLE = {
    "input_layer.gene_embedding.weight": "gene_embedding",
    "input_layer.projection.count_embedding.KIND": "encoder.counts.count_embedding.KIND",
    "input_layer.projection.mix.KIND": "encoder.counts.mix.KIND",
    "input_layer.projection.mlp_count.#.KIND": "encoder.counts.mlp_count.#.KIND",
    "input_layer.projection.bin_embeddings": "encoder.counts.bin_embeddings",
    "encoder.ca_layer.inducing_points": "encoder.queries",
    "encoder.pos_embed": "encoder.positions",
    "encoder.encoder_latent_input.0.KIND": "encoder.to_latent.KIND",
    "decoder.gene_embedding.weight": "decoder_embedding",
    "decoder.decoder_latent_input.1.KIND": "decoder.from_latent.KIND",
    "decoder_head.theta.weight": "log_theta",
    "decoder_head.params.KIND": "decoder.head.KIND",
    "decoder_head.ln.KIND": "decoder.head_norm.KIND",
}
_NAMES = Names(
    _WHOLE
    | {f"encoder.encoder_layers.#.{theirs}": f"encoder.blocks.#.{ours}" for theirs, ours in _BLOCK.items()}
    | {f"decoder.decoder_layers.#.{theirs}": f"decoder.blocks.#.{ours}" for theirs, ours in _BLOCK.items()}
    | {f"encoder.ca_layer.{theirs}": f"encoder.{ours}" for theirs, ours in _CROSS.items()}
    | {f"decoder.decoder_cross_attention.{theirs}": f"decoder.{ours}" for theirs, ours in _CROSS.items()},
    theirs="upstream's VAE",
    ours="our VAE",
)
_WITH_PAD_ROW = {"gene_embedding", "decoder_embedding", "log_theta"}


def vae_key(upstream: str) -> str:
    """Return our name of an upstream VAE parameter.

    Raises:
        KeyError: The name belongs to no known part of the VAE.
    """
    return _NAMES.to_ours(upstream)


def vae_state_from_upstream(state: Mapping[str, Tensor], *, pads: bool) -> dict[str, Tensor]:
    """Return upstream's VAE weights under our names.

    Args:
        state: Names and values as upstream writes them.
        pads: Whether the model was trained with unmasked pads (our `genes_seq_len`); the pad's own row is then kept.
    """
    out = {}
    for name, value in state.items():
        key = vae_key(name)
        if key == "gene_embedding" and pads:
            out["encoder.pad"] = value[0].clone()
        out[key] = without_pad_row(key, value).clone()
    return out


def without_pad_row(key: str, value: Tensor) -> Tensor:
    """Return upstream's tensor, or its gradient, in the shape of our parameter `key`."""
    if key not in _WITH_PAD_ROW:
        return value
    return value[1:].squeeze(-1) if key == "log_theta" else value[1:]


def vae_state_to_upstream(state: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """Return our VAE weights under upstream's names; rows of the pad that ours do not have are zeros.

    Args:
        state: Names and values of our VAE.
        config: Configuration of that VAE; without `gene_bias` and with an input of upstream's.
    """
    out = {}
    for key, value in state.items():
        if key == "encoder.pad":
            continue  # the first row of the gene embedding
        if key in _WITH_PAD_ROW:
            value = value[:, None] if key == "log_theta" else value
            first = state["encoder.pad"][None] if key == "gene_embedding" and config.genes_seq_len else None
            value = torch.cat([value.new_zeros(1, value.shape[1]) if first is None else first, value])
        out[_NAMES.to_theirs(key)] = value
    return out
