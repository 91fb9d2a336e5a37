"""Cells per second to committed shards, against upstream's recipe in the same run; memory; the choice of the solver.

    python benchmarks/generation.py pbmc3k_full.h5ad --json benchmarks/results/generation.json

Both sides have the same weights: upstream's default VAE (width 32, 8 + 8 layers, 16 x 16 latents) and DiT (width 256,
8 layers), 17,002 genes. Ours is the actor of a generate job without Ray around it, up to the shard's record; upstream's
is `generation_sides.upstream_cells`. With a file of real cells the quality table is made on a pair trained on it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import generation_quality as quality
import torch
from generation_sides import (
    EVALUATIONS,
    LABEL,
    QUICK,
    SMALL,
    UPSTREAM,
    Pair,
    Size,
    build_pair,
    our_actor,
    our_cells,
    our_phases,
    upstream_cells,
    upstream_latents,
)
from harness import Row, alternate, report
from model_speed import resident
from rounds import markdown

from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.sampler import sample_latents

N_CELLS = 32  # of an end-to-end row: one tile
DISTILLED = 2  # evaluations of distilled_w1: the fewest that distilled_quality.py does not tell from the exact solution
NAMES = ("same_solver_w1", "same_solver_w2", "default_solver_w1", "distilled_w1")
SAME = SamplerConfig(solver="dopri5", rtol=1e-5, atol=1e-5)


def speed_rows(pair: Pair, n_cells: int, n: int, names: tuple[str, ...] = NAMES) -> list[Row]:
    """End to end, in turns."""
    rows = []
    sides = [
        ("same_solver_w1", SAME, 1.0, "flow"),
        ("same_solver_w2", SAME.model_copy(update={"guidance": 2.0}), 2.0, "flow"),
        ("default_solver_w1", SamplerConfig(), 1.0, "flow"),
        ("distilled_w1", SamplerConfig(), 1.0, f"distilled{DISTILLED}"),
    ]
    for name, sampler, scale, flow in sides:
        if name not in names:
            continue
        actor = our_actor(pair, n_cells, sampler, flow=flow)
        rows.append(
            alternate(
                name,
                lambda actor=actor: our_cells(actor),
                lambda scale=scale: upstream_cells(pair, n_cells, scale),
                work=n_cells,
                unit="cells/s",
                n=n,
            )
        )
    return rows


@torch.inference_mode()
def latent_errors(pair: Pair, n_cells: int) -> dict[str, float]:
    """Relative to dopri5 at 1e-8 in float64; the same noise and labels, w = 1 and 2."""
    g = torch.Generator().manual_seed(3)
    x0 = torch.randn(n_cells, pair.vae.config.n_latent_tokens, pair.vae.config.latent_width, generator=g)
    ids = {LABEL.name: torch.randint(0, len(LABEL.classes), (n_cells,), generator=g)}
    found = {}
    for w in (1.0, 2.0):
        tight = SamplerConfig(solver="dopri5", rtol=1e-8, atol=1e-8, guidance=w)
        exact = sample_latents(pair.dit.double(), x0.double(), ids, tight, PathConfig())
        pair.dit.float()
        ours = sample_latents(pair.dit, x0, ids, SAME.model_copy(update={"guidance": w}), PathConfig())
        upstream = upstream_latents(pair.dit, x0, ids, w)
        default = sample_latents(pair.dit, x0, ids, SamplerConfig(guidance=w), PathConfig())
        found[f"ours dopri5 1e-5, w={w:g}"] = quality.relative_error(ours, exact)
        found[f"upstream dopri5 1e-5, w={w:g}"] = quality.relative_error(upstream.x[n_cells:], exact)
        found[f"upstream evaluations a cell, w={w:g}"] = 3.0 * upstream.nfe
        found[f"ours default, w={w:g}"] = quality.relative_error(default, exact)
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def peak(n_cells: int) -> float:
    """MiB at most resident while this process generates; meant for a fresh one."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        sampler = SamplerConfig(solver="euler", steps=1)
        actor = our_actor(build_pair(SMALL, Path(root)), n_cells, sampler, shard_size=min(n_cells, 25_000))
        for shard in range(-(-n_cells // 25_000)):
            actor.make(shard)
        return resident("VmHWM")


def memory_row(few: int, many: int) -> Row:
    def measure(n_cells: int) -> float:
        command = [sys.executable, __file__, "--peak-of", str(n_cells)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    small, large = measure(few), measure(many)
    return Row("memory_100k_vs_10k", large, "MiB", small, large / small, 1, (large / small, large / small))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cells", type=Path, nargs="?", help="h5ad of raw counts for the quality table; else made-up cells"
    )
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--quick", action="store_true", help="small models, one pair; for a look, not a claim")
    parser.add_argument("--only", choices=["speed", "distilled", "memory", "quality"], help="one part alone")
    parser.add_argument("--threads", type=int, help="threads of torch (all cores)")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.peak_of:
        print(peak(a.peak_of))
        return
    size: Size = QUICK if a.quick else UPSTREAM
    rows: list[Row] = []
    more: dict[str, object] = {"cells": N_CELLS}
    if a.only in (None, "speed"):
        with tempfile.TemporaryDirectory() as root:
            pair = build_pair(size, Path(root))
            rows += speed_rows(pair, N_CELLS, 1 if a.quick else 5)
            phases = [our_phases(our_actor(pair, N_CELLS, SamplerConfig())) for _ in range(1 if a.quick else 5)]
            more["phases"] = {k: float(f"{statistics.median(p[k] for p in phases):.4g}") for k in phases[0]}
            more["latent_errors"] = latent_errors(pair, 16)
    if a.only == "distilled":  # also part of speed
        with tempfile.TemporaryDirectory() as root:
            pair = build_pair(size, Path(root))
            rows += speed_rows(pair, N_CELLS, 1 if a.quick else 3, ("distilled_w1",))
            each = {
                f"{n} evaluations": our_phases(our_actor(pair, N_CELLS, SamplerConfig(), flow=f"distilled{n}"))
                for n in EVALUATIONS
            }
            more["phases"] = {k: {x: float(f"{v:.4g}") for x, v in found.items()} for k, found in each.items()}
    if a.only in (None, "memory"):
        rows.append(memory_row(1_000, 4_000) if a.quick else memory_row(10_000, 100_000))
    if a.only in (None, "quality"):
        effort = quality.QUICK if a.quick else quality.FULL
        more["quality"] = quality.curve(quality.train_pair(a.cells, effort), effort)
    report(rows, a.json, **more)
    if "quality" in more:
        print(markdown(more["quality"]))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
