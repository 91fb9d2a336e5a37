"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): a trained matrix W becomes W + (alpha / r) B A, and W stays.

Adapters are parametrizations of the linear layers of attention and SwiGLU, so that all code that reads a weight, the
kernels too, sees the sum. `merged` turns the state of a network with adapters into that of one without.

Shape letters: o outputs, i inputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from scldm.nn.layers import SwiGLU
from scldm.optim.config import LoraConfig

ATTENTION = ("qkv", "query", "key_value", "out")  # names of the linear layers of an attention block
_ORIGINAL = ".parametrizations.weight.original"
_ADAPTER = ".parametrizations.weight.0."


class Adapter(nn.Module):
    """W -> W + (alpha / r) B A. B starts at zero, so that the network starts as it was.

    Args:
        weight: The matrix, (o, i).
        generator: Draws A, (r, i), uniform with the variance of 1 / (3 i).
    """

    def __init__(self, weight: Tensor, config: LoraConfig, generator: torch.Generator):
        super().__init__()
        outputs, inputs = weight.shape
        bound = 1 / math.sqrt(inputs)
        drawn = torch.rand(config.rank, inputs, generator=generator, dtype=torch.float32)
        self.a = nn.Parameter(((2 * drawn - 1) * bound).to(weight))
        self.b = nn.Parameter(weight.new_zeros(outputs, config.rank))
        self.scale = config.scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum, (o, i)."""
        return weight + self.scale * (self.b @ self.a)


def add_adapters(module: nn.Module, config: LoraConfig, *, seed: int, also: Sequence[str] = ()) -> list[str]:
    """Give a network adapters, and keep all its other parameters from being trained.

    Args:
        also: Names of parameters that are trained in full beside the adapters.

    Returns:
        Names of the parameters that are trained.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in also)
    for layer in _adapted(module).values():
        parametrize.register_parametrization(layer, "weight", Adapter(layer.weight.detach(), config, generator))
    return [name for name, p in module.named_parameters() if p.requires_grad]


def merged(state: Mapping[str, Tensor], config: LoraConfig | None) -> dict[str, Tensor]:
    """Return the state of the network without adapters that computes the same."""
    if config is None:
        return dict(state)
    found = {}
    for name, tensor in state.items():
        if name.endswith(_ORIGINAL):
            layer = name.removesuffix(_ORIGINAL)
            a, b = (state[f"{layer}{_ADAPTER}{part}"] for part in "ab")
            found[f"{layer}.weight"] = tensor + config.scale * (b @ a)
        elif _ADAPTER not in name:
            found[name] = tensor
    return found


def is_adapter(name: str) -> bool:
    """Return whether a parameter is of an adapter, and so is no parameter of the merged network."""
    return _ADAPTER in name


def _adapted(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of attention and SwiGLU, by name."""
    inside = {id(layer) for part in module.modules() if isinstance(part, SwiGLU) for layer in part.children()}
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and (id(layer) in inside or name.rpartition(".")[2] in ATTENTION)
    }
