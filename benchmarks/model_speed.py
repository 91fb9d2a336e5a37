"""The model against its own plain formulas: upstream's mathematics, dense and padded, written with SDPA.

Both sides have the same weights and the same cells, in one process, in turns. Upstream's default VAE (width 32, 8 + 8
layers, 16 x 16 latents, log1p) and DiT (width 256, 8 layers), 17,002 genes, 6,147 padded tokens, about 1,500 expressed
genes a cell. Each side's outputs are compared before the clock starts.

    python benchmarks/model_speed.py --json benchmarks/results/model_speed.json
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import plain_model as plain
import torch
from harness import Row, alternate, report
from torch import Tensor

from scldm.data.batch import CellBatch
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE

N_GENES, GENES_SEQ_LEN, EXPRESSED, N_CLASSES = 17_002, 6_147, 1_500, 14


def build_vae() -> VAE:
    torch.manual_seed(0)
    config = VAEConfig(
        d_model=32, n_layers=8, n_heads=8, n_heads_cross=4, n_latent_tokens=16, latent_width=16, input="log1p",
        gene_bias=False, genes_seq_len=GENES_SEQ_LEN,
    )  # fmt: skip
    vae = VAE(config, n_genes=N_GENES)
    with torch.no_grad():
        vae.gene_embedding.normal_()
    return vae


def build_dit() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(d_model=256, n_layers=8, n_heads=8, strategy="mutually_exclusive")
    dit = DiT(config, n_latent_tokens=16, latent_width=16, n_classes={"clusters": N_CLASSES})
    with torch.no_grad():
        for parameter in dit.parameters():  # gates and head start at zero: a model that has learnt something
            parameter.add_(0.02 * torch.randn_like(parameter))
    return dit


def make_cells(n: int) -> CellBatch:
    """Genes drawn by Zipf-like weights, about 1,500 a cell, small counts: what a droplet experiment looks like."""
    g = torch.Generator().manual_seed(0)
    popularity = 1 / (torch.arange(N_GENES) + 300.0)
    counts = torch.zeros(n, N_GENES)
    for row in counts:
        expressed = int(torch.randint(EXPRESSED - 300, EXPRESSED + 300, (), generator=g))
        genes = torch.multinomial(popularity, expressed, generator=g)
        row[genes] = 1 + torch.poisson(torch.ones(expressed), generator=g)
    return CellBatch.from_dense(counts)


def optimizer_step(module: torch.nn.Module, *, fused: bool) -> Callable[[Tensor], None]:
    """Backward pass and AdamW; upstream's optimizer goes through the parameters one by one."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, weight_decay=0.0, fused=fused, foreach=False)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class Sides:
    """The calls that are compared. Each returns what it computed, so that equality can be checked first."""

    def __init__(self, n_train: int, n_encode: int, n_sample: int, steps: int):
        self.vae, self.dit, self.steps = build_vae(), build_dit(), steps
        self.many, self.cells = make_cells(n_encode), make_cells(n_train)
        self.many_tokens = plain.padded_tokens(self.many, GENES_SEQ_LEN)
        self.tokens, self.dense = plain.padded_tokens(self.cells, GENES_SEQ_LEN), self.cells.dense(N_GENES)
        g = torch.Generator().manual_seed(1)
        self.z = torch.randn(n_train, 16, 16, generator=g)
        self.x0 = torch.randn(n_sample, 16, 16, generator=g)
        self.t = torch.rand(n_sample, generator=g)
        self.labels = {"clusters": torch.randint(0, N_CLASSES, (n_sample,), generator=g)}

    @torch.inference_mode()
    def encode(self) -> Tensor:
        return self.vae.encode(self.many)

    @torch.inference_mode()
    def plain_encode(self) -> Tensor:
        return plain.encode(self.vae, *self.many_tokens)

    @torch.inference_mode()
    def decode(self) -> Tensor:
        return self.vae.decode(self.z, self.cells.library_size).mu

    @torch.inference_mode()
    def plain_decode(self) -> Tensor:
        return plain.decode(self.vae, self.z, self.cells.library_size)[0]

    def loss(self) -> Tensor:
        return self.vae(self.cells).mean()

    def plain_loss(self) -> Tensor:
        return plain.loss(self.vae, *self.tokens, self.dense, self.cells.library_size)

    def flow_loss(self) -> Tensor:
        t = self.t[:, None, None]
        x1 = self.x0.flip(0)
        return (self.dit((1 - t) * self.x0 + t * x1, self.t, self.labels) - (x1 - self.x0)).square().mean()

    def sample(self, scale: float) -> Tensor:
        config = SamplerConfig(solver="euler", steps=self.steps, guidance=scale)
        return sample_latents(self.dit, self.x0, self.labels, config, PathConfig())

    @torch.inference_mode()
    def plain_sample(self, scale: float) -> Tensor:
        return plain.sample(self.dit, self.x0, self.labels, scale=scale, steps=self.steps)


def check_equal(s: Sides) -> dict[str, float]:
    """Largest relative difference of the two sides, fp32; far apart is an error, for then the times mean nothing."""
    pairs = {
        "encode": (s.encode(), s.plain_encode()),
        "decode": (s.decode(), s.plain_decode()),
        "loss": (s.loss().detach(), s.plain_loss().detach()),
        "sample_w1": (s.sample(1.0), s.plain_sample(1.0)),
        "sample_w2": (s.sample(2.0), s.plain_sample(2.0)),
    }
    apart = {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}
    far = {name: value for name, value in apart.items() if not value < 1e-4}
    if far:
        raise SystemExit(f"the two sides do not compute the same: {far}")
    return apart


def timings(s: Sides, n: int) -> list[Row]:
    step, plain_step = optimizer_step(s.vae, fused=True), optimizer_step(s.vae, fused=False)
    flow_step, plain_flow_step = optimizer_step(s.dit, fused=True), optimizer_step(s.dit, fused=False)
    b, unit = len(s.x0), "cells/s"
    return [
        alternate("encode", s.encode, s.plain_encode, work=s.many.n_cells, unit=unit, n=n),
        alternate("decode", s.decode, s.plain_decode, work=len(s.z), unit=unit, n=n),
        alternate(
            "train_step",
            lambda: step(s.loss()),
            lambda: plain_step(s.plain_loss()),
            work=s.cells.n_cells,
            unit=unit,
            n=n,
        ),
        alternate(
            "flow_step",
            lambda: flow_step(s.flow_loss()),
            lambda: plain_flow_step(s.flow_loss()),
            work=b,
            unit=unit,
            n=n,
        ),
        alternate("sample_w1", lambda: s.sample(1.0), lambda: s.plain_sample(1.0), work=b, unit=unit, n=n),
        alternate("sample_w2", lambda: s.sample(2.0), lambda: s.plain_sample(2.0), work=b, unit=unit, n=n),
    ]


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory needs Linux")


def peak_memory(side: str, n_cells: int) -> float:
    """MiB that one training step adds to a process that has the model and the batch; meant for a fresh process."""
    vae = build_vae()
    step = optimizer_step(vae, fused=side == "ours")

    def run(cells: CellBatch) -> None:
        if side == "ours":
            return step(vae(cells).mean())
        tokens, dense = plain.padded_tokens(cells, GENES_SEQ_LEN), cells.dense(N_GENES)
        return step(plain.loss(vae, *tokens, dense, cells.library_size))

    run(make_cells(1))  # optimizer state, libraries and their workspaces
    cells = make_cells(n_cells)
    before = resident("VmRSS")
    run(cells)
    return resident("VmHWM") - before


def memory_row(n_cells: int, n: int) -> Row:
    def measure(side: str) -> float:
        command = [sys.executable, __file__, "--peak-of", side, "--cells", str(n_cells)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pairs = [(measure("ours"), measure("plain")) for _ in range(n)]
    ours, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    return Row("train_step_peak_memory", ours, "MiB", other, ours / other, n, (min(ratios), max(ratios)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--quick", action="store_true", help="fewer cells and steps, 5 pairs; for a look, not a claim")
    parser.add_argument("--cells", type=int, help="cells of a training step (16)")
    parser.add_argument("--threads", type=int, help="threads of torch (all cores)")
    parser.add_argument("--peak-of", choices=["ours", "plain"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.peak_of:
        print(peak_memory(a.peak_of, a.cells))
        return
    n_train = a.cells or (4 if a.quick else 16)
    n, n_encode, n_sample, steps = (5, 16, 8, 2) if a.quick else (7, 32, 32, 10)
    sides = Sides(n_train, n_encode, n_sample, steps)
    apart = check_equal(sides)
    rows = timings(sides, n)
    rows.insert(3, memory_row(n_train, 1 if a.quick else 3))
    report(rows, a.json, cells={"train": n_train, "encode": n_encode, "sample": n_sample, "steps": steps}, apart=apart)


if __name__ == "__main__":
    main()
