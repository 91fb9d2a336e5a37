"""Hours and costs: the formula on numbers that one can check by eye, and where they show."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from pipeline.config.io.loader import load_job
from pipeline.planning import cost as sizing
from pipeline.planning.plan import plan
from scldm.flow.config import SamplerConfig, Solver
from scldm.flow.solvers import solve_ode
from scldm.nn.config import DiTConfig, VAEConfig

ROOT = Path(__file__).resolve().parents[3]
VAE, DIT = VAEConfig(), DiTConfig()


def test_an_hour_of_a_device_is_an_hour():
    """312e12 x 20 % x 3600 s on one A100 is an hour at the higher MFU, and four at the lower."""
    found = sizing.estimate(312e12 * 0.20 * 3600, gpus=1, price=10)
    assert found.hours == pytest.approx((1, 4))
    assert found.dollars == pytest.approx((10, 40))


def test_nodes_are_paid_whole_and_twice_the_gpus_take_half_the_time():
    one, nine = (sizing.estimate(1e18, gpus) for gpus in (1, 9))
    assert (one.nodes, nine.nodes) == (1, 2)
    assert nine.hours[0] == pytest.approx(one.hours[0] / 9)
    assert nine.dollars[0] == pytest.approx(nine.hours[0] * 2 * sizing.PRICES[sizing.NODE])


def test_guidance_doubles_the_networks_share_and_a_midpoint_step_is_two():
    cost = lambda **s: sizing.generate_flops(DIT, VAE, SamplerConfig(**s), cells=1, n_genes=100)  # noqa: E731
    decode = cost(solver="euler", steps=1) * 2 - cost(solver="euler", steps=2)
    assert cost(guidance=2.0) - decode == pytest.approx(2 * (cost(guidance=1.0) - decode))
    assert cost(solver="midpoint", steps=5) == pytest.approx(cost(solver="euler", steps=10))


def test_every_solver_has_a_cost():
    assert set(sizing.EVALUATIONS) == set(get_args(Solver))


@pytest.mark.parametrize("solver", sorted(set(get_args(Solver)) - {"dopri5"}))
def test_a_solver_evaluates_as_often_as_its_cost_says(solver):
    times = [i / 14 for i in range(15)]
    solution = solve_ode(lambda x, t: -x, torch.ones(1, 1), times, solver=solver, rtol=1e-5, atol=1e-5)
    assert solution.nfe == 14 * sizing.EVALUATIONS[solver] + sizing.STARTING.get(solver, 0)


def test_encoding_is_less_than_half_a_forward_pass():
    from scldm.nn.flops import vae_flops

    encode = sizing.encode_flops(VAE, cells=1, expressed=1000)
    assert 0 < encode < vae_flops(VAE, n_genes=2000, expressed=1000) / 2


def test_plan_says_time_and_cost_of_a_job_on_gpus_and_none_on_cpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = ROOT / "jobs" / "train_vae.yaml"
    assert "$" not in plan(load_job(job))
    said = plan(load_job(job, ["resources={workers: 4, gpus_per_worker: 1}"]))
    assert "not measured on a GPU" in next(line for line in said.splitlines() if "$" in line)


def test_the_table_in_the_documentation_is_what_the_formula_gives():
    assert sizing.paper_table() in (ROOT / "docs" / "operations.md").read_text()
