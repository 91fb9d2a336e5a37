"""First weights from cells: principal components as gene embeddings, and an encoder scaled to them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.decomposition import PCA

from scldm.data.batch import CellBatch
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.nn.config import VAEConfig
from scldm.nn.layers import merge_heads
from scldm.nn.vae import EMBEDDING_STD, VAE
from scldm.optim.first_weights import FLOOR, gene_components, start_at_components

GENES, UNSEEN = 80, 5  # the last genes have no counts


def counts(n: int = 200, seed: int = 0) -> sp.csr_matrix:
    """Cells of four types."""
    rng = np.random.default_rng(seed)
    profiles = np.exp(rng.normal(0, 1.5, (4, GENES)))
    profiles[:, -UNSEEN:] = 0
    share = profiles[rng.integers(4, size=n)]
    return sp.csr_matrix(rng.poisson(400 * share / share.sum(1, keepdims=True)).astype(np.float32))


def model(seed: int = 0, **given: object) -> VAE:
    sizes = {"d_model": 16, "n_layers": 1, "n_latent_tokens": 4, "latent_width": 8}
    torch.manual_seed(seed)
    vae = VAE(VAEConfig(**(sizes | given)), n_genes=GENES)
    vae.start_at(torch.from_numpy(np.asarray(counts().mean(0)).ravel()).float())
    return vae


def test_components_are_those_of_a_principal_component_analysis():
    x = log1p_cp10k(counts()).toarray()
    reference = PCA(n_components=6, svd_solver="full").fit(x / (x.std(0) + FLOOR))
    found = gene_components(counts(), 6)
    expected = reference.components_.T * np.sqrt(reference.singular_values_)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)
    at = np.abs(found).argmax(0)
    assert (found[at, np.arange(6)] > 0).all()


def test_there_are_no_more_components_than_cells_span():
    found = gene_components(counts(5), 16)
    assert found.shape == (GENES, 4)
    assert np.isfinite(found).all()


def test_embeddings_keep_their_size_and_genes_without_counts_their_own():
    vae, before = model(), model().gene_embedding.detach()
    start_at_components(vae, [CellBatch.from_csr(counts())])
    after = vae.gene_embedding.detach()
    assert float(after[:-UNSEEN].std()) == pytest.approx(EMBEDDING_STD, rel=1e-5)
    torch.testing.assert_close(after[-UNSEEN:], before[-UNSEEN:], rtol=0, atol=0)
    expected = gene_components(counts(), 16)[:-UNSEEN]
    ratio = after[:-UNSEEN].numpy() / expected
    np.testing.assert_allclose(ratio, np.full_like(ratio, ratio[0, 0]), rtol=1e-4)


def test_columns_beyond_the_components_stay_random():
    vae, before = model(), model().gene_embedding.detach()
    assert start_at_components(vae, [CellBatch.from_csr(counts(5))]) == 4
    torch.testing.assert_close(vae.gene_embedding.detach()[:, 4:], before[:, 4:], rtol=0, atol=0)
    assert not torch.equal(vae.gene_embedding.detach()[:, :4], before[:, :4])


def test_what_is_pooled_differs_between_cells_by_one_and_has_nothing_in_common_with_the_queries():
    vae, cells = model(), CellBatch.from_csr(counts())
    own = vae.encoder.queries.detach().clone()
    start_at_components(vae, [cells])
    with torch.no_grad():
        pooled = vae.encoder.out(merge_heads(vae.encoder.pool(cells, vae.gene_embedding)))
    assert float((pooled - pooled.mean(0)).std()) == pytest.approx(1, abs=0.1)
    common = vae.encoder.queries.detach() + pooled.mean(0) - own
    assert float(common.abs().mean()) < 0.5 * float(pooled.mean(0).abs().mean())


def test_latents_of_cells_differ_from_the_start():
    cells = CellBatch.from_csr(counts())
    random, components = model(), model()
    start_at_components(components, [cells])
    with torch.no_grad():
        spread = [float(vae.encode(cells).std(0).mean()) for vae in (random, components)]
    assert spread[1] > 2 * spread[0]


def test_a_few_steps_learn_more():
    def loss_after(steps: int, *, components: bool) -> float:
        vae, cells = model(), CellBatch.from_csr(counts())
        if components:
            start_at_components(vae, [cells])
        optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            vae(cells).mean().backward()
            optimizer.step()
        with torch.no_grad():
            return float(vae(CellBatch.from_csr(counts(seed=0))).mean())

    assert loss_after(20, components=True) < loss_after(40, components=False)


def test_weights_do_not_depend_on_how_cells_are_batched():
    one, two = model(), model()
    start_at_components(one, [CellBatch.from_csr(counts())])
    start_at_components(two, [CellBatch.from_csr(counts()[:70]), CellBatch.from_csr(counts()[70:])])
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "given",
    [{"shared_embedding": False, "decoder": {"d_model": 8, "n_heads": 2, "n_heads_cross": 2}}, {"head": "gaussian"},
     {"bias": True}, {"input": "log1p"}, {"gene_bias": False}],
    ids=str,
)  # fmt: skip
def test_every_kind_of_vae_has_finite_first_weights(given: dict[str, object]):
    vae, cells = model(**given), CellBatch.from_csr(counts())
    start_at_components(vae, [cells])
    with torch.no_grad():
        assert torch.isfinite(vae(cells)).all()
    for table in (vae.gene_embedding, vae.decoder_embedding):
        assert table is None or float(table.detach()[:-UNSEEN].std()) == pytest.approx(EMBEDDING_STD, rel=1e-5)


def test_one_cell_has_no_components():
    with pytest.raises(ValueError, match="two cells at least; got 1"):
        start_at_components(model(), [CellBatch.from_csr(counts(1))])
