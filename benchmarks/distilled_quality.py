"""Distilled flows against the exact solution of the flow that they were made from, on a pair trained on real cells.

A small VAE and a labelled DiT are trained on a file; the flow is distilled to 1, 2 and 4 evaluations. The same noise
and labels then go through the exact solution (dopri5 at 1e-6), through the distilled flows, and through a control:
Euler with as many evaluations of the flow itself. Every candidate is compared with cells of the exact solution from
*other* noise, by Fréchet distance (squared), Wasserstein-2 and recall, in the 30 principal components of generated
cells (log1p CP10k) and of latents. What is reported is the difference from the exact solution's own score, with a 95 %
interval from random halves of the cells, the same halves for both: an interval that holds 0 means that the two were not
told apart. The control shows that the ruler tells solvers apart at all.

    python benchmarks/distilled_quality.py pbmc3k=pbmc3k_full.h5ad worm=worm_embryo_neurons.h5ad --json FILE

Shape letters: n cells, m latent tokens, e latent width.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from generation_quality import Space
from harness import machine
from torch import Tensor
from train_small import Parts, Training, split_cells, split_counts, to_batch, train

from scldm.flow.config import Distilled, PathConfig, SamplerConfig
from scldm.flow.distilled import jump_losses, jump_times, sample_distilled, teacher_states
from scldm.flow.sampler import sample_latents
from scldm.generation.counter_random import normals
from scldm.generation.nb_draw import draw_counts
from scldm.metrics.distribution.distances import frechet_distance, wasserstein
from scldm.metrics.distribution.two_sample import manifold_metrics
from scldm.metrics.resampling import Halves, half_width
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dit import DiT, drop_labels
from scldm.nn.vae import VAE
from scldm.optim.adamw import adamw
from scldm.optim.config import EMAConfig, OptimizerConfig
from scldm.optim.ema import EMA
from scldm.optim.schedule import learning_rate_factor
from scldm.optim.short_flow import ShortTraining, batches, new_dit, train_flow
from scldm.random import generator

PATH = PathConfig()
EXACT = SamplerConfig(solver="dopri5", rtol=1e-6, atol=1e-6)
TRAJECTORIES, CANDIDATES, REFERENCE, COUNTS = 1, 2, 3, 4  # streams of noise
LABEL = "cell_type"
TILE = 128


@dataclass(frozen=True)
class Effort:
    """Sizes and lengths."""

    n_genes: int = 2_000
    vae_steps: int = 500
    flow_steps: int = 2_500
    flow_width: int = 64
    flow_layers: int = 4
    trajectories: int = 8_192
    distil_steps: int = 800
    n_cells: int = 600
    halves: int = 10


FULL = Effort()
QUICK = Effort(
    n_genes=200, vae_steps=5, flow_steps=5, flow_width=16, flow_layers=1, trajectories=128, distil_steps=5, n_cells=64,
    halves=5,
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A VAE and a flow on its latents, with the cells that they were trained on."""

    vae: VAE
    dit: DiT
    parts: Parts
    ids: Tensor  # class ids of the training cells


def train_pair(path: Path, effort: Effort) -> Trained:
    """Train a VAE on the genes of highest variance, and a flow with the label `cell_type` on its latents."""
    import anndata

    adata = anndata.read_h5ad(path)
    counts = sp.csr_matrix(adata.X).astype(np.float32)
    classes = adata.obs[LABEL].astype("category")
    n_classes = len(classes.cat.categories)
    ids = torch.from_numpy(classes.cat.codes.to_numpy().astype(np.int64))
    ids[ids < 0] = n_classes
    parts = split_counts(counts, n_genes=effort.n_genes, seed=0)
    own = ids[split_cells(counts.shape[0], 0)[0]]
    config = VAEConfig(d_model=32, n_layers=2, n_heads=4, n_heads_cross=4, n_latent_tokens=16, latent_width=16)
    training = Training(effort.vae_steps, 32, OptimizerConfig(lr=3e-3))
    vae = train(config, parts.train, training, seed=0).eval().requires_grad_(False)
    with torch.inference_mode():
        rows = range(0, parts.train.shape[0], TILE)
        z = torch.cat([vae.encode(to_batch(parts.train[i : i + TILE])) for i in rows]).clone()
    sizes = DiTConfig(d_model=effort.flow_width, n_layers=effort.flow_layers, n_heads=4)
    dit = new_dit(sizes, latent_shape=(16, 16), n_classes={LABEL: n_classes}, seed=0)
    how = ShortTraining(effort.flow_steps, 64, OptimizerConfig(lr=1e-3), EMAConfig(decay=0.995))
    dit.load_state_dict(train_flow(dit, z, {LABEL: own}, how, path=PATH, label_dropout=0.1, seed=0))
    return Trained(vae, dit.eval().requires_grad_(False), parts, own)


def kept_pair(name: str, file: Path, folder: Path | None, effort: Effort) -> Trained:
    """Return the pair of a set from the folder that keeps them; trained, and kept there, if it is not there yet."""
    kept = None if folder is None else folder / f"{name}.pt"
    if kept is not None and kept.is_file():
        trained: Trained = torch.load(kept, weights_only=False)  # our own file
        return trained
    trained = train_pair(file, effort)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(trained, kept)
    return trained


def noise(n: int, shape: tuple[int, int], stream: int) -> Tensor:
    return torch.from_numpy(normals(range(n), shape[0] * shape[1], seed=0, stream=stream)).unflatten(1, shape)


def labels_of(trained: Trained, n: int, stream: int, *, dropped: bool = False) -> dict[str, Tensor]:
    """Labels of n cells, drawn with the composition of the training cells."""
    g = generator(0, 99, stream)
    ids = {LABEL: trained.ids[torch.randint(len(trained.ids), (n,), generator=g)]}
    return drop_labels(ids, trained.dit.n_classes, p=0.1, strategy="joint", generator=g) if dropped else ids


def shape_of(trained: Trained) -> tuple[int, int]:
    return trained.vae.config.n_latent_tokens, trained.vae.config.latent_width


def solve(trained: Trained, n: int, *, steps: int = 16) -> tuple[Tensor, dict[str, Tensor]]:
    """Trajectories of the flow at five times, (n, 5, m, e), which hold those of 1, 2 and 4 jumps; and their labels."""
    x0, ids = noise(n, shape_of(trained), TRAJECTORIES), labels_of(trained, n, TRAJECTORIES, dropped=True)

    def solved(x: Tensor, k: dict[str, Tensor]) -> Tensor:
        return teacher_states(trained.dit, x, k, PATH, evaluations=4, steps=steps, scale=1.0)

    return in_tiles(solved, x0, ids), ids


def distil(
    trained: Trained, states: Tensor, ids: dict[str, Tensor], evaluations: int, effort: Effort, *, lr: float = 1e-3
) -> tuple[DiT, list[float]]:
    """Train as the stage does, in a plain loop; returns the averaged network and the miss of each jump, held out."""
    states = states[:, :: 4 // evaluations]
    held, times = len(states) // 16, jump_times(evaluations, PATH)
    dit = new_dit(trained.dit.config, latent_shape=shape_of(trained), n_classes=trained.dit.n_classes, seed=0)
    dit.load_state_dict(trained.dit.state_dict())
    config = OptimizerConfig(lr=lr, warmup=0.05, decay=0.5)
    optimizer, average = adamw(dit, config), EMA(dit, EMAConfig(decay=0.998))
    rows_of_steps = batches(len(states) - held, min(128, len(states) - held), seed=0)
    for step in range(effort.distil_steps):
        rows = next(rows_of_steps)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate_factor(step, effort.distil_steps, config)
        optimizer.zero_grad()
        jump_losses(dit, states[rows], {k: v[rows] for k, v in ids.items()}, times).mean().backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), config.clip)
        optimizer.step()
        average.update(step + 1)
    dit.load_state_dict(average.state_dict())
    dit.eval().requires_grad_(False)
    with torch.no_grad():
        missed = jump_losses(dit, states[-held:], {k: v[-held:] for k, v in ids.items()}, times).mean(0)
    return dit, missed.tolist()


# ---- comparison ----------------------------------------------------------------------------------------------------
def cells_of(trained: Trained, z: Tensor, stream: int) -> sp.csr_matrix:
    """Counts at the library sizes of training cells; the same draws for every candidate."""
    sizes = np.asarray(trained.parts.train.sum(1)).ravel()
    library = torch.from_numpy(sizes[np.arange(len(z)) % len(sizes)]).float()
    parts = []
    for i in range(0, len(z), TILE):
        with torch.inference_mode():
            decoded = trained.vae.decode(z[i : i + TILE], library[i : i + TILE])
        at = np.arange(i, i + len(decoded.mu))
        parts.append(draw_counts(decoded.mu.numpy(), decoded.theta.numpy(), at, seed=0, stream=COUNTS + stream))
    return sp.vstack(parts, format="csr")


def in_tiles(make: object, x0: Tensor, ids: dict[str, Tensor]) -> Tensor:
    rows = range(0, len(x0), TILE)
    return torch.cat([make(x0[i : i + TILE], {k: v[i : i + TILE] for k, v in ids.items()}) for i in rows])  # type: ignore[operator]


def candidates(trained: Trained, effort: Effort) -> tuple[dict[str, Tensor], Tensor, dict[str, object]]:
    """Latents of every candidate from the same noise, those of the reference from other noise, and facts."""
    began = time.perf_counter()
    states, ids = solve(trained, effort.trajectories)
    facts: dict[str, object] = {"seconds to solve": round(time.perf_counter() - began, 1)}
    x0, own = noise(effort.n_cells, shape_of(trained), CANDIDATES), labels_of(trained, effort.n_cells, CANDIDATES)
    other = noise(effort.n_cells, shape_of(trained), REFERENCE), labels_of(trained, effort.n_cells, REFERENCE)
    through = lambda config: lambda x, k: sample_latents(trained.dit, x, k, config, PATH)  # noqa: E731
    found = {"exact": in_tiles(through(EXACT), x0, own), "adams 14": in_tiles(through(SamplerConfig()), x0, own)}
    for n in (1, 2, 4):
        began = time.perf_counter()
        dit, missed = distil(trained, states, ids, n, effort)
        facts[f"distilled {n}"] = {
            "seconds": round(time.perf_counter() - began, 1), "missed": [float(f"{x:.3g}") for x in missed]
        }  # fmt: skip
        distilled = Distilled(evaluations=n, guidance=1.0, teacher="")
        found[f"distilled {n}"] = in_tiles(
            lambda x, k, dit=dit, d=distilled: sample_distilled(dit, x, k, d, PATH), x0, own
        )
        found[f"euler {n}"] = in_tiles(through(SamplerConfig(solver="euler", steps=n)), x0, own)
    return found, in_tiles(through(EXACT), *other), facts


SCORES = {
    "frechet": lambda x, y: frechet_distance(x, y),
    "w2": lambda x, y: wasserstein(x, y, power=2, max_points=500, rng=np.random.default_rng(0)),
    "recall": lambda x, y: manifold_metrics(x, y).recall,
}


def compare(trained: Trained, effort: Effort) -> dict[str, object]:
    """A row for each candidate and space: its scores, and how they differ from the exact solution's."""
    found, reference, facts = candidates(trained, effort)
    exact = found["exact"].flatten(1).double().numpy()
    centre = exact.mean(0)
    axes = np.linalg.svd(exact - centre, full_matrices=False)[2][:30].T
    of_cells = cells_of(trained, reference, 1)
    space = Space.of(of_cells)
    spaces = {
        "latents": (lambda z: (z.flatten(1).double().numpy() - centre) @ axes),
        "cells": (lambda z: space(cells_of(trained, z, 0))),
    }
    rows = []
    for name, place in spaces.items():
        real = space(of_cells) if name == "cells" else place(reference)
        placed = {k: place(z) for k, z in found.items()}
        halves = Halves.draw(np.array(["all"] * effort.n_cells), effort.halves, np.random.default_rng(0)).chosen
        others = Halves.draw(np.array(["all"] * effort.n_cells), effort.halves, np.random.default_rng(1)).chosen
        for score, measure in SCORES.items():
            base = [measure(real[b], placed["exact"][a]) for a, b in zip(halves, others, strict=True)]
            whole = measure(real, placed["exact"])
            for k, points in placed.items():
                row = {"space": name, "score": score, "candidate": k}
                value = whole if k == "exact" else measure(real, points)
                row["value"] = float(f"{value:.4g}")
                if k != "exact":
                    each = [measure(real[b], points[a]) for a, b in zip(halves, others, strict=True)]
                    wide = half_width(np.array(each) - np.array(base))
                    row |= {"difference": float(f"{value - whole:.3g}"), "half_width": float(f"{wide:.3g}")}
                    row["told_apart"] = bool(abs(value - whole) > wide)
                rows.append(row)
    errors = {
        k: float(f"{float((z - found['exact']).norm() / found['exact'].norm()):.3g}")
        for k, z in found.items()
        if k != "exact"
    }
    return {**facts, "latent error": errors, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="NAME=FILE", help="h5ad of raw counts with obs.cell_type")
    parser.add_argument("--json", type=Path, help="write the tables here too")
    parser.add_argument("--pairs", type=Path, help="folder that keeps trained pairs, for a second run")
    parser.add_argument("--quick", action="store_true", help="small models; for a look, not a claim")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    effort = QUICK if a.quick else FULL
    document: dict[str, object] = {"machine": machine(), "effort": vars(effort)}
    for name, file in (x.split("=", 1) for x in a.sets):
        trained = kept_pair(name, Path(file), a.pairs, effort)
        document[name] = compare(trained, effort)
        text = json.dumps(document, indent=1)
        if a.json is not None:  # after every set, so that a stopped run leaves what it has
            a.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
