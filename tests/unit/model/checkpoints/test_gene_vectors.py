"""New genes start where vectors of genes, from any other model, predict their embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models.small_models import CELL_TYPES, write_vae

from scldm.checkpoints.gene_vectors import GeneVectors, _ridge, predict_embeddings, read_gene_vectors
from scldm.checkpoints.native import LoadedVAE, load_vae
from scldm.checkpoints.start_from import start_vae
from scldm.data.vocabulary import Vocabulary
from scldm.errors import CheckpointError, InputError
from scldm.nn.vae import VAE

KNOWN, NEW = [f"g{i}" for i in range(40)], ["n0", "n1", "n2"]


def data(noise: float = 0.0) -> tuple[GeneVectors, np.ndarray, np.ndarray]:
    """Vectors of all genes but n2, embeddings of the known ones, and the true ones of the new ones."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 1, (43, 8))
    y = x @ rng.normal(size=(8, 5)) + 2 + noise * rng.normal(size=(43, 5))
    return GeneVectors((*KNOWN, "n0", "n1"), x[:42]), y[:40], y[40:42]


def test_embeddings_that_follow_from_the_vectors_are_found() -> None:
    vectors, old, true = data()
    found = predict_embeddings(vectors, KNOWN, old, NEW)
    assert found.known.tolist() == [True, True, False]
    np.testing.assert_allclose(found.values, true, atol=0.05)
    assert found.explained > 0.999


def test_vectors_that_say_nothing_give_the_mean() -> None:
    vectors, old, _ = data()
    found = predict_embeddings(vectors, KNOWN, np.random.default_rng(1).normal(size=old.shape), NEW)
    assert found.explained < 0.2
    none = predict_embeddings(vectors, KNOWN, np.ones_like(old), NEW)
    np.testing.assert_allclose(none.values, 1)
    assert none.explained == 0


def test_the_share_is_that_of_fits_without_each_gene() -> None:
    vectors, old, _ = data(noise=1.0)
    x = vectors.values[:40] - vectors.values[:40].mean(0)
    y = old - old.mean(0)
    _, explained = _ridge(x, y)
    best = -np.inf
    for penalty in np.geomspace(1e-3, 1e3, 13) * (x**2).sum() / 8:
        errors, base = 0.0, 0.0
        for i in range(40):
            rest = np.delete(np.arange(40), i)
            cx, cy = x[rest] - x[rest].mean(0), y[rest] - y[rest].mean(0)
            w = np.linalg.solve(cx.T @ cx + penalty * np.eye(8), cx.T @ cy)
            errors += ((y[i] - y[rest].mean(0) - (x[i] - x[rest].mean(0)) @ w) ** 2).sum()
            base += ((y[i] - y[rest].mean(0)) ** 2).sum()
        best = max(best, 1 - errors / base)
    assert 0 < explained == pytest.approx(best, abs=1e-6)


def test_too_few_vectors_and_vectors_of_other_genes_are_refused() -> None:
    vectors, old, _ = data()
    with pytest.raises(InputError, match=r"none of the 1 new genes \(x\) has a vector; the table's first genes are g0"):
        predict_embeddings(vectors, KNOWN, old, ["x"])
    with pytest.raises(InputError, match="9 genes of the model have a vector, and at least 10"):
        predict_embeddings(vectors, KNOWN[:9], old[:9], NEW)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("place", ["index", "first", "named"])
def test_tables_are_read_with_ids_in_the_index_or_a_column(tmp_path: Path, ending: str, place: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 2)).round(3)
    table = pd.DataFrame(values, columns=["a", "b"], index=pd.Index(["g0", "g1", "g2"], name="gene"))
    if place != "index":
        table = table.reset_index(names="gene" if place == "first" else "feature_id")
    path = tmp_path / f"genes{ending}"
    if ending == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="," if ending == ".csv" else "\t", index=place == "index")
    found = read_gene_vectors(path, "gene_embeddings")
    assert found.ids == ("g0", "g1", "g2")
    np.testing.assert_allclose(found.values, values)


def test_all_that_is_wrong_with_a_table_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "genes.csv"
    path.write_text("feature_id,a,b\ng0,1,x\ng0,2,3\ng1,,4\n")
    with pytest.raises(InputError, match=r"1 genes have several rows \(g0\); 2 fields .* the first is column b of g0"):
        read_gene_vectors(path, "start_from.gene_embeddings")
    path.write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(InputError, match="has no gene ids: name their column feature_id"):
        read_gene_vectors(path, "start_from.gene_embeddings")


@pytest.fixture
def trained(tmp_path: Path) -> LoadedVAE:
    loaded = load_vae(write_vae(tmp_path / "vae", input="count_aware", gene_bias=True, genes_seq_len=None))
    genes = tuple(KNOWN)
    vae = VAE(loaded.vae.config, n_genes=len(genes))
    return LoadedVAE(vae, Vocabulary(genes, genes, (CELL_TYPES,)), loaded.library_sizes)


def test_a_vae_starts_new_genes_at_what_their_vectors_predict(trained: LoadedVAE) -> None:
    vectors, _, _ = data()
    genes = ("g3", *NEW, "g0")
    vae = VAE(trained.vae.config, n_genes=5)
    vae.start_at(torch.ones(5))
    started = start_vae(vae, Vocabulary(genes, genes, (CELL_TYPES,)), trained, gene_vectors=vectors)
    old = trained.vae.gene_embedding.detach()
    expected = predict_embeddings(vectors, KNOWN, old.double().numpy(), NEW)
    np.testing.assert_allclose(vae.gene_embedding[1:3].detach().numpy(), expected.values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vae.gene_embedding[3], old.mean(0))
    assert torch.equal(vae.gene_embedding[[0, 4]], old[[3, 0]])
    assert started.facts()["gene_vectors"]["gene_embedding"]["genes"] == 2
    assert any("2 new genes start where their vector predicts" in line for line in started.lines())


def test_a_table_of_symbols_is_matched_by_name(trained: LoadedVAE) -> None:
    vectors, _, _ = data()
    named = LoadedVAE(
        trained.vae, Vocabulary(tuple(f"ENSG{i:011d}" for i in range(40)), tuple(KNOWN)), trained.library_sizes
    )
    vae = VAE(trained.vae.config, n_genes=2)
    vae.start_at(torch.ones(2))
    ids = ("ENSG00000000003", "ENSG99999999999")
    started = start_vae(vae, Vocabulary(ids, ("g3", "n0")), named, gene_vectors=vectors)
    assert started.gene_vectors["gene_embedding"]["genes"] == 1
    expected = predict_embeddings(vectors, KNOWN, trained.vae.gene_embedding.detach().double().numpy(), ["n0"])
    np.testing.assert_allclose(vae.gene_embedding[1].detach().numpy(), expected.values[0], rtol=1e-5, atol=1e-6)


def test_a_table_is_refused_where_no_gene_is_new(trained: LoadedVAE) -> None:
    vectors, _, _ = data()
    vae = VAE(trained.vae.config, n_genes=40)
    vae.start_at(torch.ones(40))
    with pytest.raises(CheckpointError, match="the model has every gene already; leave it out"):
        start_vae(vae, trained.vocabulary, trained, gene_vectors=vectors)
