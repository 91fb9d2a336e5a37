"""Paths of the training of a VAE: inputs, heads, genes that are scored and seen, precisions, first weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers.pretended.device import CUDA
from helpers.pretended.paths import Paths
from helpers.pretended.small import CELLS, GENES, NARROW, SHAPE, WIDE, cells_table, train, vae_objective
from pipeline.data.loading.collate import to_cell_batch
from pipeline.training.objectives.base import MicroBatchIndex, map_tensors
from scldm.data.batch import CellBatch
from scldm.data.genes_seen import NEEDS_N, GenesSeenConfig
from scldm.generation.real_cells import draw_sparse
from scldm.nn.config import ScviConfig, VAEConfig
from scldm.nn.dispersion import fit_theta
from scldm.nn.scvi import ScviVAE
from scldm.nn.vae import VAE
from scldm.optim.config import LoraConfig
from scldm.optim.first_weights import start_at_components
from scldm.optim.lora import add_adapters

INPUTS = ("count_aware", "log1p", "log1pzero", "sqrt", "anscombe", "proj", "projconcat", "softbin")
MODES = ("all", "none", "random", "weighted", "random_expressed", "expressed_zero", "share_expressed")


def paths(folder: Path) -> Paths:
    cells, of_groups = cells_table(), cells_table(groups=True)
    found: Paths = {f"input {x}": train(partial(vae_objective, {**NARROW, "input": x}), cells) for x in INPUTS}
    found |= {
        "input count_aware, wide heads": train(partial(vae_objective, WIDE), cells),
        "bf16": train(partial(vae_objective, WIDE), cells, torch.bfloat16),
        "genes_per_step": train(partial(vae_objective, WIDE, genes_per_step=20), cells),
        "genes_per_step, narrow heads": train(partial(vae_objective, NARROW, genes_per_step=20), cells),
        "measured": train(partial(vae_objective, WIDE, groups=True), of_groups),
        "genes_per_step, measured": train(partial(vae_objective, WIDE, groups=True, genes_per_step=20), of_groups),
        "genes_per_step, measured, bf16": train(
            partial(vae_objective, WIDE, groups=True, genes_per_step=20), of_groups, torch.bfloat16
        ),
        "head nb_cell": train(partial(vae_objective, {**WIDE, "head": "nb_cell"}), cells),
        "head gaussian": train(partial(vae_objective, {**WIDE, "head": "gaussian"}), cells),
        "head gaussian, genes_per_step": train(
            partial(vae_objective, {**WIDE, "head": "gaussian"}, genes_per_step=20), cells
        ),
        "no gene_bias": train(partial(vae_objective, {**WIDE, "gene_bias": False}), cells),
        "own embedding of the decoder": train(partial(vae_objective, {**WIDE, "shared_embedding": False}), cells),
        "pads": train(partial(vae_objective, {**NARROW, "genes_seq_len": GENES, "input": "log1p"}), cells),
        "max_genes": train(partial(vae_objective, WIDE, max_genes=8), cells),
        "cautious AdamW": train(partial(vae_objective, WIDE), cells, cautious=True),
        "one decoder of another width": train(
            partial(vae_objective, {**WIDE, "shared_embedding": False, "decoder": {"d_model": 32, "n_layers": 2}}),
            cells,
        ),
        "first weights": _first_weights,
        "adapters": _adapters,
        "theta": _theta,
        "an encoder on the device gives the latents of the CPU": _equal_latents,
        "a condition of the decoder": _adaln,
        "the MLP baseline": _scvi,
        "counts drawn from each head": _drawn_counts,
    }
    for mode in MODES:
        drawn: dict[str, Any] = {"n": 10} if mode in NEEDS_N else {"share": 0.7} if mode == "share_expressed" else {}
        seen = GenesSeenConfig(mode=mode, **drawn)
        found[f"genes_seen {mode}"] = train(partial(vae_objective, WIDE, seen=seen), cells)
        found[f"genes_seen {mode}, measured"] = train(partial(vae_objective, WIDE, seen=seen, groups=True), of_groups)
    return found


def _first_weights() -> None:
    objective = vae_objective(WIDE)
    assert start_at_components(objective.module, [to_cell_batch(cells_table(), [])]) > 0
    train(lambda: objective, cells_table())()


def _adapters() -> None:
    objective = vae_objective(WIDE)
    trained = add_adapters(objective.module, LoraConfig(rank=2), seed=0, also=["gene_bias"])
    assert len(trained) < len(list(objective.module.parameters()))
    train(lambda: objective, cells_table())()


def _theta() -> None:
    for groups in (False, True):
        objective = vae_objective(WIDE, groups=groups)
        objective.module.to(CUDA)
        batch = objective.prepare(cells_table(groups=groups), MicroBatchIndex(0, 0, 0))
        cells, _ = objective.scored_and_seen(map_tensors(batch, lambda x: x.to(CUDA)))
        fit = fit_theta(objective.module, [cells])
        assert fit.n_cells == CELLS
        assert fit.nll_after < fit.nll_before


def _equal_latents() -> None:
    """The device has forms of its own (padded pooling, plain tiles): they compute what the CPU computes."""
    cells = to_cell_batch(cells_table(), [])
    for config in (NARROW, WIDE, {**NARROW, "input": "log1p"}, {**NARROW, "genes_seq_len": GENES, "input": "log1p"}):
        vae = vae_objective(config).module
        with torch.no_grad():
            z, nll = vae.encode(cells), vae(cells)
            vae.to(CUDA)
            found, scored = vae.encode(cells.to(CUDA)), vae(cells.to(CUDA))
        torch.testing.assert_close(found.cpu(), z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scored.cpu(), nll, rtol=1e-4, atol=1e-4)


def _drawn_counts() -> None:
    for head in ("nb_shared", "nb_cell", "gaussian"):
        vae = vae_objective({**WIDE, "head": head}).module.to(CUDA)
        with torch.no_grad():
            decoded = vae.decode(torch.randn(CELLS, *SHAPE, device=CUDA), torch.full((CELLS,), 100.0, device=CUDA))
        assert draw_sparse(decoded, list(range(CELLS)), seed=0).shape == (CELLS, GENES)


def _adaln() -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(**WIDE, adaln=True), n_genes=GENES).to(CUDA)
    cells: CellBatch = to_cell_batch(cells_table(), []).to(CUDA)
    loss = vae(cells, condition=torch.randn(CELLS, WIDE["d_model"], device=CUDA))
    loss.mean().backward()
    assert bool(loss.isfinite().all())


def _scvi() -> None:
    vae = ScviVAE(ScviConfig(n_hidden=16, n_layers=2, n_latent=3), n_genes=GENES).to(CUDA)
    cells = to_cell_batch(cells_table(), []).to(CUDA)
    loss = vae.loss(cells, torch.randn(CELLS, 3, device=CUDA)).total
    loss.mean().backward()
    assert bool(loss.isfinite().all())
