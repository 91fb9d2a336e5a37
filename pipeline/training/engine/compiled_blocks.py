"""Compile the parts of a network that most of its time goes into, each on its own.

A transformer block has one shape in all layers and all steps, so that one compilation serves them all, in seconds for
each shape; a whole network would be compiled for minutes, and again whenever a shape changes.
"""

from __future__ import annotations

import shutil

import torch
from torch import nn

from scldm.errors import InputError
from scldm.nn.decoder import Decoder
from scldm.nn.dit import DiTBlock
from scldm.nn.layers import SelfAttentionBlock

COMPILERS = ("c++", "g++", "clang++")


def compile_blocks(module: nn.Module, *, backend: str = "inductor") -> None:
    """Let torch compile the blocks of a network and its decoder's tiles when they are first called.

    Names and types of the parameters stay as they are.

    Args:
        backend: Of `torch.compile`.

    Raises:
        InputError: This worker has no C++ compiler.
    """
    if not any(map(shutil.which, COMPILERS)):
        raise InputError(
            "train.compile (true) needs a C++ compiler on every worker, and this one has none of "
            f"{', '.join(COMPILERS)}; install one, or set train.compile=false"
        )
    for part in module.modules():
        if isinstance(part, (SelfAttentionBlock, DiTBlock)):
            part.compile(dynamic=False, backend=backend)
        elif isinstance(part, Decoder):
            part.decode_tile = torch.compile(part.decode_tile, dynamic=False, backend=backend)  # type: ignore[method-assign]
