"""The parts of torch.cuda that the package calls, as far as they matter to a device that only pretends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen

from helpers.pretended.device import CUDA, PretendedDevice, PretendedTensor

NAME = "NVIDIA H100 80GB HBM3"
MEMORY = 80 * 2**30
_attention = F.scaled_dot_product_attention
_apply = nn.Module._apply


class Stream:
    """A stream on which everything has happened already."""

    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Event:
        return Event()


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Compute attention of the device in one launch forwards and one backwards, as its fused kernels do.

    Where those would not apply (widths of k and v that differ, a mask with a gradient), by torch's formula.
    """
    options: dict[str, Any] = {"attn_mask": attn_mask, "scale": scale}
    if not isinstance(q, PretendedTensor) and not q.is_cuda:
        return _attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as torch does, for formulas that add it
        options["attn_mask"] = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    fits = q.dim() == 4 and q.shape[-1] == v.shape[-1] and not (attn_mask is not None and attn_mask.requires_grad)
    if not fits or enable_gqa:
        formula = torch.ops.aten._scaled_dot_product_attention_math
        return formula(q, k, v, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa, **options)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, **options)[0]


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float,
) -> Tensor:  # fmt: skip
    """Compute attention over packed sequences as FlashAttention's kernel does, padded: its launches are not counted."""
    n, (heads, width) = len(cu_seq_k) - 1, query.shape[1:]
    place = torch.arange(max_k, device=key.device)
    at = (cu_seq_k[:-1, None] + place).clamp(max=len(key) - 1).long()
    known = place < (cu_seq_k[1:] - cu_seq_k[:-1])[:, None]
    q = query.unflatten(0, (n, max_q)).transpose(1, 2)
    k, v = (x[at].transpose(1, 2) for x in (key, value))
    logits = (q @ k.transpose(2, 3) * scale).float().masked_fill(~known[:, None, None], -torch.inf)
    return (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(-1, heads, width)


def compiled(function: Any = None, **_: Any) -> Any:
    """Return the function as it is: a compiled function is not rehearsed, and its launches are those of its parts."""
    return function if function is not None else lambda f: f


def apply_changes(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Apply a conversion to a module as torch does, but leave alone what it would not change.

    Torch would replace such parameters by equal ones, and refuse where others hold them, as an engine does.
    """
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if not all(_unchanged(x, fn) for x in own):
        return _apply(module, fn, recurse)
    for child in module.children() if recurse else ():
        child._apply(fn)
    return module


def _unchanged(x: Tensor, fn: Callable[[Tensor], Tensor]) -> bool:
    with torch.no_grad():
        found = fn(x)
    return found.device == x.device and found.dtype == x.dtype


CUDA_FUNCTIONS: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "set_device": lambda *_: None,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "reset_peak_memory_stats": lambda *_: None,
    "mem_get_info": lambda *_: (MEMORY, MEMORY),
    "get_device_name": lambda *_: NAME,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: SimpleNamespace(
        name=NAME, total_memory=MEMORY, major=9, minor=0, multi_processor_count=132, warp_size=32
    ),
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda *_: None,
    "manual_seed_all": lambda *_: None,
    "Stream": Stream,
    "Event": Event,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda *_: Stream(),
    "device_of": lambda tensor: contextlib.nullcontext(),
}


@contextlib.contextmanager
def pretended() -> Iterator[PretendedDevice]:
    """Let this process have the device for the block. Its tensors are of no use after it."""
    import pipeline.training.prefetch as prefetching

    device, prepare = PretendedDevice(), prefetching._prepare_step
    swaps = torch.__future__.get_swap_module_params_on_conversion()

    def prepare_on_device(*args: Any) -> Any:
        with device:  # a mode is of the thread that entered it
            return prepare(*args)

    with contextlib.ExitStack() as stack:
        put = lambda where, name, value: stack.enter_context(mock.patch.object(where, name, value))  # noqa: E731
        for name, value in CUDA_FUNCTIONS.items():
            put(torch.cuda, name, value)
        put(F, "scaled_dot_product_attention", attention)
        put(torch, "compile", compiled)
        put(varlen, "varlen_attn", packed_attention)
        put(nn.Module, "_apply", apply_changes)
        for name in ("range_push", "range_pop"):
            put(torch.cuda.nvtx, name, lambda *_: None)
        put(torch.Tensor, "pin_memory", lambda self, *_: self)
        put(torch.Tensor, "record_stream", lambda self, *_: None)
        put(prefetching, "_prepare_step", prepare_on_device)
        # A parameter stays the same object when its module moves, as on a GPU, where it takes the new tensor's data.
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.enter_context(device)
        yield device
