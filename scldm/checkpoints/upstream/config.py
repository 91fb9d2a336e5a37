"""Convert the settings of upstream's transformer VAE, under its own short names, to our configuration.

n_embed n_layer n_head n_head_cross n_inducing_points n_latent multiple_of eps bias   sizes and similar
agg     input: log1p, log1pzero, sqrt, anscombe, proj, projconcat, softbin
head    nb_shared, nb_unshared, gaussian
pos shared use_adaln t   zero positions, one table of gene embeddings, adaLN decoder, softmax temperature
NAME_dec                 the decoder's n_embed n_layer n_head n_head_cross multiple_of eps bias, if not the encoder's
eps_head                 LayerNorm epsilon of a Gaussian head, if not the decoder's
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scldm.nn.config import VAEConfig

HEADS = {"nb_shared": "nb_shared", "nb_unshared": "nb_cell", "gaussian": "gaussian"}
INPUTS = ("log1p", "log1pzero", "sqrt", "anscombe", "proj", "projconcat", "softbin")
DECODER_SIZES = ("n_embed", "n_layer", "n_head", "n_head_cross", "multiple_of", "eps", "bias")
_SAME = {
    "n_embed": "d_model",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_head_cross": "n_heads_cross",
    "n_inducing_points": "n_latent_tokens",
    "n_latent": "latent_width",
    "multiple_of": "multiple_of",
    "eps": "eps",
    "bias": "bias",
    "agg": "input",
    "shared": "shared_embedding",
    "pos": "zero_positions",
}
_OPTIONAL = {"t": "temperature", "use_adaln": "adaln"}
DECODER = {  # upstream's decoder has these of its own -> our field under `decoder`
    **{f"{theirs}_dec": _SAME[theirs] for theirs in DECODER_SIZES},
    "eps_head": "head_eps",
}
_FACTS = {"n_genes", "head"}  # n_genes is read from the data


def vae_config_from_upstream(values: Mapping[str, Any], *, genes_seq_len: int | None) -> VAEConfig:
    """Return our configuration of an upstream VAE.

    Args:
        values: Settings under the names above.
        genes_seq_len: Tokens of a cell, including unmasked pads; None if the model sees no pads.

    Raises:
        ValueError: Settings are missing or unknown (the message names all of them), or a value is not allowed.
    """
    missing = [name for name in (*_SAME, "head") if name not in values]
    known = {*_SAME, *_OPTIONAL, *DECODER, *_FACTS}
    unknown = [name for name in values if name not in known]
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} ({values[name]!r}) is an unknown setting" for name in unknown]
    if "head" in values and values["head"] not in HEADS:
        problems.append(f"head is {values['head']!r}; known: {', '.join(HEADS)}")
    if "agg" in values and values["agg"] not in INPUTS:
        problems.append(f"agg is {values['agg']!r}; known: {', '.join(INPUTS)}")
    if problems:
        raise ValueError("upstream's VAE: " + "; ".join(problems))
    ours = {ours: values[theirs] for theirs, ours in {**_SAME, **_OPTIONAL}.items() if theirs in values}
    ours["decoder"] = {ours: values[theirs] for theirs, ours in DECODER.items() if theirs in values} or None
    return VAEConfig.model_validate(
        {**ours, "head": HEADS[values["head"]], "gene_bias": False, "genes_seq_len": genes_seq_len}
    )
