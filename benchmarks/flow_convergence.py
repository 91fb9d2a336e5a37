"""What makes the flow learn sooner: variants of its training at equal seconds, on the latents of one VAE for each set.

A set's VAE is trained once for each seed. Every variant then trains a new flow on its latents for the same seconds of
the processor (one thread), and makes as many cells as are held out, under their labels. Scores are those of cells
(energy distance, Fréchet distance and recall in 30 components of the training cells, against the held-out ones) and,
as a VAE hides small differences, those of latents: energy and Fréchet distance in the components, of unit variance,
that hold 99.9 % of the variance of the training latents. The floor is as many training cells, or their latents, against
the held-out ones. The loss is the flow-matching loss on the held-out latents at fixed noise and uniform
times; it cannot be compared between scales of the latents or couplings, and is left out there.

    python benchmarks/flow_convergence.py --json benchmarks/results/flow_convergence.json
    python benchmarks/flow_convergence.py --only gbm --seeds 1 --seconds 3 --vae-seconds 5      # does it run at all

What is there is not made again: results lie in --out, and a run that was stopped goes on.

Shape letters: n cells, b cells of a batch, m latent tokens, e latent width.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import convergence_sets
import numpy as np
import scipy.sparse as sp
import torch
import vae_convergence
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from train_small import batches
from transfer_cells import Cells
from transfer_lines import FLOW_SIZES, LABEL, Budget, chunks, encode, sizes_of, steps_of

from scldm.checkpoints.native import LoadedVAE
from scldm.data.vocabulary import Vocabulary
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.objective import flow_loss
from scldm.flow.path import sample_path
from scldm.flow.sampler import sample_latents
from scldm.generation.real_cells import draw_sparse
from scldm.metrics.distribution.distances import energy_distance, frechet_distance
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.distribution.two_sample import manifold_metrics
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT, drop_labels
from scldm.optim.config import EMAConfig
from scldm.optim.ema import EMA
from scldm.random import generator

ROOT = Path(__file__).resolve().parents[1]
STREAM = 11  # of randomness
KEPT = 0.999  # share of the variance of latents
VAE = vae_convergence.VARIANTS["components, rate 2e-3"]


@dataclass(frozen=True)
class Variant:
    """A way to train the flow."""

    rate: float = 3e-3
    batch: int = 128
    times: str = "uniform"  # logit-normal
    scale: str = "none"  # each: every channel of every token; width: channels, over tokens
    coupling: str = "none"  # noise and cells of a batch matched by optimal transport, within a class
    direction: float = 0.0  # weight of 1 - cosine of the velocity
    average: float = 0.999
    model: DiTConfig = field(default=FLOW_SIZES)

    @property
    def comparable(self) -> bool:
        """Whether the loss measures what that of the others does."""
        return self.scale == "none" and self.coupling == "none"


VARIANTS = {
    convergence_sets.BASE: Variant(),
    "rate 1e-3": Variant(rate=1e-3),
    "rate 6e-3": Variant(rate=6e-3),
    "batch 32": Variant(batch=32),
    "batch 64": Variant(batch=64),
    "batch 256": Variant(batch=256),
    "batch 16": Variant(batch=16),
    "batch 32, rate 1.5e-3": Variant(batch=32, rate=1.5e-3),
    "batch 32, rate 6e-3": Variant(batch=32, rate=6e-3),
    "batch 32, shallow": Variant(batch=32, model=FLOW_SIZES.model_copy(update={"n_layers": 2})),
    "batch 32, scaled channels": Variant(batch=32, scale="each"),
    "batch 32, scaled channels, logit-normal times": Variant(batch=32, scale="each", times="logit-normal"),
    "logit-normal times": Variant(times="logit-normal"),
    "scaled channels": Variant(scale="each"),
    "scaled width": Variant(scale="width"),
    "matched noise": Variant(coupling="transport"),
    "direction": Variant(direction=0.1),
    "average 0.99": Variant(average=0.99),
    "average 0.9999": Variant(average=0.9999),
    "no dropped labels": Variant(model=FLOW_SIZES.model_copy(update={"label_dropout": 0.0})),
    "narrow": Variant(model=FLOW_SIZES.model_copy(update={"d_model": 64})),
    "shallow": Variant(model=FLOW_SIZES.model_copy(update={"n_layers": 2})),
    "wide": Variant(model=FLOW_SIZES.model_copy(update={"d_model": 128})),
}


@dataclass(frozen=True)
class Prepared:
    """A set with its VAE and latents."""

    train: Cells
    held_out: Cells
    vae: LoadedVAE
    z: Tensor  # (n, m, e) of the training cells
    z_held_out: Tensor
    space: RealSpace
    real: np.ndarray  # held-out cells in the space
    axes: tuple[np.ndarray, np.ndarray]  # mean of the training latents, and the axes of unit variance

    def whitened(self, z: Tensor) -> np.ndarray:
        """Return latents (n, m, e) in the axes, (n, k)."""
        return (z.flatten(1).double().numpy() - self.axes[0]) @ self.axes[1]


def prepare(name: str, args: argparse.Namespace, seed: int) -> Prepared:
    train, held_out, vocabulary = convergence_sets.read(args.data, name, seed)
    cached = args.out / f"{name} vae {args.vae_seconds:g} s seed {seed}.pt"
    if not cached.exists():
        vae, _ = vae_convergence.train(VAE, train, seconds=args.vae_seconds, seed=seed)
        torch.save(LoadedVAE(vae, vocabulary, sizes_of(train)), cached)
    vae = torch.load(cached, weights_only=False)
    space = RealSpace.fit(train.counts, n_top_genes=convergence_sets.N_GENES, n_pcs=30, seed=0)
    z = encode(vae, train)
    return Prepared(train, held_out, vae, z, encode(vae, held_out), space, space.project(held_out.counts), unit_axes(z))


def unit_axes(z: Tensor) -> tuple[np.ndarray, np.ndarray]:
    flat = z.flatten(1).double().numpy()
    _, s, v = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    k = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), KEPT)) + 1
    return flat.mean(0), v[:k].T / s[:k] * np.sqrt(len(flat))


def train_flow(
    classes: np.ndarray, z: Tensor, vocabulary: Vocabulary, variant: Variant, *, seconds: float, seed: int
) -> tuple[DiT, int, Tensor, Tensor]:
    """Train on latents (n, m, e); returns the averaged network, its steps, and centre and scale of its latents."""
    axes = {"none": None, "each": (0,), "width": (0, 1)}[variant.scale]
    centre, scale = torch.zeros(1), torch.ones(1)
    if axes is not None:
        centre, scale = z.mean(axes, keepdim=True), z.std(axes, keepdim=True).clamp_min(1e-3)
    z = (z - centre) / scale
    ids = torch.from_numpy(vocabulary.labels[0].encode(list(classes)))
    shape = {"n_latent_tokens": z.shape[1], "latent_width": z.shape[2], "n_classes": vocabulary.n_classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dit = DiT(variant.model, **shape)
    ema, size, path = EMA(dit, EMAConfig(decay=variant.average)), min(variant.batch, len(z)), PathConfig()
    n_steps = 0
    for step, rows in enumerate(
        steps_of(dit, Budget(seconds), variant.rate, batches(len(z), size, seed), after=ema.update)
    ):
        g, x1 = generator(seed, STREAM, step), z[rows]
        t = torch.rand(len(x1), generator=g)
        if variant.times == "logit-normal":
            t = torch.randn(len(x1), generator=g).sigmoid()
        x0 = torch.randn(x1.shape, generator=g)
        if variant.coupling == "transport":
            x0 = coupled(x0, x1, ids[rows])
        known = drop_labels(
            {LABEL: ids[rows]}, vocabulary.n_classes, p=variant.model.label_dropout, strategy=dit.strategy, generator=g
        )
        point = sample_path(x0, x1, t, path.path)
        velocity = dit(point.x_t, t, known)
        loss = flow_loss(velocity, point, t, path).mean()
        if variant.direction:
            cosine = torch.nn.functional.cosine_similarity(velocity.flatten(1), point.velocity.flatten(1))
            loss = loss + variant.direction * (1 - cosine).mean()
        loss.backward()
        n_steps = step + 1
    trained = DiT(variant.model, **shape)
    trained.load_state_dict(ema.shadow)
    return trained.eval().requires_grad_(False), n_steps, centre, scale


def coupled(x0: Tensor, x1: Tensor, ids: Tensor) -> Tensor:
    """Return the noise (b, m, e) in the order that is nearest to the cells of its class."""
    found = x0.clone()
    for one in ids.unique():
        rows = torch.nonzero(ids == one)[:, 0]
        cost = torch.cdist(x1[rows].flatten(1), x0[rows].flatten(1)) ** 2
        own, other = linear_sum_assignment(cost.numpy())
        found[rows[own]] = x0[rows[other]]
    return found


@torch.inference_mode()
def score(set_: Prepared, variant: Variant, dit: DiT, centre: Tensor, scale: Tensor, seed: int) -> dict[str, float]:
    vocabulary, cells = set_.vae.vocabulary, set_.held_out
    ids = torch.from_numpy(vocabulary.labels[0].encode(list(cells.classes)))
    sizes = torch.from_numpy(np.asarray(cells.counts.sum(1)).ravel())
    g, path, loss, made, latents = generator(seed, STREAM + 1), PathConfig(), [], [], []
    for first in range(0, len(cells), 128):
        at = slice(first, min(first + 128, len(cells)))
        x1, known = set_.z_held_out[at], {LABEL: ids[at]}
        t, x0 = torch.rand(len(x1), generator=g), torch.randn(x1.shape, generator=g)
        point = sample_path(x0, x1, t, path.path)
        loss.append(flow_loss(dit(point.x_t, t, known), point, t, path))
        start = torch.randn(x1.shape, generator=g)
        z = sample_latents(dit, start, known, SamplerConfig(steps=14), path) * scale + centre
        latents.append(z)
        made.append(draw_sparse(set_.vae.vae.decode(z, sizes[at]), list(range(first, at.stop)), seed=seed))
    found = distances(set_, sp.vstack(made, format="csr"), torch.cat(latents))
    return found | ({"loss": float(torch.cat(loss).mean())} if variant.comparable else {})


def distances(set_: Prepared, counts: sp.csr_matrix, z: Tensor) -> dict[str, float]:
    made, own, other = set_.space.project(counts), set_.whitened(set_.z_held_out), set_.whitened(z)
    return {
        "latent_energy": energy_distance(own, other),
        "latent_frechet": frechet_distance(own, other),
        "energy": energy_distance(set_.real, made),
        "frechet": frechet_distance(set_.real, made),
        "recall": manifold_metrics(set_.real, made).recall,
    }


def floor(set_: Prepared, seed: int) -> dict[str, float]:
    """Scores of training cells of the same classes, and of held-out cells that are encoded and decoded."""
    rng, rows = np.random.default_rng(seed), []
    for name, n in zip(*np.unique(set_.held_out.classes, return_counts=True), strict=True):
        own = np.flatnonzero(set_.train.classes == name)
        rows.append(rng.choice(own, n, replace=len(own) < n) if len(own) else rng.choice(len(set_.train), n))
    chosen = np.concatenate(rows)
    return distances(set_, set_.train.counts[chosen], set_.z[chosen])


@torch.inference_mode()
def decoded(set_: Prepared, seed: int) -> dict[str, float]:
    made = []
    for i, (part, z) in enumerate(zip(chunks(set_.held_out), set_.z_held_out.split(128), strict=True)):
        sizes = torch.from_numpy(np.asarray(part.counts.sum(1)).ravel())
        made.append(draw_sparse(set_.vae.vae.decode(z, sizes), list(range(128 * i, 128 * i + len(part))), seed=seed))
    return distances(set_, sp.vstack(made, format="csr"), set_.z_held_out)


def main() -> None:
    parser = convergence_sets.command_line(__doc__, ROOT, "flow_convergence", list(VARIANTS))
    parser.add_argument("--seconds", type=float, nargs="+", default=[20, 40], help="of a flow")
    parser.add_argument("--vae-seconds", type=float, default=60)
    args = parser.parse_args()

    def run(name: str, seed: int, wanted: convergence_sets.Wanted, keep: convergence_sets.Keep) -> None:
        set_ = prepare(name, args, seed)
        keep("floor", 0, floor(set_, seed))
        keep("decoded", 0, decoded(set_, seed))
        for variant, seconds in wanted:
            chosen = VARIANTS[variant]
            dit, steps, centre, scale = train_flow(
                set_.train.classes, set_.z, set_.vae.vocabulary, chosen, seconds=seconds, seed=seed
            )
            keep(variant, seconds, score(set_, chosen, dit, centre, scale, seed), steps=steps)

    convergence_sets.run_all(args, run)


if __name__ == "__main__":
    main()
