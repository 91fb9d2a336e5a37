"""Quality against network evaluations: what decides the default solver.

A small VAE and a DiT are trained on real cells; the same noise and labels go through every solver. Latent error is
relative to a tight solution (dopri5 at 1e-8, float64): |z - z*| / |z*| over all cells. Cells are decoded, drawn and
compared with held-out real cells in the PCA of real training cells (log1p CP10k): the Fréchet distance (squared) and
MMD (median kernel), beside real against real.

Shape letters: n cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from train_small import Parts, Training, batches, read_counts, split_counts, to_batch, train

from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.objective import flow_loss
from scldm.flow.path import sample_path
from scldm.flow.sampler import sample_latents
from scldm.generation.counter_random import normals
from scldm.generation.nb_draw import draw_counts
from scldm.metrics.distribution.distances import frechet_distance, mmd2_median
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE
from scldm.optim.config import OptimizerConfig
from scldm.random import generator

SOLVERS: list[tuple[str, int]] = [
    ("euler", 20), ("euler", 50), ("midpoint", 5), ("midpoint", 10), ("midpoint", 20), ("heun", 10), ("heun3", 7),
    ("rk4", 5), ("rk4", 10), ("adams", 10), ("adams", 14), ("adams", 18), ("adams", 28), ("adams", 38),
]  # fmt: skip
STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}


@dataclass(frozen=True)
class Effort:
    n_genes: int = 2_000
    vae_steps: int = 500
    flow_steps: int = 1_500
    flow_width: int = 128
    flow_layers: int = 4
    n_cells: int = 500


FULL = Effort()
QUICK = Effort(n_genes=200, vae_steps=5, flow_steps=5, flow_width=16, flow_layers=1, n_cells=40)


@dataclass(frozen=True)
class Trained:
    vae: VAE
    dit: DiT
    parts: Parts


def made_up_cells(n: int = 400, n_genes: int = 400) -> sp.csr_matrix:
    """For a look without a file of real cells: two kinds of cell."""
    rng = np.random.default_rng(0)
    profile = rng.gamma(0.5, 2.0, (2, n_genes))[rng.integers(0, 2, n)]
    return sp.csr_matrix(rng.poisson(rng.gamma(2.0, profile / 2.0)).astype(np.float32))


def train_pair(path: Path | None, effort: Effort) -> Trained:
    """A VAE on the genes of highest variance, and an unconditional flow on its latents."""
    counts = made_up_cells() if path is None else read_counts(path)
    parts = split_counts(counts, n_genes=effort.n_genes, seed=0)
    config = VAEConfig(d_model=32, n_layers=2, n_heads=4, n_heads_cross=4, n_latent_tokens=16, latent_width=16)
    optimizer = OptimizerConfig(lr=3e-3)
    vae = train(config, parts.train, Training(effort.vae_steps, 16, optimizer), seed=0).eval().requires_grad_(False)
    with torch.inference_mode():
        rows = range(0, parts.train.shape[0], 128)
        z = torch.cat([vae.encode(to_batch(parts.train[i : i + 128])) for i in rows]).clone()
    return Trained(vae, train_flow(z, effort), parts)


def train_flow(z: Tensor, effort: Effort) -> DiT:
    """Flow matching on latents (n, m, e); the average of the weights of the second half is returned."""
    torch.manual_seed(0)
    config = DiTConfig(d_model=effort.flow_width, n_layers=effort.flow_layers, n_heads=4)
    dit = DiT(config, n_latent_tokens=z.shape[1], latent_width=z.shape[2], n_classes={})
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    average = torch.optim.swa_utils.AveragedModel(dit, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    rows, path = batches(len(z), 64, seed=1), PathConfig()
    for step in range(effort.flow_steps):
        g = generator(0, 77, step)
        x1 = z[next(rows)]
        t, x0 = torch.rand(len(x1), generator=g), torch.randn(x1.shape, generator=g)
        point = sample_path(x0, x1, t, path.path)
        optimizer.zero_grad()
        flow_loss(dit(point.x_t, t, {}), point, t, path).mean().backward()
        optimizer.step()
        average.update_parameters(dit)
    return average.module.eval().requires_grad_(False)


def relative_error(z: Tensor, exact: Tensor) -> float:
    return float((z.double() - exact).norm() / exact.norm())


def log_normalised(counts: sp.csr_matrix) -> np.ndarray:
    total = np.maximum(np.asarray(counts.sum(1)), 1)
    return np.log1p(counts.toarray() / total * 1e4)


@dataclass(frozen=True)
class Space:
    """PCA of real training cells."""

    mean: np.ndarray
    axes: np.ndarray  # (g, 30)

    @classmethod
    def of(cls, counts: sp.csr_matrix, n_axes: int = 30) -> Space:
        x = log_normalised(counts)
        mean = x.mean(0)
        axes = np.linalg.svd(x - mean, full_matrices=False)[2][:n_axes].T
        return cls(mean, axes)

    def __call__(self, counts: sp.csr_matrix) -> np.ndarray:
        return (log_normalised(counts) - self.mean) @ self.axes


@torch.inference_mode()
def curve(trained: Trained, effort: Effort) -> list[dict[str, object]]:
    """A row for each solver, and real against real."""
    dit, n = trained.dit, effort.n_cells
    m, e = trained.vae.config.n_latent_tokens, trained.vae.config.latent_width
    x0 = torch.from_numpy(normals(range(n), m * e, seed=0, stream=1)).unflatten(1, (m, e))
    exact = latents(dit.double(), x0.double(), SamplerConfig(solver="dopri5", rtol=1e-8, atol=1e-8))
    dit.float()
    parts = trained.parts
    space, held_out = Space.of(parts.train), sp.vstack([parts.held_out, parts.validation], format="csr")
    real = space(held_out)
    rows: list[dict[str, object]] = []
    for solver, steps in SOLVERS:
        z = latents(dit, x0, SamplerConfig(solver=solver, steps=steps))  # type: ignore[arg-type]
        rows.append(_row(f"{solver} × {steps}", evaluations(solver, steps), z, exact, trained, space, real))
    for tolerance in (1e-3, 1e-5):
        z = latents(dit, x0, SamplerConfig(solver="dopri5", rtol=tolerance, atol=tolerance))
        rows.append(_row(f"dopri5 {tolerance:g}", None, z, exact, trained, space, real))
    rows.append(_row("exact", None, exact.float(), exact, trained, space, real))
    half = len(real) // 2
    floor = {"Fréchet²": frechet_distance(real[:half], real[half:]), "MMD²": mmd2_median(real[:half], real[half:])}
    return [*rows, {"solver": "real | real (halves)", "evaluations": "–", "latent error": "–", **_short(floor)}]


def latents(dit: DiT, x0: Tensor, config: SamplerConfig) -> Tensor:
    return torch.cat([sample_latents(dit, part, {}, config, PathConfig()) for part in x0.split(128)])


def evaluations(solver: str, steps: int) -> int:
    return steps + 2 if solver == "adams" else steps * STAGES[solver]


def _row(
    name: str, n: int | None, z: Tensor, exact: Tensor, trained: Trained, space: Space, real: np.ndarray
) -> dict[str, object]:
    cells = space(_cells(trained, z))
    scores = {"Fréchet²": frechet_distance(real, cells), "MMD²": mmd2_median(real, cells)}
    return {
        "solver": name,
        "evaluations": "adaptive" if n is None else n,
        "latent error": f"{relative_error(z, exact):.1e}",
        **_short(scores),
    }


def _short(scores: dict[str, float]) -> dict[str, object]:
    return {name: float(f"{value:.4g}") for name, value in scores.items()}


def _cells(trained: Trained, z: Tensor) -> sp.csr_matrix:
    """Counts at the library sizes of training cells; the same draws for every solver."""
    sizes = np.asarray(trained.parts.train.sum(1)).ravel()
    library = torch.from_numpy(sizes[np.arange(len(z)) % len(sizes)]).float()
    parts = []
    for start in range(0, len(z), 128):
        decoded = trained.vae.decode(z[start : start + 128], library[start : start + 128])
        ids = np.arange(start, start + len(decoded.mu))
        parts.append(draw_counts(decoded.mu.numpy(), decoded.theta.numpy(), ids, seed=0, stream=2))  # type: ignore[union-attr]
    return sp.vstack(parts, format="csr")
