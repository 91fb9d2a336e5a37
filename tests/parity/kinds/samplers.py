"""Recorded ODE, SDE and likelihood runs on the small field of the transports."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from parity.case import Case, CaseError
from parity.kinds.sampling import ADAPTIVE_COUNT, EVALUATIONS, SOLVERS, check_grid_point, even_times
from parity.kinds.transport import DIFFUSION_NAMES, path_config, toy_field
from parity.ledger import Ledger
from parity.tolerance import ADAPTIVE, EXACT, SINGLE, STOCHASTIC, TRAJECTORY, Tolerance
from scldm.flow.likelihood import log_likelihood, standard_normal_log_prob
from scldm.flow.objective import to_velocity
from scldm.flow.path import sampling_interval
from scldm.flow.sde import SDEOptions, last_step, sde_states, solve_sde
from scldm.flow.solvers import dopri5_states, solve_ode

Field = Callable[[Tensor, Tensor], Tensor]
LIKELIHOOD = Tolerance(1e-3, 1e-4, "dopri5 at rtol 1e-3, with steps that upstream's random probes decide")


def matches(case: Case) -> bool:
    return {"ode", "sde", "lik"} <= set(case.facts)


def check(case: Case, ledger: Ledger) -> None:
    field, z = toy_field(case), case.tensors["in/z"]
    eps = _sample_eps(case)
    for run in ledger.fact("ode"):
        _check_ode(case, ledger, field, z, run, eps)
    for run in ledger.fact("sde"):
        _check_sde(case, ledger, field, z, run, eps)
    if "prior_logp" in case.tensors:
        ledger.tensor("prior_logp", standard_normal_log_prob(z), SINGLE)
    for run in ledger.fact("lik"):
        if "key" in run:
            _check_likelihood(case, ledger, field, z, run)
        elif run.get("error_with_grad"):
            ledger.fault(f"lik/{run['method']}", f"with gradients on, upstream stops: {run['error_with_grad']}", "runs")


def _sample_eps(case: Case) -> float:
    """Return the distance from singular ends of upstream's transport: the last of its arguments in the note."""
    match = re.search(r"create_transport\([^)]*,\s*(?:sample_eps\s*=\s*)?([\d.e-]+)\s*\)", case.facts.get("note", ""))
    if not match:
        raise CaseError("the note does not say with which sample_eps upstream's transport was made")
    return float(match[1])


def _check_ode(case: Case, ledger: Ledger, field: Field, z: Tensor, run: Mapping[str, Any], eps: float) -> None:
    key, method, n = run["key"], run["method"], int(run["num_steps"])
    config = path_config(*key.split("/")[1:3])
    t0, t1 = sampling_interval(config, eps=eps)
    times = even_times(n - 1, t0, t1)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return to_velocity(field(x, t), x, t, config)

    if run["error"]:
        times = times[::-1] if run["reverse"] else times
        ledger.fault(key, f"upstream stops: {run['error'][:60]}", _attempt(velocity, z, times, method))
    elif method == "dopri5":
        states, nfe = dopri5_states(velocity, z, times, rtol=1e-5, atol=1e-5)
        ledger.tensor(key, states[-1], ADAPTIVE)
        ledger.value(f"{key} nfe", nfe, run["nfe"], ADAPTIVE_COUNT)
        if f"{key}/mid" in case.tensors:
            check_grid_point(ledger, f"{key}/mid", states, times, ADAPTIVE)
    elif method in SOLVERS:
        solution = solve_ode(velocity, z, times, solver=SOLVERS[method])  # type: ignore[arg-type]
        ledger.tensor(key, solution.x, TRAJECTORY)
        ledger.value(f"{key} nfe", solution.nfe, run["nfe"], EXACT)
    else:
        ledger.unknown(key, f"no solver {method}; known are dopri5, {', '.join(SOLVERS)}")


def _attempt(velocity: Field, z: Tensor, times: list[float], method: str) -> str:
    """Describe the result of our solver on a run that upstream does not finish."""
    solver = SOLVERS.get(method, method)
    if solver not in EVALUATIONS and solver != "dopri5":
        return f"has no {method} either"
    try:
        solution = solve_ode(velocity, z, times, solver=solver)  # type: ignore[arg-type]
    except RuntimeError as error:
        return str(error)
    return f"max |x| {float(solution.x.abs().max()):.6g} at t = {times[-1]:g} after {solution.nfe} evaluations"


def _check_sde(case: Case, ledger: Ledger, field: Field, z: Tensor, run: Mapping[str, Any], eps: float) -> None:
    key = run["key"]
    _, path, prediction, form, solver, last = key.split("/")
    config = path_config(path, prediction)
    stable = prediction == "velocity" and path != "VP"
    options = SDEOptions(
        steps=int(run["num_steps"]) - 1,
        solver=solver.lower(),
        diffusion=DIFFUSION_NAMES[form],  # type: ignore[arg-type]
        norm=run["norm"],
        last_step=last.lower(),
        last_step_size=run["last_step_size"],
        eps=0.0 if stable else eps,  # upstream's rule
    )
    calls = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return field(x, t)

    noise = case.tensors["in/sde_noise"].__getitem__
    if run["error"] or not run["finite"]:
        reason = f"upstream stops: {run['error']}" if run["error"] else "upstream divides by 0 at an end of the path"
        safe = SDEOptions(**{**vars(options), "eps": eps})
        x = solve_sde(field, z, noise, safe, config)
        ledger.fault(key, reason, f"max |x| {float(x.abs().max()):.6g} with eps {eps:g}")
        _skip_states(case, ledger, key, reason)
        return
    states = list(sde_states(counted, z, noise, options, config))
    drifts = calls
    ledger.tensor(key, last_step(counted, states[-1], options, config), STOCHASTIC)
    if f"{key}/step1" in case.tensors:
        ledger.tensor(f"{key}/step1", states[0], STOCHASTIC)
    if f"{key}/step_last_before_final" in case.tensors:
        ledger.tensor(f"{key}/step_last_before_final", states[-1], STOCHASTIC)
    # Upstream evaluates the network twice for a drift, for its velocity and for its score; we evaluate once.
    upstream = 2 * drifts + (calls - drifts) * (2 if options.last_step == "mean" else 1)
    ledger.value(f"{key} nfe", upstream, run["nfe"], EXACT, f"ours {calls}: one evaluation per drift")


def _skip_states(case: Case, ledger: Ledger, key: str, reason: str) -> None:
    for name in ("step1", "step_last_before_final"):
        if f"{key}/{name}" in case.tensors:
            ledger.fault(f"{key}/{name}", reason)


def _check_likelihood(case: Case, ledger: Ledger, field: Field, z: Tensor, run: Mapping[str, Any]) -> None:
    """Compare likelihoods; upstream draws a probe per evaluation, so only those with recorded probes match."""
    key, n = run["key"], int(run["num_steps"])
    method = key.removeprefix("lik/").removesuffix(str(n))
    times = even_times(n - 1)[::-1]
    if f"{key}/eps" in case.tensors and method in SOLVERS:
        probes = ledger.given(f"{key}/eps")
        ours = log_likelihood(field, z, times, probe=probes.__getitem__, solver=SOLVERS[method])  # type: ignore[arg-type]
        ledger.tensor(f"{key}/logp", ours.log_prob, TRAJECTORY)
        ledger.tensor(f"{key}/z", ours.x0, TRAJECTORY)
        ledger.value(f"{key} n_eps", ours.nfe, run["n_eps"], EXACT)
        # Upstream runs the network twice per evaluation, for the velocity and for its divergence.
        ledger.value(f"{key} nfe", 2 * ours.nfe, run["nfe"], EXACT, f"ours {ours.nfe}")
        return
    if method != "dopri5":
        ledger.unknown(key, f"{method} without its recorded probes")
        return
    probe = torch.ones_like(z)
    exact = log_likelihood(field, z, times, probe=probe, solver="dopri5", rtol=1e-6, atol=1e-8)
    ledger.tensor(f"{key}/z", exact.x0, LIKELIHOOD)
    reason = "upstream's probes, redrawn inside an adaptive solver, are not recorded"
    trace = standard_normal_log_prob(exact.x0) + _trace_integral(field, z, times)
    spread = (trace - ledger.given(f"{key}/logp")).abs().max()
    ledger.fault(f"{key}/logp", reason, f"exact by the full trace, {float(spread):.3g} away at most")
    ledger.fault(f"{key} nfe", f"{run['nfe']} evaluations: {reason}", f"{exact.nfe} with one probe for the solve")


def _trace_integral(field: Field, z: Tensor, times: list[float]) -> Tensor:
    """Integral of the divergence along the flow, its trace summed coordinate by coordinate, (b,)."""
    total = torch.zeros(len(z))
    for i in range(z[0].numel()):
        probe = torch.zeros_like(z).flatten(1)
        probe[:, i] = 1
        ours = log_likelihood(field, z, times, probe=probe.view_as(z), solver="dopri5", rtol=1e-6, atol=1e-8)
        total = total + (ours.log_prob - standard_normal_log_prob(ours.x0))
    return total
