"""Cells and likelihoods in bf16 beside those in fp32, on pairs trained on real cells.

A small VAE and a labelled DiT are trained in fp32 on a file. Held-out cells are then encoded and scored, and cells are
generated from the same noise, labels and library sizes, once with products in fp32 and once in bf16, as jobs do
(`scldm.nn.kernels.precision`). Generated cells are compared with real held-out ones in the 30 principal components of
the training cells (log1p CP10k): Fréchet distance (squared), Wasserstein-2, and the share of cells whose nearest real
training cells have their label. Reported is bf16 - fp32, with a 95 % interval: of the negative log-likelihood over
cells, which are the same on both sides; of the others from random halves of the cells, the same halves for both. An
interval that holds 0 means that the two were not told apart.

    python benchmarks/precision_quality.py pbmc3k=pbmc3k_full.h5ad worm=worm_embryo_neurons.h5ad --json FILE

A CPU without bf16 products computes them slowly and rounds as a GPU does; sums are in fp32 on both.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from distilled_quality import (
    FULL,
    LABEL,
    PATH,
    QUICK,
    TILE,
    Trained,
    cells_of,
    in_tiles,
    kept_pair,
    labels_of,
    noise,
    shape_of,
)  # fmt: skip
from generation_quality import Space
from harness import machine
from train_small import to_batch

from scldm.flow.config import SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.metrics.distribution.distances import frechet_distance, wasserstein
from scldm.metrics.resampling import Halves, half_width
from scldm.nn.kernels.precision import Precision, set_precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
NEIGHBOURS = 5
STREAM = 7  # of noise


@torch.inference_mode()
def held_out_nll(trained: Trained, counts: sp.csr_matrix) -> np.ndarray:
    """Return the negative log-likelihood of cells at their own latents, nats."""
    parts = []
    for i in range(0, counts.shape[0], TILE):
        cells = to_batch(counts[i : i + TILE])
        parts.append(trained.vae.nll(cells, trained.vae.encode(cells)).double().numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def latents(trained: Trained, n: int) -> torch.Tensor:
    solved = lambda x, k: sample_latents(trained.dit, x, k, SamplerConfig(), PATH)  # noqa: E731
    return in_tiles(solved, noise(n, shape_of(trained), STREAM), labels_of(trained, n, STREAM))


def recovered(cells: np.ndarray, wanted: np.ndarray, known: np.ndarray, classes: np.ndarray) -> float:
    """Return the share of cells whose nearest known cells have, by majority, the label that was asked for."""
    near = np.argsort(((cells[:, None] - known[None]) ** 2).sum(2), axis=1)[:, :NEIGHBOURS]
    found = [np.bincount(classes[row]).argmax() for row in near]
    return float(np.mean(np.array(found) == wanted))


def compare(trained: Trained, n: int, halves: int) -> dict[str, object]:
    """Return scores in both precisions, and how they differ."""
    held = trained.parts.held_out
    wanted = labels_of(trained, n, STREAM)[LABEL].numpy()
    nll, made, z = {}, {}, {}
    for precision in PRECISIONS:
        for network in (trained.vae, trained.dit):
            set_precision(network, precision)
        nll[precision] = held_out_nll(trained, held)
        z[precision] = latents(trained, n)
        made[precision] = cells_of(trained, z[precision], STREAM)
    space = Space.of(trained.parts.train)
    real, known, classes = space(held), space(trained.parts.train), trained.ids.numpy()
    labelled = classes < trained.dit.n_classes[LABEL]
    placed = {p: space(x) for p, x in made.items()}
    measures = {
        "frechet": lambda x, rows: frechet_distance(real, x),
        "w2": lambda x, rows: wasserstein(real, x, power=2, max_points=500, rng=np.random.default_rng(0)),
        "label recovery": lambda x, rows: recovered(x, wanted[rows], known[labelled], classes[labelled]),
    }
    everything = np.arange(n)
    some = Halves.draw(np.array(["all"] * n), halves, np.random.default_rng(0)).chosen
    change = nll["bf16"] - nll["fp32"]
    rows = [row("nll", nll["fp32"].mean(), change.mean(), 1.96 * change.std(ddof=1) / np.sqrt(len(change)))]
    for name, measure in measures.items():
        whole = {p: measure(placed[p], everything) for p in PRECISIONS}
        each = [measure(placed["bf16"][a], a) - measure(placed["fp32"][a], a) for a in some]
        rows.append(row(name, whole["fp32"], whole["bf16"] - whole["fp32"], half_width(np.array(each))))
    moved = float((z["bf16"] - z["fp32"]).norm() / z["fp32"].norm())
    same = float((made["bf16"] != made["fp32"]).sum() / (n * held.shape[1]))
    return {
        "cells": n,
        "latent change": float(f"{moved:.3g}"),
        "counts that differ": float(f"{same:.3g}"),
        "rows": rows,
    }


def row(name: str, fp32: float, change: float, wide: float) -> dict[str, object]:
    return {
        "score": name, "fp32": float(f"{fp32:.5g}"), "bf16 - fp32": float(f"{change:.3g}"),
        "half_width": float(f"{wide:.3g}"), "told_apart": bool(abs(change) > wide),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="NAME=FILE", help="h5ad of raw counts with obs.cell_type")
    parser.add_argument("--json", type=Path, help="write the tables here too")
    parser.add_argument("--pairs", type=Path, help="folder that keeps trained pairs, for a second run")
    parser.add_argument("--quick", action="store_true", help="small models; for a look, not a claim")
    a = parser.parse_args()
    torch.set_num_threads(1)
    effort = QUICK if a.quick else replace(FULL, n_cells=400)
    document: dict[str, object] = {"machine": machine(), "effort": vars(effort)}
    for name, file in (x.split("=", 1) for x in a.sets):
        trained = kept_pair(name, Path(file), a.pairs, effort)
        document[name] = compare(trained, effort.n_cells, effort.halves)
        text = json.dumps(document, indent=1)
        if a.json is not None:  # after every set, so that a stopped run leaves what it has
            a.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
