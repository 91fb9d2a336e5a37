"""Exponential moving average of a module's weights.

The shadow is kept in at least fp32: with a decay near 1 the change of one update is below the resolution of bfloat16.
An update depends on the optimizer step alone, so that a resumed run continues as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scldm.optim.config import EMAConfig


def ema_decay(step: int, *, decay: float, start: int) -> float:
    """Return the decay at an optimizer step: 0 up to one after `start`, then 1 - (1 + k)^(-2/3), at most `decay`."""
    k = step - start - 1
    return min(1 - (1 + k) ** (-2 / 3), decay) if k > 0 else 0.0


class EMA:
    """Keeps a moving average of the parameters and buffers of a module.

    Args:
        module: The module that is trained, on its device. The average starts as a copy of it.
        config: Decay, interval and start of the average.
    """

    def __init__(self, module: nn.Module, config: EMAConfig):
        self.module = module
        self.config = config
        self.shadow = {name: _shadow_of(tensor) for name, tensor in _tensors(module).items()}

    def update(self, step: int) -> None:
        """Account for optimizer step `step`, counted from 1. Call it after the step."""
        if step < 1:
            raise ValueError(f"step ({step}) counts the optimizer steps taken, from 1")
        if step % self.config.every == 0:
            self.average(ema_decay(step, decay=self.config.decay, start=self.config.start))

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Set shadow = decay shadow + (1 - decay) module. Integer buffers are copied."""
        shadows, values = [], []
        for name, tensor in _tensors(self.module).items():
            shadow = self.shadow[name]
            if shadow.is_floating_point() and decay > 0:
                shadows.append(shadow)
                values.append(tensor.to(shadow.dtype))
            else:
                shadow.copy_(tensor)
        if shadows:
            torch._foreach_lerp_(shadows, values, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module of the same structure, in its own precision."""
        tensors = _tensors(module)
        _check_names(tensors, self.shadow)
        for name, tensor in tensors.items():
            tensor.copy_(self.shadow[name])

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[nn.Module]:
        """Give the module the averaged weights inside the context; its own weights are always restored."""
        own = {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}
        try:
            self.copy_to(module)
            yield module
        finally:
            with torch.no_grad():
                for name, tensor in _tensors(module).items():
                    tensor.copy_(own[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by name, without copying. The step belongs to the trainer's state."""
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the average from the `state_dict` of another EMA of the same module."""
        _check_names(state, self.shadow)
        for name, shadow in self.shadow.items():
            if state[name].shape != shadow.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}; expected {tuple(shadow.shape)}")
            shadow.copy_(state[name])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _shadow_of(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True)


def _check_names(names: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing or unknown:
        raise KeyError(f"not the module this average was made of: missing {missing[:5]}, unknown {unknown[:5]}")
