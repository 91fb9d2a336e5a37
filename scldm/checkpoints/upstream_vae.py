"""Upstream's parameter names of the transformer VAE, and ours.

Upstream's gene tables have a row for the pad (id 0); its genes are 1 .. g. Ours have genes 0 .. g-1; the pad's row is a
parameter of its own, in models that do not mask pads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_BLOCK = {
    "ln_1": "norm_attention",
    "ln_2": "norm_mlp",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "mlp.w1": "mlp.gate",
    "mlp.w2": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
_CROSS = {
    "ln_1": "norm_context",
    "ln_1q": "norm_query",
    "ln_2": "norm_mlp",
    "attn.c_attn": "key_value",
    "attn.c_attn_q": "query",
    "attn.c_proj": "out",
    "mlp.w1": "mlp.gate",
    "mlp.w2": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
_WHOLE = {
    "input_layer.gene_embedding.weight": "gene_embedding",
    "decoder.gene_embedding.weight": "decoder_embedding",
    "decoder_head.theta.weight": "log_theta",
    "encoder.ca_layer.inducing_points": "encoder.queries",
    "encoder.pos_embed": "encoder.positions",
}
_PREFIX = {
    "encoder.encoder_latent_input.0": "encoder.to_latent",
    "decoder.decoder_latent_input.1": "decoder.from_latent",
    "decoder_head.params": "decoder.head",
}
_WITH_PAD_ROW = {"gene_embedding", "decoder_embedding", "log_theta"}


def vae_key(upstream: str) -> str:
    """Our name of an upstream VAE parameter.

    Raises:
        KeyError: the name belongs to no part of the VAE that we know.
    """
    if upstream in _WHOLE:
        return _WHOLE[upstream]
    stem, _, kind = upstream.rpartition(".")
    if stem in _PREFIX:
        return f"{_PREFIX[stem]}.{kind}"
    if m := re.fullmatch(r"(encoder\.encoder|decoder\.decoder)_layers\.(\d+)\.(.+)", stem):
        side = m[1].split(".")[0]
        return f"{side}.blocks.{m[2]}.{_BLOCK[m[3]]}.{kind}"
    if m := re.fullmatch(r"(encoder\.ca_layer|decoder\.decoder_cross_attention)\.(.+)", stem):
        side = m[1].split(".")[0]
        return f"{side}.{_CROSS[m[2]]}.{kind}"
    raise KeyError(f"no part of the VAE is called {upstream!r}")


def vae_state_from_upstream(state: Mapping[str, Tensor], *, pads: bool) -> dict[str, Tensor]:
    """Upstream's VAE weights under our names.

    Args:
        state: Names and values as upstream writes them.
        pads: Whether the model was trained with unmasked pads (our `genes_seq_len`); the pad's own row is then kept.
    """
    out = {}
    for name, value in state.items():
        key = vae_key(name)
        if key == "gene_embedding" and pads:
            out["encoder.pad"] = value[0].clone()
        if key in _WITH_PAD_ROW:
            value = value[1:].squeeze(-1) if key == "log_theta" else value[1:]
        out[key] = value.clone()
    return out
