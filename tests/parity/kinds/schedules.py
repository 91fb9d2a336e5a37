"""Recorded learning rates, optimizer steps and moving averages."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, CaseError
from parity.kinds.upstream_schedules import upstream_ema_decay, upstream_wsd
from parity.ledger import Ledger
from parity.tolerance import CLOSED_FORM, EXACT, TRAJECTORY, Tolerance
from scldm.optim.adamw import CautiousAdamW
from scldm.optim.config import EMAConfig
from scldm.optim.ema import EMA, ema_decay

LOSS = "mean((tanh(X@A+b)-Y)^2) before each step"
DECAY = Tolerance(0, 1e-6, "upstream computes the decay in float32")


def matches(case: Case) -> bool:
    return {"wsd", "adamw", "ema"} <= set(case.facts)


def check(case: Case, ledger: Ledger) -> None:
    for run in ledger.fact("wsd"):
        steps = ledger.given(f"wsd/{run['i']}/step").tolist()
        values = [upstream_wsd(step, **run["kwargs"]) for step in steps]
        ledger.tensor(f"wsd/{run['i']}/value", torch.tensor(values, dtype=torch.float64), CLOSED_FORM)
    if "wsd_defaults" in case.facts:
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(upstream_wsd).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        ledger.same("wsd_defaults", defaults, ledger.fact("wsd_defaults"))
    for run in ledger.fact("adamw"):
        _check_adamw(case, ledger, run)
    for run in ledger.fact("ema"):
        _check_ema(case, ledger, run)
    for name in sorted({key.split("/")[0] for key in case.under("ema/") if not key[0].isdigit()}):
        _check_default_decay(ledger, name)


def _check_adamw(case: Case, ledger: Ledger, run: Mapping[str, Any]) -> None:
    root = f"adamw/{run['i']}"
    if run["loss"] != LOSS:
        ledger.unknown(f"{root}/loss", f"another loss: {run['loss']}")
        return
    schedule = None if run["scheduler"] is None else schedule_of(run["scheduler"]["kind"])
    given = {name: ledger.given(f"adamw/in/{name}") for name in ("A0", "b0", "X", "Y")}
    n_steps = len(ledger.given(f"{root}/loss"))
    for name, ours in replay_adamw(given, run["kwargs"], schedule, n_steps).items():
        ledger.tensor(f"{root}/{name}", ours, TRAJECTORY)


def replay_adamw(
    given: Mapping[str, Tensor], settings: Mapping[str, Any], schedule: Mapping[str, Any] | None, n_steps: int
) -> dict[str, Tensor]:
    """A and b after each step, and the loss before it."""
    settings = {"caution": False, **settings}
    a, b = nn.Parameter(given["A0"].clone()), nn.Parameter(given["b0"].clone())
    optimizer = CautiousAdamW([a, b], **settings)
    path: dict[str, list[Tensor]] = {"A": [], "b": [], "loss": []}
    for step in range(n_steps):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = settings["lr"] * upstream_wsd(step, **schedule)
        loss = (torch.tanh(given["X"] @ a + b) - given["Y"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in (("A", a), ("b", b), ("loss", loss)):
            path[name].append(value.detach().clone())
    return {name: torch.stack(values) for name, values in path.items()}


def schedule_of(text: str) -> dict[str, Any]:
    """Arguments of `upstream_wsd` from a description such as LambdaLR(wsd_schedule(20, num_warmup_steps=4)).

    Read as literals; nothing is evaluated.
    """
    match = re.search(r"wsd_schedule\(.*?\)", text)
    if not match:
        raise CaseError(f"no wsd_schedule(…) in the scheduler {text!r}")
    call = ast.parse(match[0], mode="eval").body
    assert isinstance(call, ast.Call)
    names = list(inspect.signature(upstream_wsd).parameters)[1:]
    arguments = dict(zip(names, map(ast.literal_eval, call.args), strict=False))
    return arguments | {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}


def _check_ema(case: Case, ledger: Ledger, run: Mapping[str, Any]) -> None:
    root, settings = f"ema/{run['i']}", run["kwargs"]
    online, start = ledger.given(f"{root}/online"), ledger.given(f"{root}/w0")
    module = nn.Linear(start.shape[1], start.shape[0], bias=False)
    ema = _started_at(module, start)
    averages = []
    for call, weight in enumerate(online, start=1):
        with torch.no_grad():
            module.weight.copy_(weight)
        decay = upstream_ema_decay(call, **settings)
        if decay is not None:
            ema.average(decay)
        averages.append(ema.shadow["weight"].clone())
    ledger.tensor(f"{root}/ema", torch.stack(averages), TRAJECTORY)
    n = len(online)
    decays = [ema_decay(call, decay=settings["beta"], start=settings["update_after_step"]) for call in range(1, n + 1)]
    ledger.tensor(f"{root}/decay_after", torch.tensor(decays, dtype=torch.float64), DECAY)
    ledger.tensor(f"{root}/initted", torch.ones(n, dtype=torch.bool), EXACT, "ours starts as a copy")
    for name in ("n", "step"):
        ledger.value(f"{root}/{name}", n, run[name], EXACT)
    parts = {key.split(".")[0] for key in run["state_keys"]}
    ledger.same(f"{root}/state_keys", parts, {"initted", "step", "online_model", "ema_model"})


def _started_at(module: nn.Linear, weight: Tensor) -> EMA:
    with torch.no_grad():
        module.weight.copy_(weight)
    return EMA(module, EMAConfig())


def _check_default_decay(ledger: Ledger, name: str) -> None:
    """Decay by step under ema_pytorch's rule, with the settings of upstream's own configuration."""
    if name != "default_decay":
        return
    defaults = inspect.signature(upstream_ema_decay).parameters
    beta, start = defaults["beta"].default, defaults["update_after_step"].default
    steps = ledger.given(f"ema/{name}/step").tolist()
    ours = [ema_decay(step, decay=beta, start=start) for step in steps]
    ledger.tensor(f"ema/{name}/value", torch.tensor(ours, dtype=torch.float64), DECAY)
