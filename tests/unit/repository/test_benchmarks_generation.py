"""The benchmark of generation: both sides do the work that they say, and the quality table has what it needs."""

from __future__ import annotations

import anndata
import distilled_quality
import generation
import generation_quality as quality
import numpy as np
import pandas as pd
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


def test_distilled_flows_are_compared_with_the_exact_solution_beside_a_control(tmp_path):
    cells = quality.made_up_cells(n=120, n_genes=80)
    obs = pd.DataFrame({"cell_type": np.resize(["a", "b"], 120)}, index=[str(i) for i in range(120)])
    anndata.AnnData(cells, obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    effort = distilled_quality.Effort(
        n_genes=60, vae_steps=2, flow_steps=2, flow_width=16, flow_layers=1, trajectories=48, distil_steps=2,
        n_cells=40, halves=5,
    )  # fmt: skip
    found = distilled_quality.compare(distilled_quality.train_pair(tmp_path / "cells.h5ad", effort), effort)
    who = ["exact", "adams 14", *(f"{x} {n}" for n in (1, 2, 4) for x in ("distilled", "euler"))]
    keys = [(r["space"], r["score"], r["candidate"]) for r in found["rows"]]
    assert keys == [(s, k, c) for s in ("latents", "cells") for k in ("frechet", "w2", "recall") for c in who]
    assert all(r["half_width"] >= 0 for r in found["rows"] if r["candidate"] != "exact")
    assert [len(found[f"distilled {n}"]["missed"]) for n in (1, 2, 4)] == [1, 2, 4]
