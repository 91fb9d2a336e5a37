"""Mistakes that are planted in the package, to see that the pretended device finds them: the test of the test.

Some raise, as on a GPU. The others are legal and slow, and show as launches, syncs or copies above a step's budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import scldm
import scldm.api.model  # loads what takes `flat` from `parts`, before that is replaced
import scldm.api.parts as notebook
import scldm.nn.dit as dit
from helpers.pretended.device import Record
from helpers.pretended.patches import pretended
from helpers.pretended.steps import flow_step, vae_step
from scldm.nn.vae import VAE

STEP = "vae_step@1024_genes"


@dataclass(frozen=True)
class Fault:
    """What became of a planted mistake: the error that it raised, or what the step asked of the device."""

    error: str | None
    record: dict[str, int]


def in_the_loss(change: Callable[[Tensor], Tensor]) -> Any:
    """Plant a change of the loss of each cell, (b,)."""
    nll = VAE.nll
    return mock.patch.object(VAE, "nll", lambda self, *args, **more: change(nll(self, *args, **more)))


def in_the_loss_of_a_vae() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return mistakes by name; each gives back the loss that it was given."""
    return {
        "a tensor left on the CPU": lambda x: x + torch.zeros(len(x)),
        "numpy() of a CUDA tensor": lambda x: x + float(x.detach().numpy().sum() * 0),
        "a generator of the CPU": lambda x: x + 0 * torch.randn(len(x), generator=torch.Generator(), device=x.device),
        "an added item()": lambda x: x + 0 * x.sum().item(),
        "an added boolean mask": lambda x: x[x == x],
        "an added index on the CPU": lambda x: x[torch.arange(len(x))],
        "an added copy to the device": lambda x: x + torch.zeros(len(x)).to(x.device),
        "an added kernel": lambda x: x + 0,
        "no mistake": lambda x: x,
    }


def planted(folder: Path) -> dict[str, dict[str, Any]]:
    """Plant every mistake in turn; return what became of it, by name."""
    found = {}
    for name, change in in_the_loss_of_a_vae().items():
        found[name] = attempt(in_the_loss(change), lambda device: vae_step(device, 1024))
    on_cpu = mock.patch.object(dit, "time_frequencies", _frequencies_on_the_cpu)
    found["frequencies made on the CPU"] = attempt(on_cpu, lambda device: flow_step(device, 1))
    on_host = mock.patch.object(notebook, "flat", lambda z: z.flatten(1).float().numpy())
    found["latents that stay on the device"] = attempt(on_host, lambda device: _encoded(folder))
    return {name: asdict(fault) for name, fault in found.items()}


def attempt(patch: Any, step: Callable[[Any], Record]) -> Fault:
    with patch, pretended() as device:
        try:
            return Fault(None, step(device).totals())
        except Exception as error:
            return Fault(f"{type(error).__name__}: {error}", {})


def _frequencies_on_the_cpu(t: Tensor) -> Tensor:
    steps = torch.arange(dit.N_FREQUENCIES // 2, dtype=torch.float32)  # without the device of t
    angles = t.float()[:, None] * torch.exp(-steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _encoded(folder: Path) -> Record:
    from helpers.models.small_models import write_vae
    from helpers.stages.cell_stages import real_cells

    if not folder.exists():
        write_vae(folder, genes_seq_len=None)
    scldm.load(folder, device="cuda").encode(real_cells())
    return Record()
