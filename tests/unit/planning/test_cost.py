"""GPU hours: the formula on numbers that one can check by eye, and where they are shown."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from pipeline.config.io.loader import load_job
from pipeline.config.resources import ResourcesConfig
from pipeline.planning import cost
from pipeline.planning.plan import plan
from pipeline.workflow.schedule import resolve
from scldm.flow.config import SamplerConfig, Solver
from scldm.flow.solvers import solve_ode
from scldm.nn.config import DiTConfig, VAEConfig

ROOT = Path(__file__).resolve().parents[3]
VAE, DIT = VAEConfig(), DiTConfig()


def test_hours_follow_from_operations_peak_and_the_share_that_kernels_reach():
    """312e12 x 40 % x 3600 s on one A100 is an hour at best, and five at worst, at 8 %."""
    found = cost.estimate(312e12 * 0.40 * 3600, gpus=1)
    assert found.hours == pytest.approx((1, 5))
    assert found.gpu_hours == "1.0 to 5.0"
    assert found.mfu == pytest.approx((0.08, 0.40))


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 312e12), ("tf32", 156e12), ("fp32", 19.5e12)])
def test_the_peak_is_that_of_the_precision_in_use(precision, peak):
    worst, best = cost.SHARES[precision]
    found = cost.estimate(1e18, gpus=2, precision=precision)
    assert found.hours == pytest.approx([1e18 / (2 * peak * share) / 3600 for share in (best, worst)])
    assert f"({precision}, {100 * worst:.3g}".removesuffix(".0") in str(found)


def test_launches_hide_behind_computation_at_best_and_add_to_it_at_worst():
    """A million launches take 4 s at best and 10 s at worst."""
    computed = 312e12 * 0.40  # a second at best, five at worst
    assert cost.estimate(computed, 1, launches=1e6).hours == pytest.approx((4 / 3600, 15 / 3600))
    assert cost.estimate(10 * computed, 1, launches=1e6).hours == pytest.approx((10 / 3600, 60 / 3600))
    assert cost.estimate(computed, 1, launches=1e6).mfu == pytest.approx((0.4 / 15, 0.4 / 4))


def test_twice_the_gpus_take_half_the_time_and_the_same_gpu_hours():
    one, two = (cost.estimate(1e18, gpus) for gpus in (1, 2))
    assert two.hours[0] == pytest.approx(one.hours[0] / 2)
    assert two.gpu_hours == one.gpu_hours


def test_a_price_is_shown_if_it_is_set_and_none_is_invented():
    found = cost.estimate(312e12 * 0.40 * 3600, gpus=10)
    assert "a GPU hour" not in str(found)
    assert str(replace(found, price=2.5)).endswith("; 2.5 to 12 at 2.5 a GPU hour")


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


def test_plan_shows_launches_gpu_hours_and_their_price_of_a_job_on_gpus_and_none_on_cpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = ROOT / "jobs" / "train_vae.yaml"
    on_cpus = plan(resolve(load_job(job)))
    assert "GPU hours" not in on_cpus
    assert "kernel launches" not in on_cpus
    gpus = "resources={workers: 4, gpus_per_worker: 1}"
    text = plan(resolve(load_job(job, [gpus, "train.precision=fp32"])))
    line = next(line for line in text.splitlines() if "GPU hours" in line)
    assert "not measured on an A100" in line
    assert "(fp32, " in line
    assert " a GPU hour" not in line
    assert "kernel launches a step on each GPU" in text
    text = plan(resolve(load_job(job, [gpus, "resources.gpu_hour_price=3", "train.precision=bf16"])))
    line = next(line for line in text.splitlines() if "GPU hours" in line)
    assert line.endswith(" at 3 a GPU hour")
    assert "(bf16, " in line


def test_a_job_without_a_price_is_recorded_as_before_there_was_one():
    assert "gpu_hour_price" not in ResourcesConfig().model_dump()
    assert ResourcesConfig(gpu_hour_price=2.0).model_dump()["gpu_hour_price"] == 2


def test_inference_is_priced_by_its_precision_and_by_the_default_of_a_gpu_without_one():
    from pipeline.config.job import EncodeConfig, GenerateConfig

    assert cost.inference_precision(EncodeConfig()) == "bf16"
    assert cost.inference_precision(EncodeConfig(precision="tf32")) == "tf32"
    adaptive = GenerateConfig.model_validate({"n_cells": 5, "sampler": {"solver": "dopri5"}})
    assert cost.inference_precision(adaptive) == "fp32"


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
