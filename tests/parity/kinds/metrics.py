"""Recorded values of upstream's validation metrics on fixed arrays, raw, normalised and scaled."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parity.case import Case
from parity.kinds import upstream_metrics as u
from parity.ledger import Ledger
from parity.tolerance import Tolerance
from scldm.metrics.distribution.distances import CFGEN_SIGMAS

# Kernels take differences of sums over genes; in float32 that leaves five digits, and fewer where they nearly cancel.
SINGLE_METRIC = Tolerance(1e-4, 1e-6, "float32 sums over genes and pairs of cells, whose differences are taken")
DOUBLE_METRIC = Tolerance(1e-9, 1e-10, "float64; kernels are means of n² terms")
TRANSPORT = Tolerance(1e-6, 1e-9, "float64; Sinkhorn's iteration stops at a marginal error of 1e-9")
SINGLE_TRANSPORT = Tolerance(1e-3, 1e-6, "upstream iterates in float32")

Metric = Callable[[Tensor, Tensor], Tensor]


def matches(case: Case) -> bool:
    return "scalars" in case.facts and any(re.fullmatch(r"in/.+/x", key) for key in case.tensors)


def check(case: Case, ledger: Ledger) -> None:
    spaces = [match[1] for key in case.tensors if (match := re.fullmatch(r"in/(.+)/x", key))]
    for space in sorted(spaces):
        x, y = case.tensors[f"in/{space}/x"], case.tensors[f"in/{space}/y"]
        for name in case.under(f"{space}/"):
            metric = metric_of(name.removesuffix(".f64"))
            if metric is None:
                continue  # reported as not understood
            if name.endswith(".f64"):
                ledger.tensor(f"{space}/{name}", metric(x.double(), y.double()), DOUBLE_METRIC)
            else:
                ledger.tensor(f"{space}/{name}", metric(x, y), SINGLE_METRIC)
    warnings = ledger.fact("warnings") if "warnings" in case.facts else {}
    for name, recorded in ledger.fact("scalars").items():
        _check_transport(case, ledger, name, recorded, warnings.get(name, []))


def metric_of(name: str) -> Metric | None:
    """The metric of a recorded name, such as mmd_rbf_scale0_01, kernel_ruzicka_xy or r2_mean_swapped."""
    if match := re.fullmatch(r"mmd_(.+)", name):
        return (kernel := _kernel(match[1])) and partial(u.mmd2, kernel)
    if match := re.fullmatch(r"kernel_(.+)_([xy])([xy])", name):
        kernel, sides = _kernel(match[1]), (match[2], match[3])
        return kernel and (lambda x, y: kernel(*({"x": x, "y": y}[side] for side in sides)))
    return METRICS.get(name)


def _kernel(name: str) -> u.Kernel | None:
    if match := re.fullmatch(r"rbf(?:_scale(\d+(?:_\d+)?))?", name):
        return u.rbf(float(match[1].replace("_", ".")) if match[1] else 1.0)
    return {"braycurtis": u.braycurtis, "tanimoto": u.tanimoto, "ruzicka": u.ruzicka}.get(name)


def _paired(metric: Metric) -> Metric:
    """Of as many cells of x as of y, where a metric pairs them."""

    def of_pairs(x: Tensor, y: Tensor) -> Tensor:
        n = min(len(x), len(y))
        return metric(x[:n], y[:n])

    return of_pairs


METRICS: Mapping[str, Metric] = {
    "r2_mean": lambda x, y: u.r2(y.mean(dim=0), x.mean(dim=0)),
    "r2_var": lambda x, y: u.r2(y.var(dim=0), x.var(dim=0)),
    "r2_mean_swapped": lambda x, y: u.r2(x.mean(dim=0), y.mean(dim=0)),
    "r2_var_swapped": lambda x, y: u.r2(x.var(dim=0), y.var(dim=0)),
    "mse": _paired(lambda x, y: (x - y).square().mean()),
    "pcc": _paired(u.gene_correlations),
    "pcc_nanmean": _paired(lambda x, y: u.gene_correlations(x, y).nanmean()),
    "linear_mmd2": _paired(u.linear_mmd2),
    "poly_mmd2": _paired(u.poly_mmd2),
    "mix_rbf_mmd2_biased": _paired(lambda x, y: u.mixed_rbf_mmd2(x, y, CFGEN_SIGMAS, biased=True)),
    "mix_rbf_mmd2_unbiased": _paired(lambda x, y: u.mixed_rbf_mmd2(x, y, CFGEN_SIGMAS, biased=False)),
    "mix_rbf_ratio": _paired(lambda x, y: u.mixed_rbf_ratio(x, y, CFGEN_SIGMAS)),
}


def _check_transport(case: Case, ledger: Ledger, name: str, recorded: Any, warnings: Sequence[str]) -> None:
    """Wasserstein distances, exact or by Sinkhorn's iteration, many of which upstream gets wrong."""
    match = re.fullmatch(r"(.+)/wasserstein(\d)_(emd|sinkhorn)_reg([\d.]+)\.(f64|f32_as_upstream)", name)
    if not match or f"in/{match[1]}/x" not in case.tensors:
        ledger.unknown(name, "no metric of this name")
        return
    x, y = case.tensors[f"in/{match[1]}/x"], case.tensors[f"in/{match[1]}/y"]
    power, method, reg = int(match[2]), match[3], float(match[4])
    exact = u.exact_transport(x, y, power=power)
    if method == "emd":
        ledger.value(name, exact, recorded, TRANSPORT)
        return
    dtype = torch.float64 if match[5] == "f64" else torch.float32
    reason = _no_value(recorded, warnings) or _no_plan(recorded, exact, x.to(dtype), y.to(dtype), power, reg, warnings)
    if reason:
        ledger.fault(name, reason, f"exact transport, {exact:.6g}")
    else:
        ours = u.sinkhorn_transport(x, y, power=power, reg=reg)
        ledger.value(name, ours, recorded, TRANSPORT if match[5] == "f64" else SINGLE_TRANSPORT)


def _no_value(recorded: Any, warnings: Sequence[str]) -> str:
    if recorded is None or isinstance(recorded, str):
        return f"upstream gives no value: {recorded or '; '.join(warnings)}"
    return ""


def _no_plan(
    recorded: float, exact: float, x: Tensor, y: Tensor, power: int, reg: float, warnings: Sequence[str]
) -> str:
    """Why a Sinkhorn distance is void: its kernel underflows, and it is below what the best plan costs."""
    kernel = torch.exp(-torch.cdist(x, y).pow(power) / reg)
    underflows = not (kernel.sum(dim=0).all() and kernel.sum(dim=1).all())
    if recorded < exact and (underflows or any("numerical errors" in warning for warning in warnings)):
        return f"upstream's kernel underflows at reg {reg:g}: {recorded:.3g} is below the exact distance"
    return ""
