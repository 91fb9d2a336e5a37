"""A shard that is written piece by piece is the h5ad that anndata would read, whatever the pieces."""

from __future__ import annotations

import hashlib

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pipeline.inference import shard_writer as shard_file
from pipeline.inference.shard_writer import ShardFile

N, GENES, WIDTH = 1000, 50, 6
RNG = np.random.default_rng(0)
COUNTS = sp.random(N, GENES, 0.3, "csr", np.float64, RNG)
COUNTS.data = RNG.integers(1, 1000, COUNTS.nnz)
COUNTS = COUNTS.astype(np.int32)
LATENTS = RNG.normal(size=(N, WIDTH)).astype(np.float32)
OBS = pd.DataFrame(
    {"kind": pd.Categorical.from_codes(np.arange(N) % 3 - 1, ["a", "b"])}, index=[f"c{i}" for i in range(N)]
)
VAR = pd.DataFrame({"feature_name": [f"G{i}" for i in range(GENES)]}, index=[f"g{i}" for i in range(GENES)])


def write(path, piece: int) -> str:
    with ShardFile(path, n_genes=GENES, latent_width=WIDTH) as out:
        for i in range(0, N, piece):
            out.add(COUNTS[i : i + piece], LATENTS[i : i + piece])
        out.finish(OBS, VAR, {"scldm": {"seed": 1, "notes": ["one", "two"]}})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_anndata_reads_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "CHUNK_BYTES", 2048)  # many chunks
    write(tmp_path / "a.h5ad", 7)
    cells = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert (cells.X != COUNTS).nnz == 0
    assert cells.X.dtype == np.int32
    np.testing.assert_array_equal(cells.obsm["X_scldm"], LATENTS)
    pd.testing.assert_frame_equal(cells.obs, OBS)
    pd.testing.assert_frame_equal(cells.var, VAR)
    assert list(cells.uns["scldm"]["notes"]) == ["one", "two"]
    assert anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")[10:12].to_memory().shape == (2, GENES)


def test_pieces_of_any_size_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "CHUNK_BYTES", 2048)
    assert len({write(tmp_path / f"{piece}.h5ad", piece) for piece in (1, 7, 64, 1000)}) == 1


def broken(path, error: BaseException | None) -> None:
    with ShardFile(path, n_genes=GENES, latent_width=WIDTH) as out:
        out.add(COUNTS[:5], LATENTS[:5])
        if error is not None:
            raise error
        out.finish(OBS, VAR, {})


def test_a_shard_that_is_left_half_way_leaves_no_file(tmp_path):
    with pytest.raises(KeyError):
        broken(tmp_path / "a.h5ad", KeyError())
    assert not list(tmp_path.iterdir())


def test_obs_of_another_length_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="obs has 1000 rows, the shard 5 cells"):
        broken(tmp_path / "a.h5ad", None)
