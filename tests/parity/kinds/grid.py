"""Recorded log-likelihoods on a grid of counts, means and dispersions."""

from __future__ import annotations

import torch

from parity.case import Case
from parity.ledger import Ledger
from parity.tolerance import SINGLE
from scldm.nn.likelihood import EPS, nb_log_prob

CANCELLATION = 8  # roundings that may add up


def matches(case: Case) -> bool:
    return {"in/x", "in/mu", "in/theta"} <= set(case.tensors) and not case.under("state/")


def check(case: Case, ledger: Ledger) -> None:
    x, mu, theta = torch.meshgrid(
        *(case.tensors[f"in/{name}"].double() for name in ("x", "mu", "theta")), indexing="ij"
    )
    exact = nb_log_prob(x, mu, theta)
    # Terms of both signs cancel, lgamma(x + theta) - lgamma(theta) above all: what is lost is a share of the largest.
    largest = torch.lgamma(x + theta).abs() + torch.lgamma(theta).abs() + torch.lgamma(x + 1) + exact.abs()
    for key in ("out/f64", "out/scvi_f64"):
        if key in case.tensors:
            ledger.bounded(key, exact, CANCELLATION * largest * torch.finfo(torch.float64).eps, "element by element")
    if "out/f32" in case.tensors:
        ours = nb_log_prob(x.float(), mu.float(), theta.float())
        ledger.bounded("out/f32", ours, CANCELLATION * largest * torch.finfo(torch.float32).eps, "element by element")
    if "in/gx" in case.tensors:
        _check_gaussian(case, ledger)


def _check_gaussian(case: Case, ledger: Ledger) -> None:
    """Upstream's `log_gaussian` is a loss: the squared error, or the Gaussian's up to a constant where sigma is given.

    The recording takes the rows of x in reverse order for the mean.
    """
    x = case.tensors["in/gx"]
    error = (x - x.flip(0)).square()
    if "out/log_gaussian" in case.tensors:
        ledger.tensor("out/log_gaussian", error, SINGLE)
    if "out/log_gaussian_sigma" in case.tensors:
        sigma = case.tensors["in/gs"] + EPS
        ledger.tensor("out/log_gaussian_sigma", 0.5 * error / sigma.square() + sigma.log(), SINGLE)
