"""Parameter names of the DiT: upstream's to ours, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from scldm.checkpoints.upstream.name_rules import Names
from scldm.nn.dit import label_table_name

_DIT_NAMES = {
    "pos_embed": "positions",
    "input_proj.KIND": "input.KIND",
    "t_embedder.mlp.0.KIND": "time.up.KIND",
    "t_embedder.mlp.2.KIND": "time.down.KIND",
    "blocks.#.attn.c_attn.KIND": "blocks.#.attention.qkv.KIND",
    "blocks.#.attn.c_proj.KIND": "blocks.#.attention.out.KIND",
    "blocks.#.mlp.w1.weight": "blocks.#.mlp.gate.weight",
    "blocks.#.mlp.w2.weight": "blocks.#.mlp.up.weight",
    "blocks.#.mlp.c_proj.weight": "blocks.#.mlp.down.weight",
    "blocks.#.adaln_modulation.1.KIND": "blocks.#.adaln.KIND",
    "final_layer.adaln_modulation.1.KIND": "head.adaln.KIND",
    "final_layer.linear.KIND": "head.linear.KIND",
}
_UPSTREAM_LABEL = re.compile(r"class_embeddings\.(.+)\.weight")
_OUR_LABEL = re.compile(r"labels\.(.+)\.weight")


_NAMES = Names(_DIT_NAMES, theirs="upstream's DiT", ours="our DiT")


def dit_key(upstream_name: str) -> str:
    """Return our name of a parameter of upstream's DiT, given without its prefix (`diffusion_model.` and the like)."""
    if match := _UPSTREAM_LABEL.fullmatch(upstream_name):
        return f"labels.{label_table_name(match[1])}.weight"
    return _NAMES.to_ours(upstream_name)


def upstream_dit_key(name: str) -> str:
    """Return upstream's name of a parameter of our DiT, without a prefix."""
    if match := _OUR_LABEL.fullmatch(name):
        label = match[1].removeprefix("label_").replace("%2E", ".").replace("%25", "%")  # undoes label_table_name
        return f"class_embeddings.{label}.weight"
    return _NAMES.to_theirs(name)


def dit_state_from_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of our DiT from that of upstream's. The tensors are shared, not copied."""
    return {dit_key(name): tensor for name, tensor in state.items()}


def dit_state_to_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of upstream's DiT from that of ours. The tensors are shared, not copied."""
    return {upstream_dit_key(name): tensor for name, tensor in state.items()}
