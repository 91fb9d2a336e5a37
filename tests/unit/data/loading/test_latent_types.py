"""The latent cache in float16: half the size, read back as what was rounded, and rounding that no decoder notices."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.models.small_models import CELL_TYPES, library_sizes, vae_config

from pipeline.config.job import EncodeConfig, TrainVaeConfig
from pipeline.data.loading.blocks import IpcBlocks
from pipeline.data.loading.collate import to_latent_batch
from pipeline.planning.sizes import DataFacts, latent_bytes
from pipeline.stages.encode import Encoder, EncoderSpec
from scldm.checkpoints.native import save_vae
from scldm.data.batch import CellBatch
from scldm.data.vocabulary import Vocabulary
from scldm.nn.config import VAEConfig
from scldm.nn.vae import VAE

M, E, G = 4, 8, 30


def counts(n: int) -> np.ndarray:
    """Counts of two kinds of cells, (n, G): each expresses one half of the genes more."""
    rng = np.random.default_rng(0)
    rate = np.where((np.arange(G) < G // 2) == (np.arange(n)[:, None] % 2 == 0), 6.0, 0.7)
    return rng.poisson(rate * rng.gamma(4, 0.25, (n, 1))) + np.eye(n, G, dtype=int)


@pytest.fixture(scope="module")
def trained() -> VAE:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(d_model=16, n_layers=1, n_latent_tokens=M, latent_width=E), n_genes=G)
    cells = CellBatch.from_dense(torch.from_numpy(counts(200)).float())
    vae.start_at(cells.dense(G).mean(0))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        vae(cells).mean().backward()
        optimizer.step()
    return vae


def table(n: int) -> pa.Table:
    x = counts(n)
    genes = [np.flatnonzero(row).astype(np.int32) for row in x]
    return pa.table({
        "soma_joinid": np.arange(n), "gene": pa.array(genes, pa.list_(pa.int32())),
        "count": pa.array([row[row > 0].astype(np.float32) for row in x], pa.list_(pa.float32())),
        "label:cell_type": np.zeros(n, np.int32), "library_size": x.sum(1).astype(np.float32),
        "split": ["train"] * n, "shard": np.zeros(n, np.int32),
    })  # fmt: skip


@pytest.fixture(scope="module")
def caches(trained, tmp_path_factory) -> dict[str, IpcBlocks]:
    """The same cells encoded with either type."""
    root = tmp_path_factory.mktemp("latents")
    genes = tuple(f"g{i}" for i in range(G))
    save_vae(root / "model", trained, Vocabulary(genes, genes, (CELL_TYPES,)), library_sizes(), card="")
    found = {}
    for kind in ("float32", "float16"):
        folder = root / kind
        folder.mkdir()
        spec = EncoderSpec(root / "model", folder, ("cell_type",), batch_size=7, threads=1, fault="", latents=kind)
        [record] = Encoder(spec)(table(25)).to_pylist()
        found[kind] = IpcBlocks(str(folder), ((record["file"], record["n_cells"]),))
    return found


def latents(source: IpcBlocks, rows: np.ndarray) -> torch.Tensor:
    return to_latent_batch(source.read(rows), ["cell_type"], shape=(M, E)).latents


def test_float16_holds_the_rounded_numbers_of_float32_and_is_read_as_float32(caches):
    rows = np.array([24, 0, 3, 3])
    whole, half = (latents(caches[kind], rows) for kind in ("float32", "float16"))
    assert half.dtype == torch.float32
    assert torch.equal(half, whole.half().float())
    assert not torch.equal(half, whole)
    assert caches["float16"].reader.schema.field("latent").type == pa.list_(pa.float16(), M * E)


def test_what_stands_beside_the_latents_is_the_same(caches):
    rows = np.arange(25)
    whole, half = (caches[kind].read(rows).drop_columns(["latent"]) for kind in ("float32", "float16"))
    assert whole.equals(half)


def test_rounding_moves_the_likelihood_by_less_than_a_thousandth_of_a_nat_and_bfloat16_by_more(trained):
    """Nats per cell of cells that it was trained on; bfloat16 has an eighth of float16's digits."""
    cells = CellBatch.from_dense(torch.from_numpy(counts(200)).float())
    with torch.inference_mode():
        z = trained.encode(cells)
        exact = trained.nll(cells, z).double()
        moved = {d: (trained.nll(cells, z.to(d).float()) - exact).abs() for d in (torch.float16, torch.bfloat16)}
    assert z.abs().max() <= E**0.5  # LayerNorm: float16 holds 65,504
    assert moved[torch.float16].mean() < 1e-3
    assert moved[torch.float16].mean() < moved[torch.bfloat16].mean() / 3


def test_folders_of_before_the_setting_keep_their_version_and_another_type_is_another_version():
    assert "latents" not in EncodeConfig().model_dump()
    assert "latents" not in EncodeConfig(latents="float32").model_dump()
    assert EncodeConfig(latents="float16").model_dump()["latents"] == "float16"


def test_a_plan_counts_half_the_bytes():
    vae = TrainVaeConfig(model=vae_config())
    data = DataFacts(n_cells={"train": 100, "validation": 10, "test": 5})
    whole, half = (latent_bytes(EncodeConfig(latents=kind), vae, data) for kind in ("float32", "float16"))
    assert whole == 2 * half == 110 * 3 * 4 * 4
