"""ODE and SDE solvers and the likelihood: upstream's records, known solutions, orders of convergence."""

import math
import os
import subprocess
import sys

import pytest
import torch
from helpers.models.recorded_dit import dit_of
from helpers.models.toy_flow import path_config, toy_field
from helpers.models.upstream_fixtures import load_fixture
from parity.kinds.transport import DIFFUSION_NAMES

from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.guidance import guided_velocity
from scldm.flow.likelihood import log_likelihood, rademacher, standard_normal_log_prob
from scldm.flow.objective import to_velocity
from scldm.flow.path import sampling_interval
from scldm.flow.sampler import sample_latents, time_grid
from scldm.flow.sde import SDEOptions, solve_sde
from scldm.flow.solvers import TABLEAUX, solve_dopri5, solve_ode

FIXED = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun", "heun3": "heun3", "rk4": "rk4"}
ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}


def linear_field(x, t):
    """x' = t x - 1 x: x(1) = x(0) exp(-1/2)."""
    return (t - 1).view(-1, 1) * x


def even_times(n: int, t0: float = 0.0, t1: float = 1.0) -> list[float]:
    return [t0 + (t1 - t0) * i / n for i in range(n)] + [t1]


@pytest.mark.parametrize("solver", TABLEAUX)
def test_a_fixed_step_solver_converges_at_its_order(solver):
    x0 = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)

    def error(n: int) -> float:
        solution = solve_ode(linear_field, x0, even_times(n), solver=solver)
        assert solution.nfe == n * len(TABLEAUX[solver].b)
        return (solution.x - x0 * math.exp(-0.5)).abs().max().item()

    assert math.log2(error(20) / error(40)) == pytest.approx(ORDER[solver], abs=0.15)


@pytest.mark.parametrize("uneven", [False, True])
def test_adams_converges_at_third_order_with_one_evaluation_a_step(uneven):
    x0 = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)

    def error(n: int) -> float:
        times = [t**1.5 for t in even_times(n)] if uneven else even_times(n)
        solution = solve_ode(linear_field, x0, times, solver="adams")
        assert solution.nfe == n + 2
        return (solution.x - x0 * math.exp(-0.5)).abs().max().item()

    assert math.log2(error(40) / error(80)) == pytest.approx(3, abs=0.3)


@pytest.mark.parametrize("overshoot", [False, True])
def test_dopri5_meets_its_tolerance_forwards_and_backwards(overshoot):
    x0 = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    there = solve_dopri5(linear_field, x0, 0.0, 1.0, rtol=1e-8, atol=1e-8, overshoot=overshoot)
    torch.testing.assert_close(there.x, x0 * math.exp(-0.5), rtol=1e-7, atol=1e-7)
    back = solve_dopri5(linear_field, there.x, 1.0, 0.0, rtol=1e-8, atol=1e-8, overshoot=overshoot)
    torch.testing.assert_close(back.x, x0, rtol=1e-7, atol=1e-7)


def test_dopri5_never_evaluates_outside_the_interval_and_counts_its_evaluations():
    seen = []

    def field(x, t):
        seen.append(t[0].item())
        return linear_field(x, t)

    solution = solve_ode(field, torch.ones(3, 1), [0.0, 1.0], solver="dopri5")
    assert len(seen) == solution.nfe
    assert min(seen) >= 0
    assert max(seen) <= 1


def test_dopri5_names_the_time_at_which_a_field_is_not_finite():
    with pytest.raises(RuntimeError, match="not finite at t = 0"):
        solve_ode(lambda x, t: x / 0, torch.ones(1, 1), [0.0, 1.0], solver="dopri5")


def test_dopri5_stops_where_the_field_blows_up():
    """x' = x^2 from 1 is infinite at t = 1."""
    with pytest.raises(RuntimeError, match="step underflows at t = "):
        solve_ode(lambda x, t: x**2, torch.ones(1, 1), [0.0, 2.0], solver="dopri5")


def test_the_odes_of_upstream_are_reproduced():
    fixture = load_fixture("samplers")
    field, z = toy_field(fixture), fixture["in/z"]
    for case in fixture.facts["ode"]:
        if case["error"]:
            continue
        _, name, prediction, _ = case["key"].split("/")
        config = path_config(name, prediction)
        t0, t1 = sampling_interval(config)

        def velocity(x, t, config=config):
            return to_velocity(field(x, t), x, t, config)

        if case["method"] == "dopri5":
            # Rounding decides how dopri5 steps through fields that are nearly singular at t = 0.
            tolerance = 2e-5 if prediction == "velocity" else 1e-4
            for overshoot in (False, True):
                solution = solve_dopri5(velocity, z, t0, t1, rtol=1e-5, atol=1e-5, overshoot=overshoot)
                torch.testing.assert_close(solution.x, fixture[case["key"]], rtol=tolerance, atol=tolerance)
            continue
        times = even_times(case["num_steps"] - 1, t0, t1)
        solution = solve_ode(velocity, z, times, solver=FIXED[case["method"]])
        assert solution.nfe == case["nfe"]
        torch.testing.assert_close(solution.x, fixture[case["key"]], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_guided_samples_of_upstream_are_reproduced():
    """Upstream carries an unconditional copy of every cell along, in the first half of its batch."""
    fixture = load_fixture("dit_sampling")
    dit, z, conditions = dit_of(load_fixture("dit_me_single")), fixture["in/z"], fixture.under("in/cond/")
    for run in fixture.facts["runs"]:
        w, method, n = run["w"], run["method"], run["num_steps"]
        recorded = fixture[f"out/w{w:g}/{method}{n}"]
        solver = FIXED.get(method, method)
        for scale, expected in ((0.0, recorded[: len(z)]), (w, recorded[len(z) :])):
            config = SamplerConfig(solver=solver, steps=n - 1, guidance=scale)
            ours = sample_latents(dit, z, conditions, config, PathConfig())
            # dopri5 steps by the error of its batch, which here lacks upstream's other half: equal within tolerances.
            tolerance = 2e-4 if solver == "dopri5" else 3e-5
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_with_upstreams_batch_and_overshoot_dopri5_takes_upstreams_steps():
    fixture = load_fixture("dit_sampling")
    dit, z, conditions = dit_of(load_fixture("dit_me_single")), fixture["in/z"], fixture.under("in/cond/")
    fields = [guided_velocity(dit, conditions, scale=w, path=PathConfig()) for w in (0.0, 2.5)]

    def both(x, t):
        return torch.cat([field(*half) for field, half in zip(fields, zip(x.chunk(2), t.chunk(2)))])  # noqa: B905

    solution = solve_dopri5(both, torch.cat([z, z]), 0.0, 1.0, rtol=1e-5, atol=1e-5, overshoot=True)
    assert solution.nfe == next(
        run["nfe"] for run in fixture.facts["runs"] if (run["w"], run["method"]) == (2.5, "dopri5")
    )
    torch.testing.assert_close(solution.x, fixture["out/w2.5/dopri550"], rtol=2e-5, atol=2e-5)


def compare_recorded_sdes():
    fixture = load_fixture("samplers")
    field, noise = toy_field(fixture), fixture["in/sde_noise"]
    for case in fixture.facts["sde"]:
        if case["error"] or not case["finite"]:
            continue
        _, name, prediction, form, solver, last_step = case["key"].split("/")
        options = SDEOptions(
            steps=case["num_steps"] - 1,
            solver=solver.lower(),
            diffusion=DIFFUSION_NAMES[form],
            norm=case["norm"],
            last_step=last_step.lower(),
            last_step_size=case["last_step_size"],
            eps=0.0 if prediction == "velocity" and name != "VP" else 1e-3,  # upstream's rule
        )
        x = solve_sde(field, fixture["in/z"], noise.__getitem__, options, path_config(name, prediction))
        torch.testing.assert_close(
            x, fixture[case["key"]], rtol=1e-4, atol=1e-4, msg=lambda m, key=case["key"]: f"{key}: {m}"
        )


def test_the_sdes_of_upstream_are_reproduced():
    """In the arithmetic that all processors share: the states reach thousands and cancel, so that rounding shows."""
    load_fixture("samplers")  # skips here where it is absent, not in the process below
    env = {**os.environ, "MKL_CBWR": "COMPATIBLE", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = "import test_solvers; test_solvers.compare_recorded_sdes()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_an_sde_with_constant_diffusion_keeps_the_marginal_of_gaussian_data(solver):
    """Data N(0, 4) on the linear path: the velocity is known, and samples must have the variance of the data."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(20_000, 1, generator=generator)

    def velocity(x, t):
        t = t.view(-1, 1)
        return (4 * t - (1 - t)) / (4 * t**2 + (1 - t) ** 2) * x

    options = SDEOptions(steps=100, solver=solver, diffusion="constant", norm=0.3, last_step_size=0.02)
    x = solve_sde(velocity, x0, lambda _: torch.randn(x0.shape, generator=generator), options, PathConfig())
    assert x.var().item() == pytest.approx(4, rel=0.05)


def test_the_likelihoods_of_upstream_are_reproduced():
    fixture = load_fixture("samplers")
    field, z, probes = toy_field(fixture), fixture["in/z"], fixture["lik/euler11/eps"]
    torch.testing.assert_close(standard_normal_log_prob(z), fixture["prior_logp"])
    times = even_times(10, 1.0, 0.0)
    ours = log_likelihood(field, z, times, probe=probes.__getitem__, solver="euler")
    torch.testing.assert_close(ours.log_prob, fixture["lik/euler11/logp"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.x0, fixture["lik/euler11/z"], rtol=1e-5, atol=1e-5)
    adaptive = log_likelihood(field, z, [1.0, 0.0], probe=probes[0], solver="dopri5")
    torch.testing.assert_close(adaptive.x0, fixture["lik/dopri550/z"], rtol=1e-3, atol=1e-4)


def test_the_likelihood_of_a_linear_flow_is_exact():
    """x1 = x0 exp(-1/2) in two dimensions: log p(x1) = log N(x0) + 2 * 1/2."""
    x0 = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64)
    probe = rademacher(x0.shape, generator=torch.Generator().manual_seed(0), device=x0.device).double()
    ours = log_likelihood(
        linear_field, x0 * math.exp(-0.5), [1.0, 0.0], probe=probe, solver="dopri5", rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(ours.x0, x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.log_prob, standard_normal_log_prob(x0) + 1.0, rtol=1e-6, atol=1e-6)


def test_a_cell_sampled_with_fixed_steps_does_not_depend_on_its_batch():
    fixture = load_fixture("dit_sampling")
    dit, z, ids = dit_of(load_fixture("dit_me_single")).double(), fixture["in/z"].double(), fixture["in/cond/clusters"]
    config = SamplerConfig(steps=3, guidance=2.0)
    together = sample_latents(dit, z, {"clusters": ids}, config, PathConfig())
    alone = sample_latents(dit, z[1:2], {"clusters": ids[1:2]}, config, PathConfig())
    torch.testing.assert_close(together[1:2], alone, rtol=1e-10, atol=1e-12)


def test_the_time_grid_spans_the_sampling_interval_in_the_configured_steps():
    grid = time_grid(SamplerConfig(steps=4), PathConfig(prediction="noise"))
    assert grid == pytest.approx([0.001, 0.2505, 0.5, 0.7495, 0.999])


def test_ids_that_do_not_match_the_noise_are_an_error():
    with pytest.raises(ValueError, match=r"one id per cell, \(2,\); got \(3,\)"):
        sample_latents(None, torch.zeros(2, 1, 1), {"a": torch.zeros(3)}, SamplerConfig(), PathConfig())
