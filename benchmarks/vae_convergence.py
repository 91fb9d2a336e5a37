"""What makes the VAE learn sooner: variants of its training at equal seconds of the processor (one thread).

Every variant trains a new VAE on the same cells; the weights of its best validation are kept and theta is fitted, as
the jobs do. Scores are of held-out cells: negative log-likelihood in nats per cell, correlation of decoded means per
gene (log1p CP10k), and energy distance, Fréchet distance and recall of held-out cells that are encoded and drawn
again, against the held-out cells themselves, in 30 components of the training cells. The floor is as many training
cells.

    python benchmarks/vae_convergence.py --json benchmarks/results/vae_convergence.json
    python benchmarks/vae_convergence.py --only gbm --seeds 1 --seconds 5 --variants today      # does it run at all

What is there is not made again: results lie in --out, and a run that was stopped goes on.

Shape letters: n cells, g genes, b cells of a batch, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import convergence_sets
import numpy as np
import scipy.sparse as sp
import torch
from train_small import batches
from transfer_cells import Cells
from transfer_lines import SEEN, THETA_CELLS, VAE_SIZES, Budget, batch_of, chunks, steps_of, validation

from scldm.data.gene_sampling import see_genes
from scldm.generation.real_cells import draw_sparse
from scldm.metrics.distribution.distances import energy_distance, frechet_distance
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.distribution.two_sample import manifold_metrics
from scldm.metrics.genes.expression import gene_moments
from scldm.metrics.genes.reconstruction import reconstruction_scores
from scldm.nn.config import VAEConfig
from scldm.nn.dispersion import fit_theta
from scldm.nn.likelihood import gene_probabilities, sample_genes
from scldm.nn.vae import VAE
from scldm.optim.config import EMAConfig
from scldm.optim.ema import EMA
from scldm.optim.first_weights import start_at_components
from scldm.random import generator

ROOT = Path(__file__).resolve().parents[1]
STREAM = 12  # of randomness
FIRST_CELLS = 2_048
CHECKS, CHECK_CELLS = 8, 128  # validations, and cells of each


@dataclass(frozen=True)
class Variant:
    """A way to train the VAE."""

    rate: float = 4e-3
    batch: int = 32
    genes: int | None = 1_024  # scored in a step
    all_genes_from: float = 1.0  # share of the seconds after which all genes are scored
    average: float | None = None
    components: bool = False  # first weights from the training cells (`start_at_components`)
    seen: bool = True  # the encoder sees a random share of the expressed genes
    model: VAEConfig = field(default=VAE_SIZES)


def sized(**given: Any) -> VAEConfig:
    return VAEConfig(**(VAE_SIZES.model_dump() | given))


VARIANTS = {
    convergence_sets.BASE: Variant(),
    "rate 2e-3": Variant(rate=2e-3),
    "rate 8e-3": Variant(rate=8e-3),
    "rate 1.6e-2": Variant(rate=1.6e-2),
    "batch 16": Variant(batch=16),
    "batch 64": Variant(batch=64),
    "256 genes": Variant(genes=256),
    "512 genes": Variant(genes=512),
    "512 genes, all at the end": Variant(genes=512, all_genes_from=0.75),
    "all genes": Variant(genes=None),
    "average": Variant(average=0.99),
    "components": Variant(components=True),
    "components, rate 2e-3": Variant(components=True, rate=2e-3),
    "components, rate 1e-3": Variant(components=True, rate=1e-3),
    "rate 1e-3": Variant(rate=1e-3),
    "rate 2e-3, batch 16": Variant(rate=2e-3, batch=16),
    "rate 2e-3, 512 genes": Variant(rate=2e-3, genes=512),
    "all expressed genes seen": Variant(seen=False),
    "one block": Variant(model=sized(n_layers=1)),
    "8 tokens": Variant(model=sized(n_latent_tokens=8)),
    "32 tokens": Variant(model=sized(n_latent_tokens=32)),
    "width 64": Variant(model=sized(d_model=64)),
    "latent width 8": Variant(model=sized(latent_width=8)),
    "own decoder embedding": Variant(model=sized(shared_embedding=False)),
}


def new_vae(variant: Variant, cells: Cells, seed: int) -> VAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VAE(variant.model, n_genes=cells.counts.shape[1])
    vae.start_at(torch.from_numpy(gene_moments([cells.counts], log_normalise=False).mean).float())
    if variant.components:
        start_at_components(vae, [batch_of(cells[:FIRST_CELLS])])
    return vae


def train(variant: Variant, cells: Cells, *, seconds: float, seed: int) -> tuple[VAE, int]:
    budget = Budget(seconds)
    n_check = int(np.clip(0.1 * len(cells), 10, CHECK_CELLS))
    check, own = batch_of(cells[:n_check]), cells[n_check:]
    vae = new_vae(variant, own, seed)
    mean = torch.from_numpy(gene_moments([own.counts], log_normalise=False).mean).float()
    few = variant.genes is not None and variant.genes < len(mean)
    probability = gene_probabilities(mean, variant.genes) if few else None
    average = None if variant.average is None else EMA(vae, EMAConfig(decay=variant.average))
    best, best_nll, n_checks = state(vae), validation(vae, check), 1
    rows_of_steps = batches(len(own), min(variant.batch, len(own)), seed)
    after = None if average is None else average.update
    for step, rows in enumerate(steps_of(vae, budget, variant.rate, rows_of_steps, after=after)):
        batch = replace(batch_of(own[rows.numpy()]), joinids=rows)
        few = probability is not None and budget.spent < variant.all_genes_from
        sample = sample_genes(probability, generator(seed, STREAM, step)) if few else None
        seen = see_genes(batch, SEEN, n_genes=len(mean), seed=seed * 1_000_003 + step) if variant.seen else batch
        vae(batch, sample, seen).mean().backward()
        if budget.spent * CHECKS >= n_checks:
            n_checks += 1
            if average is None:
                found, nll = state(vae), validation(vae, check)
            else:
                with average.swapped(vae):
                    found, nll = state(vae), validation(vae, check)
            if nll < best_nll:
                best, best_nll = found, nll
    trained = VAE(variant.model, n_genes=len(mean))
    trained.load_state_dict(best)
    trained = trained.eval().requires_grad_(False)
    fit_theta(trained, [batch_of(part) for part in chunks(cells[:THETA_CELLS])])
    return trained, step + 1


def state(vae: VAE) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in vae.state_dict().items()}


@torch.inference_mode()
def score(vae: VAE, held_out: Cells, space: RealSpace, seed: int) -> dict[str, float]:
    nll, mu, made = [], [], []
    for i, part in enumerate(chunks(held_out)):
        cells, sizes = batch_of(part), torch.from_numpy(np.asarray(part.counts.sum(1)).ravel())
        z = vae.encode(cells)
        nll.append(vae.nll(cells, z).double().numpy())
        mu.append(vae.decode_mu(z, sizes).numpy())
        made.append(draw_sparse(vae.decode(z, sizes), list(range(128 * i, 128 * i + len(part))), seed=seed))
    of_cells = np.concatenate(nll)
    pearson = reconstruction_scores(held_out.counts, np.concatenate(mu), of_cells).gene_pearson
    found = distances(space, held_out, sp.vstack(made, format="csr"))
    return {"nll": float(of_cells.mean()), "gene_pearson": pearson} | found


def distances(space: RealSpace, held_out: Cells, counts: sp.csr_matrix) -> dict[str, float]:
    real, made = space.project(held_out.counts), space.project(counts)
    return {
        "energy": energy_distance(real, made),
        "frechet": frechet_distance(real, made),
        "recall": manifold_metrics(real, made).recall,
    }


def main() -> None:
    parser = convergence_sets.command_line(__doc__, ROOT, "vae_convergence", list(VARIANTS))
    parser.add_argument("--seconds", type=float, nargs="+", default=[40], help="of a VAE")
    args = parser.parse_args()

    def run(name: str, seed: int, wanted: convergence_sets.Wanted, keep: convergence_sets.Keep) -> None:
        cells, held_out, _ = convergence_sets.read(args.data, name, seed)
        space = RealSpace.fit(cells.counts, n_top_genes=convergence_sets.N_GENES, n_pcs=30, seed=0)
        rows = np.random.default_rng(seed).permutation(len(cells))[: len(held_out)]
        keep("floor", 0, distances(space, held_out, cells.counts[rows]))
        for variant, seconds in wanted:
            vae, steps = train(VARIANTS[variant], cells, seconds=seconds, seed=seed)
            keep(variant, seconds, score(vae, held_out, space, seed), steps=steps)

    convergence_sets.run_all(args, run)


if __name__ == "__main__":
    main()
