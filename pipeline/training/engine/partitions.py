"""Locates the weights and the optimizer state in DeepSpeed, under every ZeRO stage.

The base optimizer updates *flats*: tensors that hold *pieces*, elements [start, start + numel) of named parameters, in
an order and with a padding that depend on the stage and on the number of workers. Expressed in pieces, a state depends
on neither. All private attributes of DeepSpeed that this needs are read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Fields = dict[str, Tensor]  # a piece's "weight", the optimizer's fields such as "exp_avg", and its "step"
STEP = "step"  # the one field that a flat has once, not for each element
WEIGHT = "weight"


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a parameter, at [at, at + numel) of a flat."""

    name: str
    start: int
    numel: int
    at: int


@dataclass(frozen=True)
class Flat:
    """A tensor that the optimizer updates, on this worker."""

    tensor: Tensor  # fp32, of any shape; the key of its optimizer state
    pieces: list[Piece]
    replicated: bool  # whether every worker holds a copy

    def fields(self, optimizer: torch.optim.Optimizer, piece: Piece) -> Fields:
        """Return views of a piece's weights and state. The step is always a tensor, as in a file."""
        own = slice(piece.at, piece.at + piece.numel)
        found = {WEIGHT: self.tensor.detach().reshape(-1)[own]}
        for name, value in optimizer.state.get(self.tensor, {}).items():
            if name == STEP:
                found[STEP] = torch.as_tensor(value, dtype=torch.float64)
            else:
                found[name] = value.detach().reshape(-1)[own]
        return found

    @torch.no_grad()
    def fill(self, optimizer: torch.optim.Optimizer, read: Callable[[Piece], Fields]) -> None:
        """Fill weights and state of every piece from `read`; the padding between pieces is zero."""
        state: dict[str, Any] = {}
        flat = self.tensor.detach().view(-1)
        for piece in self.pieces:
            own = slice(piece.at, piece.at + piece.numel)
            for name, value in read(piece).items():
                if name == WEIGHT:
                    flat[own].copy_(value)
                elif name == STEP:
                    state[STEP] = _counter(optimizer, float(value), self.tensor.device)
                else:
                    whole = state.setdefault(name, torch.zeros_like(self.tensor, requires_grad=False))
                    whole.view(-1)[own].copy_(value)
        if state:
            optimizer.state[self.tensor] = state


def _counter(optimizer: torch.optim.Optimizer, step: float, device: torch.device) -> int | Tensor:
    """Return the number of optimizer steps, in the type that this optimizer counts with."""
    if not isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam)):
        return int(step)
    fused = bool(optimizer.defaults.get("fused"))
    return torch.tensor(step, dtype=torch.float32, device=device if fused else "cpu")


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside DeepSpeed's."""
    return getattr(optimizer, "optimizer", optimizer)


def flats_of(optimizer: Any, module: nn.Module, *, rank: int) -> list[Flat]:
    """Return all flats of this worker.

    Args:
        optimizer: DeepSpeed's optimizer, or the torch optimizer itself (stage 0).

    Raises:
        NotImplementedError: if the optimizer's layout is not known.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_stage_3(optimizer, trained, rank))
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return list(_stages_1_and_2(optimizer.single_partition_of_fp32_groups, trained))
    if optimizer is not base_optimizer(optimizer):
        raise NotImplementedError(
            f"checkpoints cannot locate the weights of {type(optimizer).__name__}; use another train.zero_stage"
        )
    names = {id(p): name for name, p in trained}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [Flat(p, [Piece(names[id(p)], 0, p.numel(), 0)], replicated=True) for p in parameters]


def _stage_3(optimizer: Any, trained: list[tuple[str, Any]], rank: int) -> Iterator[Flat]:
    """Yield the flats of ZeRO stage 3: every parameter is split in one part per worker, the last ones padded."""
    pieces: dict[int, list[Piece]] = {}
    for name, p in trained:
        group, at, size = optimizer.grad_position[optimizer.get_param_id(p)]
        start = rank * size
        if (numel := min(size, p.ds_numel - start)) > 0:
            pieces.setdefault(group, []).append(Piece(name, start, numel, at))
    for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        if flat.numel() == 0 and pieces.get(group):
            raise NotImplementedError("checkpoints cannot read optimizer state that is offloaded to NVMe; use cpu")
        yield Flat(flat, pieces.get(group, []), replicated=False)


def _stages_1_and_2(partitions: list[Tensor], trained: list[tuple[str, Any]]) -> Iterator[Flat]:
    """Yield the flats of ZeRO stages 1 and 2: all parameters end to end are split in one partition per worker."""
    pieces: dict[int, list[Piece]] = {}
    for name, p in trained:
        mapping = p._hp_mapping  # None if this worker holds no part of it
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            piece = Piece(name, here.start, here.numel, there.start)
            pieces.setdefault(mapping.param_group_index, []).append(piece)
    for group, flat in enumerate(partitions):
        yield Flat(flat, pieces.get(group, []), replicated=False)


@torch.no_grad()
def weights_from_flats(optimizer: Any) -> None:
    """Copy the weights in the flats to those that the network computes with. Collective."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
