"""The launches that a plan counts by layers are those of the networks: torch's operations that start a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.planning.launches import (
    DECODE,
    DIT_EVALUATION,
    DIT_TRAINING,
    ENCODE,
    VAE_TRAINING,
    generate_launches,
    vae_step_launches,
)
from pipeline.training.objectives.flow import Draws, flow_losses
from scldm.data.batch import CellBatch
from scldm.flow.config import PathConfig
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.decoder import TILE
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE

NO_KERNEL = ("detach", "alias", "_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided")
SIZES = {"d_model": 64, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 8}  # wide heads: the form of a GPU


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += not func.is_view and func._schema.name.split("::")[1] not in NO_KERNEL
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(*, bf16: bool) -> Iterator[Counter]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), Counter() as counter:
        yield counter


def near(counted: int) -> Any:
    """A change of the networks by more than a fifth is one that a plan should know."""
    return pytest.approx(counted, rel=0.2)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("layers", "tiles"), [(1, 1), (4, 3)])
def test_of_the_vae(layers, tiles, bf16):
    torch.manual_seed(0)
    n_genes = tiles * TILE
    vae = VAE(VAEConfig(**SIZES, n_layers=layers), n_genes=n_genes)
    vae.encoder.packed = True
    cells = CellBatch.from_dense((torch.rand(3, n_genes) < 0.05).float() + torch.eye(3, n_genes))
    with counted(bf16=bf16) as step:
        vae(cells, None).mean().backward()
    assert VAE_TRAINING[bf16].total(2 * layers, tiles) == near(step.n)
    with torch.no_grad(), counted(bf16=bf16) as encode:
        z = vae.encode(cells)
    with torch.no_grad(), counted(bf16=bf16) as decode:
        vae.decode_mu(z, cells.library_size)
    assert ENCODE[bf16].total(layers) == near(encode.n)
    assert DECODE[bf16].total(layers, tiles) == near(decode.n)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layers", [1, 8])
def test_of_the_flow(layers, bf16):
    torch.manual_seed(0)
    dit = DiT(DiTConfig(d_model=32, n_layers=layers, n_heads=2), n_latent_tokens=4, latent_width=4, n_classes={"a": 3})
    z, t, ids = torch.randn(3, 4, 4), torch.rand(3), {"a": torch.zeros(3, dtype=torch.int64)}
    with counted(bf16=bf16) as step:
        flow_losses(dit, z, Draws(z, t, torch.rand(3, 2)), ids, PathConfig()).mean().backward()
    with torch.no_grad(), counted(bf16=bf16) as evaluation:
        dit(z, t, ids)
    assert DIT_TRAINING[bf16].total(layers) == near(step.n)
    assert DIT_EVALUATION[bf16].total(layers) == near(evaluation.n)


def test_a_larger_micro_batch_has_more_tiles_but_fewer_launches_for_a_cell():
    config = VAEConfig(d_model=256, n_layers=8, n_heads=8, n_latent_tokens=256, latent_width=16)
    few, many = (vae_step_launches(config, cells=b, n_genes=8192, precision="bf16") for b in (32, 128))
    assert few < many < 4 * few


def test_generation_evaluates_the_network_and_decodes_once():
    sizes = {"evaluations": 10, "cells": 1024, "n_genes": 2000, "precision": "fp32"}
    one, two = (generate_launches(DiTConfig(n_layers=n), VAEConfig(**SIZES), **sizes) for n in (1, 2))
    assert two - one == 10 * DIT_EVALUATION[False].block
