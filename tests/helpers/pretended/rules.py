"""What an operation of torch asks of a GPU: which launch kernels, which copy from the host, which make the host wait.

Stated from the CUDA code of torch 2.13. An operation counts as one launch, though a library may launch several kernels
for it (a sort, an embedding's gradient) and views and allocations launch none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Return a number to Python, or need a number of the device to know the size of their result.
WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "multinomial",
}  # fmt: skip
RETURNS_A_NUMBER = {"_local_scalar_dense", "is_nonzero", "equal"}
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
IS_A_VIEW = {"detach", "alias", "_unsafe_view", "lift_fresh", "_reshape_alias", "lift"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


def launches(func: Any, name: str) -> bool:
    """Return whether an operation on the device launches a kernel."""
    return not (func.is_view or name in ALLOCATES or name in IS_A_VIEW or name in RETURNS_A_NUMBER)


def host_waits(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation on tensors of the device makes the host wait for it."""
    if name in WAITS:
        return True
    if name == "repeat_interleave":  # of repeats alone: its length is their sum
        return kwargs.get("output_size") is None and len(args) < 2
    if name in INDEXES:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return bool(masks) and not _is_masked_fill(name, args, masks)
    return False


def _is_masked_fill(name: str, args: Sequence[Any], masks: Sequence[Tensor]) -> bool:
    """Return whether torch fills by the mask: one number, and no other index."""
    accumulate = len(args) > 3 and bool(args[3])
    others = [i for i in args[1] if i is not None]
    return name != "index" and args[2].numel() == 1 and not accumulate and len(others) == len(masks) == 1


def strangers(name: str, args: Sequence[Any], off: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of the CPU that an operation on tensors of the device does not take.

    It takes single numbers (0-dimensional tensors) where it does not write to them, and CPU indices into a tensor of
    the device, which it copies.
    """
    if name == "copy_":
        return []
    if name.startswith("_fused_"):
        return [x for x in off if x.dim() > 0 or x.dtype == torch.float32]  # its step counts too
    indices = host_indices(name, args)
    found = [x for x in off if x.dim() > 0 and not any(x is i for i in indices)]
    written = name.endswith("_") and any(args[0] is x for x in off)
    return found + ([args[0]] if written and not any(args[0] is x for x in found) else [])


def host_indices(name: str, args: Sequence[Any]) -> list[Tensor]:
    """Return the indices on the CPU into a tensor of the device."""
    if name not in INDEXES or args[0].device.type != "cuda":
        return []
    return [i for i in args[1] if i is not None and i.device.type == "cpu"]
