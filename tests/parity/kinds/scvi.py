"""Recorded MLP VAEs: latents, means, both terms of the loss, and gradients."""

from __future__ import annotations

import torch

from parity.case import Case
from parity.ledger import Ledger
from parity.tolerance import DOUBLE, DOUBLE_GRADIENT, SINGLE, Tolerance
from scldm.checkpoints.upstream.names_scvi import scvi_key, scvi_state_from_upstream
from scldm.data.batch import CellBatch
from scldm.nn.config import ScviConfig
from scldm.nn.likelihood import nb_log_prob
from scldm.nn.scvi import ScviVAE


def matches(case: Case) -> bool:
    return "state/encoder.encoder_mlp.0.weight" in case.tensors


def recorded_vae(case: Case) -> ScviVAE:
    """The model of a case, in single precision and eval mode."""
    config = {name: value for name, value in case.config.items() if name != "n_genes" and not name.endswith("_dec")}
    own = {name.removesuffix("_dec"): value for name, value in case.config.items() if name.endswith("_dec")}
    config["decoder"] = own or None
    vae = ScviVAE(ScviConfig.model_validate(config), n_genes=case.config["n_genes"])
    vae.load_state_dict(scvi_state_from_upstream(case.under("state/")))
    return vae.eval()


def check(case: Case, ledger: Ledger) -> None:
    for suffix, dtype, tolerance in (("", torch.float32, SINGLE), (".f64", torch.float64, DOUBLE)):
        if f"out/eps{suffix}" in case.tensors:
            _check_outputs(case, ledger, recorded_vae(case).to(dtype), suffix, tolerance)
    if "grad_norms" in case.tensors:
        _check_gradients(case, ledger)


def _check_outputs(case: Case, ledger: Ledger, vae: ScviVAE, suffix: str, tolerance: Tolerance) -> None:
    eps = ledger.given(f"out/eps{suffix}")
    counts = case.tensors["in/counts"].to(eps.dtype)
    cells, size = CellBatch.from_dense(counts), case.tensors["in/library_size"].to(eps.dtype)[:, 0]
    with torch.no_grad():
        q, loss = vae.encode(cells), vae.loss(cells, eps)
        z = q.sample(eps)
        decoded = vae.decode(z, size)
        theta = decoded.theta.expand_as(decoded.mu)
        ours = {
            "loc": q.loc,
            "scale": q.scale,
            "z": z,
            "mu": decoded.mu,
            "theta": theta,
            "llh": loss.nll.mean(),
            "kl": loss.kl.mean(),
            "log_prob": nb_log_prob(counts, decoded.mu, theta),
        }
    for name, value in ours.items():
        if f"out/{name}{suffix}" in case.tensors:
            ledger.tensor(f"out/{name}{suffix}", value, tolerance)


def _check_gradients(case: Case, ledger: Ledger) -> None:
    vae = recorded_vae(case).double()
    cells = CellBatch.from_dense(case.tensors["in/counts"].double())
    vae.loss(cells, case.tensors["out/eps.f64"]).total.mean().backward()
    own = dict(vae.named_parameters())
    norms = []
    for name in case.fact("grad_norm_names"):
        grad = own[scvi_key(name)].grad
        norms.append(torch.zeros((), dtype=torch.float64) if grad is None else grad.norm())
    ledger.tensor("grad_norms", torch.stack(norms), DOUBLE_GRADIENT)
