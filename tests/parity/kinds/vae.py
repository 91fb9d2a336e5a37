"""Recorded transformer VAEs: latents, means, loss and gradients, for every tokenisation that was recorded.

L{n}    expressed genes and unmasked pads up to n tokens
none    every gene of the vocabulary
panel   decoding of genes of each cell's own, from the latents of `none`
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from parity.case import Case, CaseError
from parity.ledger import Ledger
from parity.tolerance import DOUBLE, DOUBLE_GRADIENT, EXACT, SINGLE, Tolerance
from scldm.checkpoints.upstream.config import vae_config_from_upstream
from scldm.checkpoints.upstream.names_vae import vae_key, vae_state_from_upstream
from scldm.data.batch import CellBatch
from scldm.nn.likelihood import nb_log_prob
from scldm.nn.vae import VAE, CountDistribution, ExpressionDistribution


def matches(case: Case) -> bool:
    return "state/encoder.ca_layer.inducing_points" in case.tensors


def recorded_vae(case: Case, *, genes_seq_len: int | None) -> VAE:
    """The model of a case, with its weights."""
    vae = VAE(vae_config_from_upstream(case.config, genes_seq_len=genes_seq_len), n_genes=case.config["n_genes"])
    vae.load_state_dict(vae_state_from_upstream(case.under("state/"), pads=genes_seq_len is not None))
    return vae.eval()


def check(case: Case, ledger: Ledger) -> None:
    for where in _tokenisations(case):
        if where != "none":
            _check_tokens(case, ledger, where)
        for suffix, dtype, tolerance in (("", torch.float32, SINGLE), (".f64", torch.float64, DOUBLE)):
            _check_outputs(case, ledger, where, suffix, dtype, tolerance)
    if "in/panel_genes" in case.tensors:
        _check_panel(case, ledger)
    if "grad_norms" in case.tensors:
        _check_gradients(case, ledger)


def _tokenisations(case: Case) -> list[str]:
    found = {match[1] for key in case.tensors if (match := re.match(r"out/(L\d+|none)/", key))}
    return sorted(found, key=lambda where: (where == "none", len(where), where))


def _seq_len(where: str) -> int | None:
    return None if where == "none" else int(where[1:])


def _genes(case: Case) -> Tensor:
    """Upstream's ids of the columns of in/counts, which it keeps from 1 on, less one."""
    genes = case.tensors["in/genes"] - 1
    if int(genes.min()) < 0 or int(genes.max()) >= case.config["n_genes"]:
        raise CaseError(f"in/genes has ids outside 1 .. {case.config['n_genes']}")
    return genes


def _columns(case: Case) -> Tensor | None:
    """Return the genes of the recorded columns, cell by cell; None if they are the vocabulary in order."""
    genes = _genes(case)
    in_order = genes.shape[1] == case.config["n_genes"] and torch.equal(
        genes, torch.arange(genes.shape[1]).expand_as(genes)
    )
    return None if in_order else genes


def _cells(case: Case, where: str, dtype: torch.dtype) -> CellBatch:
    """Return the input of the encoder; in `none` zeros are tokens too."""
    counts, genes = case.tensors["in/counts"].to(dtype), _genes(case)
    dense = torch.zeros(len(counts), case.config["n_genes"], dtype=dtype).scatter(1, genes, counts)
    cells = CellBatch.from_dense(dense)
    if where != "none":
        return cells
    b, s = counts.shape
    order = genes.argsort(dim=1)
    return dataclasses.replace(
        cells,
        offsets=torch.arange(b + 1) * s,
        gene_ids=genes.gather(1, order).flatten(),
        counts=counts.gather(1, order).flatten(),
    )


def _library_size(case: Case, dtype: torch.dtype) -> Tensor:
    return case.tensors["in/library_size"].to(dtype).flatten()


def _condition(case: Case, dtype: torch.dtype) -> Tensor | None:
    """Return the condition of an adaLN decoder, (b, d)."""
    return case.tensors["in/condition"].to(dtype).flatten(1) if "in/condition" in case.tensors else None


def _check_tokens(case: Case, ledger: Ledger, where: str) -> None:
    """Check that the recorded tokens are the expressed genes, and pads (gene 0, count 0) up to the length."""
    prefix = f"in/{where}/"
    if f"{prefix}genes_subset" not in case.tensors:
        return
    genes, counts = case.tensors[f"{prefix}genes_subset"], case.tensors[f"{prefix}counts_subset"]
    cells = _cells(case, where, torch.float32)
    recorded = torch.zeros(len(genes), case.config["n_genes"] + 1).scatter(1, genes, counts)[:, 1:]
    ledger.value(f"{prefix}counts_subset", cells.dense(case.config["n_genes"]), recorded, EXACT)
    ledger.value(f"{prefix}genes_subset", (genes > 0).sum(1), cells.lengths, EXACT, "tokens that are no pads")


def _check_outputs(
    case: Case, ledger: Ledger, where: str, suffix: str, dtype: torch.dtype, tolerance: Tolerance
) -> None:
    vae = recorded_vae(case, genes_seq_len=_seq_len(where)).to(dtype)
    size, condition = _library_size(case, dtype), _condition(case, dtype)
    with torch.no_grad():
        z = vae.encode(_cells(case, where, dtype))
        decoded = vae.decode(z, size, genes=_columns(case), condition=condition)
        ours = {"h_z": z, **dict(_distribution(decoded))}
        ours["loss"] = _loss(vae, case, z, condition).mean()
    for name, value in ours.items():
        if (key := f"out/{where}/{name}{suffix}") in case.tensors:
            ledger.tensor(key, value, tolerance)


def _distribution(decoded: CountDistribution | ExpressionDistribution) -> Iterator[tuple[str, Tensor]]:
    yield "mu", decoded.mu
    if isinstance(decoded, CountDistribution):
        yield "theta", decoded.theta.expand_as(decoded.mu)


def _loss(vae: VAE, case: Case, z: Tensor, condition: Tensor | None) -> Tensor:
    """Per cell, with the recorded library sizes, over the recorded columns."""
    if (genes := _columns(case)) is not None:
        size, counts = _library_size(case, z.dtype), case.tensors["in/counts"].to(z.dtype)
        decoded = vae.decode(z, size, genes=genes, condition=condition)
        if isinstance(decoded, CountDistribution):
            return -nb_log_prob(counts, decoded.mu, decoded.theta.expand_as(decoded.mu)).sum(1)
        return ((counts / size[:, None] * 10_000).log1p() - decoded.mu).square().sum(1)
    scored = dataclasses.replace(_cells(case, "L0", z.dtype), library_size=_library_size(case, z.dtype))
    return vae.nll(scored, z, condition=condition)


def _check_panel(case: Case, ledger: Ledger) -> None:
    genes = case.tensors["in/panel_genes"] - 1
    for suffix, dtype, tolerance in (("", torch.float32, SINGLE), (".f64", torch.float64, DOUBLE)):
        if f"out/panel/mu{suffix}" not in case.tensors:
            continue
        vae = recorded_vae(case, genes_seq_len=None).to(dtype)
        z = case.tensors["out/none/h_z"].to(dtype)  # its single-precision value in both, says the description
        with torch.no_grad():
            decoded = vae.decode(z, _library_size(case, dtype), genes=genes, condition=_condition(case, dtype))
        for name, value in _distribution(decoded):
            if (key := f"out/panel/{name}{suffix}") in case.tensors:
                ledger.tensor(key, value, tolerance)


def _check_gradients(case: Case, ledger: Ledger) -> None:
    """Of the loss that `grad_of` names; upstream's tables of genes have the pad in row 0."""
    match = re.search(r"(L\d+|none)", str(case.fact("grad_of")))
    if match is None:
        raise CaseError(f"{case.name}.json: grad_of ({case.fact('grad_of')!r}) names no tokenisation")
    vae = recorded_vae(case, genes_seq_len=_seq_len(match[1])).double()
    z = vae.encode(_cells(case, match[1], torch.float64))
    _loss(vae, case, z, _condition(case, torch.float64)).mean().backward()
    own = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in vae.named_parameters()}
    names = case.fact("grad_norm_names")
    gradients = {name: _upstream_gradient(vae_key(name), own) for name in names}
    ledger.tensor("grad_norms", torch.stack([gradients[name].norm() for name in names]), DOUBLE_GRADIENT)
    for name, recorded in case.under("grad/").items():
        if name in gradients:
            ledger.tensor(f"grad/{name}", gradients[name].view_as(recorded), DOUBLE_GRADIENT)


def _upstream_gradient(key: str, own: dict[str, Tensor]) -> Tensor:
    grad = own[key]
    if key not in ("gene_embedding", "decoder_embedding", "log_theta"):
        return grad
    first = own.get("encoder.pad") if key == "gene_embedding" else None  # no other pad row is ever read
    first = torch.zeros_like(grad[0]) if first is None else first
    return torch.cat([first[None], grad])
