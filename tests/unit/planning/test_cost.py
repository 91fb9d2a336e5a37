"""GPU hours: the formula on numbers that one can check by eye, and where they are shown."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import get_args

import pytest
import torch

from pipeline.config.io.loader import load_job
from pipeline.planning import cost
from pipeline.planning.plan import plan
from pipeline.workflow.schedule import resolve
from scldm.flow.config import SamplerConfig, Solver
from scldm.flow.solvers import solve_ode
from scldm.nn.config import DiTConfig, VAEConfig

ROOT = Path(__file__).resolve().parents[3]
VAE, DIT = VAEConfig(), DiTConfig()


def test_hours_follow_from_operations_peak_and_utilization():
    """312e12 x 20 % x 3600 s on one A100 is an hour at the higher MFU, and four at the lower."""
    found = cost.estimate(312e12 * 0.20 * 3600, gpus=1)
    assert found.hours == pytest.approx((1, 4))
    assert found.gpu_hours == "1.0 to 4.0"


def test_twice_the_gpus_take_half_the_time_and_the_same_gpu_hours():
    one, two = (cost.estimate(1e18, gpus) for gpus in (1, 2))
    assert two.hours[0] == pytest.approx(one.hours[0] / 2)
    assert two.gpu_hours == one.gpu_hours


def test_guidance_doubles_the_networks_share_and_a_midpoint_step_is_two():
    flops = lambda **s: cost.generate_flops(DIT, VAE, SamplerConfig(**s), cells=1, n_genes=100)  # noqa: E731
    decode = flops(solver="euler", steps=1) * 2 - flops(solver="euler", steps=2)
    assert flops(guidance=2.0) - decode == pytest.approx(2 * (flops(guidance=1.0) - decode))
    assert flops(solver="midpoint", steps=5) == pytest.approx(flops(solver="euler", steps=10))


def test_every_solver_has_a_number_of_evaluations():
    assert set(cost.EVALUATIONS) == set(get_args(Solver))


@pytest.mark.parametrize("solver", sorted(set(get_args(Solver)) - {"dopri5"}))
def test_a_solver_evaluates_as_often_as_the_estimate_counts(solver):
    times = [i / 14 for i in range(15)]
    solution = solve_ode(lambda x, t: -x, torch.ones(1, 1), times, solver=solver, rtol=1e-5, atol=1e-5)
    assert solution.nfe == 14 * cost.EVALUATIONS[solver] + cost.STARTING.get(solver, 0)


def test_encoding_is_less_than_half_a_forward_pass():
    from scldm.nn.flops import vae_flops

    encode = cost.encode_flops(VAE, cells=1, expressed=1000)
    assert 0 < encode < vae_flops(VAE, n_genes=2000, expressed=1000) / 2


def test_plan_shows_gpu_hours_of_a_job_on_gpus_and_none_on_cpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = ROOT / "jobs" / "train_vae.yaml"
    assert "GPU hours" not in plan(resolve(load_job(job)))
    text = plan(resolve(load_job(job, ["resources={workers: 4, gpus_per_worker: 1}"])))
    assert "not measured on an A100" in next(line for line in text.splitlines() if "GPU hours" in line)


def test_the_table_in_the_documentation_is_what_the_formula_gives():
    assert (
        runpy.run_path(str(ROOT / "docs" / "gpu_hours.py"))["paper_table"]()
        in (ROOT / "docs" / "operations.md").read_text()
    )


@pytest.mark.parametrize(
    ("guidance", "strategy", "start", "outputs"),
    [
        (1.0, "joint", "noise", 1), (0.0, "joint", "noise", 1), (2.0, "joint", "noise", 2),
        ({"*": 1.0, "drug": 0.5}, "joint", "noise", 3), ({"*": 0.0, "drug": 1.0}, "joint", "noise", 1),
        ({"*": 2.0, "drug": 0.5, "type": 3.0}, "joint", "noise", 4), ({"*": 1.0, "drug": 0.5}, "joint", "control", 4),
        ({"type": 2.0, "drug": 2.0}, "joint", "noise", 2),
        ({"type": 2.0, "drug": 0.5}, "mutually_exclusive", "noise", 3),
    ],
)  # fmt: skip
def test_evaluations_follow_from_the_outputs_that_guidance_needs(guidance, strategy, start, outputs):
    sampler = SamplerConfig(solver="euler", steps=10, guidance=guidance)
    assert cost.generation_evaluations(sampler, strategy, start) == 10 * outputs
