"""Parameter names of the MLP VAE: upstream's to ours. Its frozen standard normal prior is part of our formula."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_STEMS = {
    "encoder.encoder_mlp.": "encoder.",
    "decoder.decoder_mlp.": "decoder.",
    "encoder_head.loc.": "loc.",
    "encoder_head.scale.": "log_scale.",
    "decoder_head.mu.": "logits.",
    "decoder_head.theta.": "theta.",
}
_PRIOR = {"prior.loc": 0.0, "prior.scale": 1.0}


def scvi_key(upstream: str) -> str:
    """Return our name of a parameter or buffer of upstream's."""
    if upstream == "decoder_head.theta":
        return "theta"
    for theirs, ours in _STEMS.items():
        if upstream.startswith(theirs):
            return ours + upstream.removeprefix(theirs)
    raise KeyError(f"{upstream!r} is not a parameter of upstream's MLP VAE")


def scvi_state_from_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return upstream's state under our names.

    Raises:
        KeyError: A name is unknown.
        ValueError: The prior is not the standard normal.
    """
    for name, value in _PRIOR.items():
        if name in state and not torch.equal(state[name], torch.full_like(state[name], value)):
            raise ValueError(f"{name} is {state[name].flatten().tolist()[:4]}; only the standard normal prior is known")
    return {scvi_key(name): value for name, value in state.items() if name not in _PRIOR}
