"""What a device computes of small networks on fixed inputs: latents, likelihoods, gradients, samples, generated cells.

`tests/gpu` compares a GPU with the CPU by it; a unit test compares the CPU with itself, so that it does not fail for
another reason on the first GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.data.loading.feed import FeedStep
from pipeline.training.objectives.flow import Draws, flow_losses
from pipeline.training.objectives.vae import VaeObjective
from pipeline.training.prefetch import prefetch
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.batch import CellBatch
from scldm.data.library_size import LibrarySizes, LogNormal
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.generation.cell_maker import CellMaker, Recipe
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dit import DiT
from scldm.nn.likelihood import gene_probabilities, sample_genes
from scldm.nn.vae import VAE
from scldm.optim.adamw import adamw
from scldm.optim.config import OptimizerConfig
from scldm.random import generator

G, M, E = 300, 8, 8
WIDE = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": M, "latent_width": E}
Quantities = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


def cells(n: int = 6) -> CellBatch:
    """Cells of very different numbers of genes, one of them with a single gene."""
    g = torch.Generator().manual_seed(0)
    counts = torch.poisson(3 * torch.rand(n, G, generator=g), generator=g)
    counts[torch.rand(n, G, generator=g) < torch.linspace(0.2, 0.99, n)[:, None]] = 0
    counts[-1], counts[:, 0] = 0, 2
    return CellBatch.from_dense(counts, {"cell_type": torch.arange(n) % 2})


def vae_of(**choices: object) -> VAE:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.model_validate({**WIDE, **choices}), n_genes=G)
    with torch.no_grad():
        vae.gene_embedding.normal_()
    return moved(vae)


def dit_of() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(d_model=64, n_layers=2, n_heads=2)
    return moved(DiT(config, n_latent_tokens=M, latent_width=E, n_classes={"cell_type": 2}))


def moved(network: Network) -> Network:
    """A network a little off its start, so that gates and heads which start at zero matter."""
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    return network


def vae_quantities(device: str, *, precision: str = "fp32", sampled: bool = False, **choices: object) -> Quantities:
    """Latents, NLL, decoded means, and the gradient of every parameter and its value after a step of AdamW."""
    vae, batch = vae_of(**choices).to(device), cells().to(device)
    sample = None
    if sampled:
        probability = gene_probabilities(torch.linspace(0.1, 2, G), 80)
        sample = sample_genes(probability.to(device), generator(0, 1, 2))
    with autocast(device, precision):
        z = vae.encode(batch)
        found = {"latents": z, "mu": vae.decode_mu(z.detach().float(), batch.library_size)}
        found["nll"] = vae.nll(batch, z, sample=sample)
        loss = found["nll"].mean()
    return found | after_step(vae, loss)


def flow_quantities(device: str, *, precision: str = "fp32") -> Quantities:
    """Losses, gradients and the weights after a step of a flow."""
    dit, g = dit_of().to(device), torch.Generator().manual_seed(1)
    x0, x1 = (torch.randn(6, M, E, generator=g).to(device) for _ in range(2))
    draws = Draws(x0, torch.rand(6, generator=g).to(device), torch.rand(6, 2, generator=g).to(device))
    ids = {"cell_type": (torch.arange(6) % 3).to(device)}
    with autocast(device, precision):
        losses = flow_losses(dit, x1, draws, ids, PathConfig())
    return {"losses": losses} | after_step(dit, losses.mean())


def after_step(network: nn.Module, loss: Tensor) -> Quantities:
    optimizer = adamw(network, OptimizerConfig(lr=1e-4))
    loss.backward()
    found = {f"grad {k}": p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
    optimizer.step()
    return found | {"weights": torch.cat([p.detach().flatten() for p in network.parameters()])}


def samples(device: str, solver: str) -> Quantities:
    """Latents by a solver, with guidance."""
    g = torch.Generator().manual_seed(2)
    sampler = SamplerConfig.model_validate({"solver": solver, "steps": 6, "guidance": 2.0})
    ids = {"cell_type": (torch.arange(5) % 2).to(device)}
    with torch.inference_mode():
        noise = torch.randn(5, M, E, generator=g).to(device)
        return {"latents": sample_latents(dit_of().to(device), noise, ids, sampler, PathConfig())}


def generated(device: str, n: int = 40) -> Quantities:
    """Cells of the whole way: noise by counters, flow, decoder, draw of counts."""
    genes = tuple(f"g{i}" for i in range(G))
    names = Vocabulary(genes, genes, (LabelVocabulary("cell_type", ("T", "B")),))
    library = LibrarySizes({"all": LogNormal(6.0, 0.5, 2)})
    vae = LoadedVAE(vae_of().to(device).eval(), names, library)
    flow = LoadedFlow(dit_of().to(device).eval(), PathConfig(), names, library, M, E)
    recipe = Recipe(np.array([n]), {"cell_type": np.zeros(1, np.int64)}, {}, np.full(1, 6.0), np.full(1, 0.5))
    parts = list(CellMaker(vae, flow, recipe, sampler=SamplerConfig(steps=4), seed=3).cells(0, n))
    return {
        "latents": torch.from_numpy(np.concatenate([p.latents for p in parts])),
        "library_size": torch.from_numpy(np.concatenate([p.library_size for p in parts])),
        "counts": torch.from_numpy(np.concatenate([p.values.toarray() for p in parts])).float(),
    }


def prefetched(device: str, n_steps: int = 20) -> list[Quantities]:
    """Batches of a VAE's training after prefetching, each used by a computation on the device as it comes."""
    mean = torch.linspace(0.1, 2, G)
    objective = VaeObjective(
        vae_of(), labels=["cell_type"], mean_counts=mean, genes_per_step=80, max_genes=100, seed=0, validation=[]
    )

    def steps() -> Iterator[FeedStep]:
        for i in range(n_steps):
            yield FeedStep(i, 0, [table(i), table(i + 1)], 8)

    found = []
    for ready in prefetch(steps(), objective.prepare, torch.device(device)):
        for _, batch in ready.micro_batches():
            squares = batch.cells.counts.square().cumsum(0)
            found.append({"counts": batch.cells.counts, "genes": batch.cells.gene_ids, "squares": squares})
    return found


def table(seed: int, n: int = 4) -> pa.Table:
    x = np.random.default_rng(seed).poisson(0.5, (n, G))
    x[:, 0] += 1
    rows = [np.flatnonzero(row).astype(np.int32) for row in x]
    return pa.table({
        "soma_joinid": np.arange(n), "gene": pa.array(rows, pa.list_(pa.int32())),
        "count": pa.array([row[row > 0].astype(np.float32) for row in x], pa.list_(pa.float32())),
        "label:cell_type": np.zeros(n, np.int32), "library_size": x.sum(1).astype(np.float32),
        "weight": np.ones(n, np.float32),
    })  # fmt: skip


def autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def distances(compute: Callable[[str], Quantities], device: str) -> dict[str, float]:
    """How far each quantity of a device is from the CPU's, relative to its size."""
    return apart(compute(device), compute("cpu"))


def apart(found: Quantities, expected: Quantities) -> dict[str, float]:
    """Norm of each difference over the norm of what is expected.

    A gradient that is zero but for rounding, as that of a bias before a softmax, is measured by the others: its norm
    counts as a hundredth of the largest gradient's at least.
    """
    assert set(found) == set(expected)
    norms = {k: float(v.detach().double().norm()) for k, v in expected.items()}
    least = 1e-2 * max((n for k, n in norms.items() if k.startswith("grad")), default=0.0)
    sizes = {k: max(n, least if k.startswith("grad") else 1e-12) for k, n in norms.items()}
    return {
        k: float((found[k].detach().cpu().double() - v.detach().cpu().double()).norm()) / sizes[k]
        for k, v in expected.items()
    }
