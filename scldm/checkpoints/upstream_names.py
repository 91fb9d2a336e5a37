"""Parameter names: upstream's to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from scldm.nn.dit import label_table_name

_DIT_NAMES = (
    (r"pos_embed", "positions"),
    (r"input_proj\.(weight|bias)", r"input.\1"),
    (r"t_embedder\.mlp\.0\.(weight|bias)", r"time.up.\1"),
    (r"t_embedder\.mlp\.2\.(weight|bias)", r"time.down.\1"),
    (r"blocks\.(\d+)\.attn\.c_attn\.(weight|bias)", r"blocks.\1.attention.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.c_proj\.(weight|bias)", r"blocks.\1.attention.out.\2"),
    (r"blocks\.(\d+)\.mlp\.w1\.weight", r"blocks.\1.mlp.gate.weight"),
    (r"blocks\.(\d+)\.mlp\.w2\.weight", r"blocks.\1.mlp.up.weight"),
    (r"blocks\.(\d+)\.mlp\.c_proj\.weight", r"blocks.\1.mlp.down.weight"),
    (r"blocks\.(\d+)\.adaln_modulation\.1\.(weight|bias)", r"blocks.\1.adaln.\2"),
    (r"final_layer\.adaln_modulation\.1\.(weight|bias)", r"head.adaln.\1"),
    (r"final_layer\.linear\.(weight|bias)", r"head.linear.\1"),
)
_LABEL_TABLE = re.compile(r"class_embeddings\.(.+)\.weight")


def dit_key(upstream_name: str) -> str:
    """Our name of a parameter of upstream's DiT, whose prefix (`diffusion_model.` and the like) is already gone."""
    if match := _LABEL_TABLE.fullmatch(upstream_name):
        return f"labels.{label_table_name(match[1])}.weight"
    for pattern, name in _DIT_NAMES:
        if match := re.fullmatch(pattern, upstream_name):
            return match.expand(name)
    raise KeyError(f"{upstream_name!r} is not a parameter of upstream's DiT")


def dit_state_from_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of our DiT from the state of upstream's. The tensors are shared, not copied."""
    return {dit_key(name): tensor for name, tensor in state.items()}
