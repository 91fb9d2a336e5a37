"""The pretended device: a tensor that says `cuda:0`, and a mode that computes its operations on the CPU and records it.

Unlike torch's FakeTensorMode the numbers are real, so code that reads them back (`.tolist()`, a boolean mask) runs.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from helpers.pretended import rules

CUDA = torch.device("cuda:0")
ROOT = Path(__file__).resolve().parents[3]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("scldm", "pipeline"))
MIXED = "Expected all tensors to be on the same device"


class PretendedTensor(torch.Tensor):
    """A tensor of the pretended device; `on_cpu` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> PretendedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, on_cpu.size(), strides=on_cpu.stride(), storage_offset=on_cpu.storage_offset(), dtype=on_cpu.dtype,
            layout=on_cpu.layout, device=CUDA, requires_grad=False,
        )  # fmt: skip
        made.on_cpu = on_cpu
        return made

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        """Take another tensor's numbers, as DeepSpeed makes a parameter a part of its flat buffers."""
        torch.Tensor.data.__set__(self, value)
        self.on_cpu = value.on_cpu

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.on_cpu!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if PretendedDevice.active is None:
            raise RuntimeError("a tensor of the pretended device is used after the device was closed")
        return PretendedDevice.active.run(func, args, kwargs or {})


@dataclass
class Record:
    """What was asked of the device. Keys of launches are operations; the others are lines of the package."""

    launches: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)

    def totals(self) -> dict[str, int]:
        return {name: sum(found.values()) for name, found in vars(self).items()}

    def clear(self) -> None:
        for found in vars(self).values():
            found.clear()


class PretendedDevice(TorchDispatchMode):
    """The mode in which the device exists. May be entered again, in other threads too."""

    active: ClassVar[PretendedDevice | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.record, self._depth = Record(), 0

    def __enter__(self) -> PretendedDevice:
        PretendedDevice.active = self
        self._depth += 1
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(…, device="cuda") is a copy that is seen
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            PretendedDevice.active = None
            torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute an operation on the CPU, and record it if it involves the device.

        Raises:
            RuntimeError: It mixes tensors of the device with those of the CPU, or draws with a generator of the CPU.
        """
        name = func._schema.name.split("::")[1]
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        on = [x for x in tensors if isinstance(x, PretendedTensor)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if "pin_memory" in kwargs:
            kwargs = {**kwargs, "pin_memory": False}  # memory of the CPU is never pinned here
        if not on and wanted != "cuda":
            return func(*args, **kwargs)
        off = [x for x in tensors if not isinstance(x, PretendedTensor)]
        self._refuse(name, args, on, off, leaves, wanted)
        self._count(func, name, args, kwargs, on, off, wanted)
        own = {id(x.on_cpu): x for x in on}
        args, kwargs = tree_map(lambda x: x.on_cpu if isinstance(x, PretendedTensor) else x, (args, kwargs))
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*args, **kwargs)
        if wanted == "cpu" or name in rules.RETURNS_A_NUMBER or (name == "copy_" and id(out) not in own):
            return out

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return own[id(x)] if id(x) in own else PretendedTensor(x)  # an operation in place returns what it was given

        return tree_map(wrapped, out)

    def _refuse(
        self, name: str, args: Any, on: list[PretendedTensor], off: list[Tensor], leaves: list[Any], wanted: str | None
    ) -> None:
        if on and off and (bad := rules.strangers(name, args, off)):
            shapes = [tuple(x.shape) for x in bad]
            raise RuntimeError(f"{MIXED}: {name} mixes cuda with cpu {shapes} at {line()}")
        generators = [x for x in leaves if isinstance(x, torch.Generator)]
        if wanted != "cpu" and any(x.device.type == "cpu" for x in generators):
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {name} at {line()}")

    def _count(
        self, func: Any, name: str, args: Any, kwargs: Any, on: list[PretendedTensor], off: list[Tensor],
        wanted: str | None,
    ) -> None:  # fmt: skip
        to_host = name == "_to_copy" and on and wanted == "cpu"
        to_device = name == "_to_copy" and not on and wanted == "cuda"
        if name == "copy_" and on and off:
            to_host, to_device = args[0] is off[0], args[0] is on[0]
        waits = not _non_blocking(name, args, kwargs)
        if to_device:
            self.record.copies[line()] += 1
        if (to_host or to_device) and waits:  # torch waits for a copy that is not asked to be asynchronous
            self.record.syncs[f"{line()} {'to the host' if to_host else 'to the device'}"] += 1
        if indices := rules.host_indices(name, args):
            self.record.copies[f"{line()} index"] += len(indices)
            self.record.syncs[f"{line()} index"] += len(indices)
        if on and rules.host_waits(name, args, kwargs):
            self.record.syncs[f"{line()} {name}"] += 1
        if not (to_host or to_device) and rules.launches(func, name):
            self.record.launches[name] += 1


def _non_blocking(name: str, args: Any, kwargs: Any) -> bool:
    if name == "copy_":
        return bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False))
    return bool(kwargs.get("non_blocking", False))


def line() -> str:
    """Return the innermost line of the package that is running, as `path:line`."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGES):
            return f"{file[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "in torch"
