"""Checkpoint files: each worker's pieces of parameters in one safetensors file, readable by any number of workers.

A tensor is named `<field>/<first element>/<parameter>`. A worker assembles its part of a parameter from the pieces that
overlap it, whoever wrote them; with the same number of workers, its own piece comes back bit for bit. No pickle
anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.core.faults import fault_point
from pipeline.training.engine.partitions import STEP, WEIGHT, Fields, Flat, Piece

WHOLE = "whole"  # field of tensors without optimizer state: buffers, and parameters that are not trained
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHUNK = 64 << 20


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file, flushed to disk, and return its size and sha256.

    The library's own writer is not used: here the hash is computed while writing instead of by reading a file of
    gigabytes again, tensors are copied from the device one at a time, and a full disk is an OSError.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as f:
        for part in (len(head).to_bytes(8, "little"), head):
            f.write(part)
            digest.update(part)
        for tensor in tensors.values():
            data = memoryview(_bytes(tensor))
            for i in range(0, len(data), CHUNK):
                f.write(data[i : i + CHUNK])
                digest.update(data[i : i + CHUNK])
        fault_point("checkpoint.in_shard")
        f.flush()
        os.fsync(f.fileno())
    return 8 + len(head) + end, digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def shard_name(rank: int, world_size: int) -> str:
    """Return the name of the file that a worker writes."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def shard_tensors(
    flats: list[Flat], optimizer: torch.optim.Optimizer, whole: Mapping[str, Tensor], *, rank: int, world_size: int
) -> dict[str, Tensor]:
    """Return what a worker writes: its pieces, its share of replicated flats, and on worker 0 also `whole`."""
    found: dict[str, Tensor] = {}
    for i, flat in enumerate(flats):
        if flat.replicated and i % world_size != rank:
            continue
        for piece in flat.pieces:
            for field, tensor in flat.fields(optimizer, piece).items():
                found[f"{field}/{piece.start}/{piece.name}"] = tensor
    if rank == 0:
        found |= {f"{WHOLE}/0/{name}": tensor for name, tensor in whole.items()}
    return found


class Shards:
    """Reads the state in a checkpoint folder, by parameter."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self.folder = folder
        self._held: dict[str, dict[str, list[tuple[int, Any, str]]]] = {}  # name -> field -> (start, file, key)
        for path in sorted(folder.glob("state-*.safetensors")):
            file = safe_open(str(path), framework="pt")
            for key in file.keys():  # noqa: SIM118 (no mapping)
                field, start, name = key.split("/", 2)
                self._held.setdefault(name, {}).setdefault(field, []).append((int(start), file, key))
        for fields in self._held.values():
            for parts in fields.values():
                parts.sort(key=lambda part: part[0])

    def fields(self, piece: Piece) -> Fields:
        """Return weights and state of a piece. Raises KeyError if the folder lacks any of its elements."""
        fields = self._held.get(piece.name, {})
        if WEIGHT not in fields:
            raise KeyError(f"{self.folder} holds no weights of {piece.name}")
        return {f: self._first(piece.name, f) if f == STEP else self._elements(f, piece) for f in fields}

    def whole(self, name: str) -> Tensor:
        """Return a tensor without optimizer state, in its own shape."""
        if WHOLE not in self._held.get(name, {}):
            raise KeyError(f"{self.folder} holds no {name}")
        return self._first(name, WHOLE)

    def weight(self, name: str, shape: torch.Size) -> Tensor:
        """Return a trained parameter in fp32 and in full."""
        return self._elements(WEIGHT, Piece(name, 0, shape.numel(), 0)).view(shape)

    def _first(self, name: str, field: str) -> Tensor:
        _, file, key = self._held[name][field][0]
        return file.get_tensor(key)

    def _elements(self, field: str, piece: Piece) -> Tensor:
        stop, at, parts = piece.start + piece.numel, piece.start, []
        for start, file, key in self._held[piece.name][field]:
            view = file.get_slice(key)
            end = start + view.get_shape()[0]
            if start <= at < end:
                upto = min(stop, end)
                parts.append(view[at - start : upto - start])
                at = upto
        if at < stop:
            raise KeyError(f"{self.folder} holds {field} of {piece.name} up to element {at} only; {stop} are needed")
        return torch.cat(parts) if len(parts) != 1 else parts[0]
