"""Precision of the networks' products in inference: which there are, where, and how a network is set to one.

    fp32   products of fp32 numbers
    tf32   fp32 numbers whose products are rounded to 10 bits of mantissa, by NVIDIA GPUs from Ampere on
    bf16   products of bfloat16 numbers, summed in fp32

Weights stay fp32, and so does all that is not a network: softmax and likelihood over genes, `gene_bias`, dispersion,
the state and the time of a solver, and the latents and outputs that networks hand over. Only the forward passes of the
encoder, the decoder and the DiT change, by `torch.autocast` around each. Training sets none of this: its precision is
that of its weights.

Autocast casts the weights anew in every pass. Tiles on a GPU are hundreds of cells, so that this is 1 or 2 % of a
pass, and no copy of the weights is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec, Protocol, TypeVar, get_args

from scldm.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
TENSOR_CORES = (8, 0)  # compute capability from which tf32 and bf16 products exist
ADAPTIVE = "dopri5"


class PrecisionError(InputError, ValueError):
    """Raised for a precision that a device does not have."""


@dataclass(frozen=True)
class Numerics:
    """What decides the rounding of a result besides models and settings."""

    precision: Precision
    device: str  # kind: cpu or cuda

    def as_plain(self) -> dict[str, str]:
        """Return the entries of provenance."""
        return {"precision": self.precision, "device": self.device}


def available(device: torch.device) -> tuple[Precision, ...]:
    """Return the precisions that a device has, the default of jobs first.

    A CPU computes bf16 correctly and slowly: fp32 is its default.
    """
    import torch

    if device.type != "cuda":
        return ("fp32", "bf16")
    # including_emulation: a card without such products would convert every operand, slower than fp32.
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    tf32 = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= TENSOR_CORES
    return (*(("bf16",) if bf16 else ()), *(("tf32",) if tf32 else ()), "fp32")


def resolve(
    wanted: Precision | None, device: torch.device, *, where: str = "precision", solver: str | None = None
) -> Precision:
    """Return the precision of a device.

    Args:
        wanted: As set; None: by device, bf16 on a GPU that has it, else tf32, else fp32, and fp32 on a CPU.
        device: Of the networks.
        where: Name of the setting, for messages.
        solver: Of the flow, if one is integrated. dopri5 measures its error by differences of velocities, and takes the
            rounding of bf16 for one: a small flow took 182 evaluations in place of 32. By device it gets fp32.

    Raises:
        PrecisionError: The device does not have it.
    """
    found = available(device)
    if wanted is None:
        return "fp32" if solver == ADAPTIVE else found[0]
    if wanted in found:
        return wanted
    if device.type != "cuda":
        raise PrecisionError(cpu_problem(where))
    import torch

    raise PrecisionError(
        f"{where} ({wanted}): {torch.cuda.get_device_name(device)} computes no {wanted} products, it has "
        f"{' and '.join(found)}; leave {where} out, or set {where}={found[0]}"
    )


def cpu_problem(where: str) -> str:
    """Return why tf32 cannot be asked of a CPU, and what to do."""
    return (
        f"{where} (tf32) exists on NVIDIA GPUs, and the networks are on a CPU; leave {where} out, or set {where}=fp32"
    )


def set_precision(network: nn.Module, precision: Precision | None) -> None:
    """Set the precision of a network's forward passes; None: as torch computes them."""
    for module in network.modules():
        if hasattr(type(module), "precision"):
            module.precision = precision


@contextmanager
def products(precision: Precision, kind: str) -> Iterator[None]:
    """Compute products in a precision, until the block ends.

    tf32 is a switch of the process: it is put back, so that other models keep theirs. Threads that compute at the same
    time share it.

    Args:
        precision: Of matrix products.
        kind: Of the device, cpu or cuda.
    """
    import torch

    with torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16"):
        if kind != "cuda":
            yield
            return
        matmul, wanted = torch.backends.cuda.matmul, precision == "tf32"
        before = matmul.fp32_precision == "tf32"
        # allow_tf32 sets torch's older and newer switch alike; torch refuses to compile where they differ.
        matmul.allow_tf32 = wanted
        try:
            yield
        finally:
            matmul.allow_tf32 = before


class HasPrecision(Protocol):
    """A network whose forward pass has a precision; None: as torch computes it."""

    precision: Precision | None

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


Network = TypeVar("Network", bound=HasPrecision)
Given = ParamSpec("Given")


def in_own_precision(
    forward: Callable[Concatenate[Network, Given], Tensor],
) -> Callable[Concatenate[Network, Given], Tensor]:
    """Compute a forward pass in the network's precision and return fp32; fp64 of a network in fp64."""
    import torch

    @wraps(forward)
    def wrapped(self: Network, *args: Given.args, **kwargs: Given.kwargs) -> Tensor:
        if self.precision is None:
            return forward(self, *args, **kwargs)
        with products(self.precision, next(self.parameters()).device.type):
            out = forward(self, *args, **kwargs)
        return out if out.dtype == torch.float64 else out.float()

    return wrapped


@contextmanager
def whole_products(x: Tensor) -> Iterator[None]:
    """Compute products as their operands are, on the device of a tensor, where a network's others are cast."""
    import torch

    if not rounds_products(x):
        yield
        return
    with torch.autocast(x.device.type, enabled=False):
        yield


def rounds_products(x: Tensor) -> bool:
    """Return whether products on the device of a tensor are cast to a lower precision.

    Hand-written kernels do not take part in autocast: they mix in-place operations, which it leaves as they are, with
    others, which it casts. The plain form must be taken then.
    """
    import torch

    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
