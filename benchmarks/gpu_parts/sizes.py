"""What is measured on: the presets and cells of the Census's shape on a GPU, or tiny ones in a rehearsal.

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from scldm.api.presets import preset
from scldm.data.batch import CellBatch
from scldm.nn.config import DiTConfig, VAEConfig

PRECISIONS = ("bf16", "tf32", "fp32")


@dataclass(frozen=True)
class Sizes:
    """Models, cells and repeats of a run."""

    device: torch.device
    vaes: dict[str, VAEConfig]
    dit: tuple[str, DiTConfig]
    n_genes: int
    scored: int  # genes of a training step
    expressed: int
    batches: tuple[int, ...]
    encoded: int  # cells of a batch of encode
    generated: int  # cells
    seconds: float  # a measurement lasts about as long
    backend: str  # of torch.compile
    rehearsal: bool

    @property
    def latent(self) -> tuple[int, int]:
        """(m, e) of the VAE that encodes and decodes: the middle one."""
        config = self.inference_vae[1]
        return config.n_latent_tokens, config.latent_width

    @property
    def inference_vae(self) -> tuple[str, VAEConfig]:
        names = list(self.vaes)
        name = names[len(names) // 2]
        return name, self.vaes[name]


def real_sizes() -> Sizes:
    """Return the sizes for a GPU: the Census presets, and the flow of `jobs/census`."""
    vaes = {}
    for name in ("census_20m", "census_70m", "census_270m"):
        recipe = preset(name).vae
        assert recipe is not None
        vaes[name] = recipe.model
    dit = DiTConfig(d_model=512, n_layers=12, n_heads=8)
    return Sizes(
        torch.device("cuda"), vaes, ("dit_512x12", dit), n_genes=36_130, scored=8_192, expressed=2_000,
        batches=(128, 32), encoded=512, generated=2_048, seconds=1.0, backend="inductor", rehearsal=False,
    )  # fmt: skip


def rehearsal_sizes() -> Sizes:
    """Return sizes that a CPU computes in a second."""
    small = VAEConfig(
        d_model=16, n_layers=1, n_heads=2, n_heads_cross=2, n_latent_tokens=4, latent_width=4, input="projconcat"
    )
    dit = DiTConfig(d_model=16, n_layers=1, n_heads=2)
    return Sizes(
        torch.device("cpu"), {"tiny": small}, ("tiny_dit", dit), n_genes=60, scored=30, expressed=10, batches=(4,),
        encoded=8, generated=40, seconds=0.0, backend="eager", rehearsal=True,
    )  # fmt: skip


def make_cells(n: int, sizes: Sizes) -> CellBatch:
    """Return n cells with `sizes.expressed` genes each, drawn at random, and small counts; on the device."""
    rng = np.random.default_rng(0)
    genes = np.stack([np.sort(rng.choice(sizes.n_genes, sizes.expressed, replace=False)) for _ in range(n)])
    counts = 1 + rng.poisson(1.0, genes.size).astype(np.float32)
    starts = np.arange(n + 1) * sizes.expressed
    matrix = sp.csr_matrix((counts, genes.reshape(-1), starts), shape=(n, sizes.n_genes))
    return CellBatch.from_csr(matrix).to(sizes.device)


@contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """Compute products of matrices in a precision: fp32, tf32 (a GPU's) or bf16 (by autocast)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
