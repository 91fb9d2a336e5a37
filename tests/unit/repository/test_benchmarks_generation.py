"""The benchmark of generation: both sides do the work that they say, and the quality table has what it needs."""

from __future__ import annotations

import anndata
import generation
import generation_quality as quality
import pytest
import torch
from generation_sides import SMALL, build_pair, our_actor, our_cells, our_phases, upstream_cells, upstream_latents

from scldm.flow.config import SamplerConfig

TINY = quality.Effort(n_genes=60, vae_steps=2, flow_steps=2, flow_width=16, flow_layers=1, n_cells=20)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build_pair(SMALL, tmp_path_factory.mktemp("pair"))


def test_both_sides_write_the_cells_asked_for(pair):
    actor = our_actor(pair, 40, SamplerConfig(steps=2))
    our_cells(actor)
    assert anndata.read_h5ad(pair.folder / "cells" / "part-00000.h5ad").n_obs == 40
    upstream_cells(pair, 40, 1.0)
    cells = anndata.read_h5ad(pair.folder / "upstream.h5ad")
    assert cells.shape == (40, SMALL.n_genes)
    assert cells.X.sum() > 0


def test_phases_cover_flow_decode_draw_and_write(pair):
    rates = our_phases(our_actor(pair, 40, SamplerConfig(steps=1)))
    assert set(rates) == {"flow", "decode", "draw", "write"}
    assert all(rate > 0 for rate in rates.values())


def test_upstreams_recipe_and_ours_solve_the_same_equation(pair):
    errors = generation.latent_errors(pair, 4)
    for w in (1, 2):
        assert errors[f"ours dopri5 1e-5, w={w}"] < 1e-3
        assert errors[f"upstream dopri5 1e-5, w={w}"] < 1e-3
    assert pair.dit.input.weight.dtype == torch.float32
    assert upstream_latents(pair.dit, torch.randn(2, 4, 4), {"clusters": torch.tensor([0, 1])}, 1.0).nfe > 6


def test_the_quality_table_has_a_row_for_each_solver_and_the_floor():
    rows = quality.curve(quality.train_pair(None, TINY), TINY)
    names = [r["solver"] for r in rows]
    assert len(names) == len(quality.SOLVERS) + 4
    assert names[-1] == "real | real (halves)"
    assert {"evaluations", "latent error", "Fréchet²", "MMD²"} <= set(rows[0])
