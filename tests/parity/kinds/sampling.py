"""Recorded end points and paths of ODE sampling with a recorded DiT.

Upstream carries an unconditional copy of every cell along, in the first half of its batch, and dopri5 chooses its steps
by the error of both halves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parity.case import Case, read_case
from parity.kinds.dit import recorded_dit
from parity.ledger import Ledger
from parity.tolerance import ADAPTIVE, EXACT, TRAJECTORY, Tolerance
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.guidance import guided_velocity
from scldm.flow.sampler import sample_latents
from scldm.flow.solvers import dopri5_states
from scldm.nn.dit import DiT

# Names of torchdiffeq's fixed-step solvers, and ours. Its rk4 is Kutta's 3/8 rule, as ours is.
SOLVERS = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun", "heun3": "heun3", "rk4": "rk4"}
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}  # per step
# On a smooth field the error estimate of dopri5's first step is float32 rounding (in float64 our steps are
# torchdiffeq's, one by one), and rounding depends on the order of summation: two steps of six either way.
ADAPTIVE_COUNT = Tolerance(0.1, 12, "evaluations of dopri5: rounding of the error estimate may add or save two steps")


def matches(case: Case) -> bool:
    return "dit_fixture" in case.facts and "runs" in case.facts


def check(case: Case, ledger: Ledger) -> None:
    ledger.fact("dit_fixture")
    dit = recorded_dit(read_case(case.folder, case.facts["dit_fixture"]))
    z, conditions = case.tensors["in/z"], case.under("in/cond/")
    with torch.no_grad():
        for run in ledger.fact("runs"):
            _check_run(case, ledger, dit, z, conditions, run)


def even_times(n: int, t0: float = 0.0, t1: float = 1.0) -> list[float]:
    """n steps of equal size."""
    return [t0 + (t1 - t0) * i / n for i in range(n)] + [t1]


def _check_run(
    case: Case, ledger: Ledger, dit: DiT, z: Tensor, conditions: Mapping[str, Tensor], run: Mapping[str, Any]
) -> None:
    w, method, n = float(run["w"]), run["method"], int(run["num_steps"])
    key = f"out/w{run['w']:g}/{method}{n}"
    if method == "dopri5":
        _check_adaptive(case, ledger, dit, z, conditions, key, run)
    elif method not in SOLVERS:
        ledger.unknown(key, f"no solver {method}; known are dopri5, {', '.join(SOLVERS)}")
    else:
        solver = SOLVERS[method]
        ours = [
            sample_latents(
                dit, z, conditions, SamplerConfig.model_validate({"solver": solver, "steps": n - 1, "guidance": scale}),
                PathConfig(),
            )
            for scale in (0.0, w)
        ]  # fmt: skip
        ledger.tensor(key, torch.cat(ours), TRAJECTORY)
        ledger.value(f"{key} nfe", (n - 1) * EVALUATIONS[solver], run["nfe"], EXACT)


def _check_adaptive(
    case: Case, ledger: Ledger, dit: DiT, z: Tensor, conditions: Mapping[str, Tensor], key: str, run: Mapping[str, Any]
) -> None:
    fields = [guided_velocity(dit, conditions, scale=w, path=PathConfig()) for w in (0.0, float(run["w"]))]

    def both(x: Tensor, t: Tensor) -> Tensor:
        halves = zip(x.chunk(2), t.chunk(2), strict=True)
        return torch.cat([field(*half) for field, half in zip(fields, halves, strict=True)])

    times = even_times(int(run["num_steps"]) - 1)
    states, nfe = dopri5_states(both, torch.cat([z, z]), times, rtol=1e-5, atol=1e-5)
    ledger.tensor(key, states[-1], ADAPTIVE)
    ledger.value(f"{key} nfe", nfe, run["nfe"], ADAPTIVE_COUNT)
    middle = f"{key.removesuffix(str(run['num_steps']))}_t_mid"
    if middle in case.tensors:
        check_grid_point(ledger, middle, states, times, ADAPTIVE)


def check_grid_point(
    ledger: Ledger, key: str, states: Sequence[Tensor], times: Sequence[float], tolerance: Tolerance
) -> None:
    """A recorded state of a path at a point of its time grid which upstream does not name: the nearest of ours."""
    recorded = ledger.given(key)
    nearest = min(range(len(states)), key=lambda i: float((states[i] - recorded).abs().max()))
    ledger.tensor(key, states[nearest], tolerance, f"at t = {times[nearest]:.4g}")
