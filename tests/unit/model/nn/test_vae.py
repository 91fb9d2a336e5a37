"""Properties of the transformer VAE; its fast forms equal its plain formulas.

That it equals upstream's recorded outputs is checked by test_parity.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from scldm.data.batch import CellBatch
from scldm.nn.config import VAEConfig
from scldm.nn.likelihood import GeneSample, gene_probabilities, nb_log_prob, nb_nll, sample_genes
from scldm.nn.vae import THETA_START, VAE


def small_vae(seed: int = 0, **choices) -> VAE:
    torch.manual_seed(seed)
    vae = VAE(
        VAEConfig(d_model=16, n_latent_tokens=4, latent_width=6, n_heads=2, n_heads_cross=2, **choices), n_genes=40
    )
    with torch.no_grad():  # the count function starts as the identity; give it something to say
        for p in vae.encoder.counts.parameters():
            p.normal_(std=0.5)
    return vae.double()


def some_cells(n: int = 5, seed: int = 0) -> CellBatch:
    g = torch.Generator().manual_seed(seed)
    counts = torch.poisson(torch.rand(n, 40, generator=g) * 3, generator=g) * (torch.rand(n, 40, generator=g) < 0.4)
    return CellBatch.from_dense(counts.double())


def test_the_order_of_a_cells_genes_does_not_matter():
    vae, cells = small_vae(), some_cells(1)
    order = torch.randperm(len(cells.gene_ids), generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(cells, gene_ids=cells.gene_ids[order], counts=cells.counts[order])
    torch.testing.assert_close(vae.encode(cells), vae.encode(shuffled))


def test_a_cells_latent_does_not_depend_on_the_other_cells_of_the_batch():
    vae = small_vae()
    many = some_cells(5)
    alone = CellBatch.from_dense(many.dense(40)[2:3])
    torch.testing.assert_close(vae.encode(many)[2:3], vae.encode(alone))


@pytest.mark.parametrize(
    ("mode", "sees"), [("count_aware", True), ("log1p", False), ("sqrt", False), ("anscombe", False)]
)
def test_only_the_count_aware_encoder_sees_how_much_a_gene_is_expressed(mode, sees):
    vae, cells = small_vae(input=mode), some_cells()
    ones = dataclasses.replace(cells, counts=torch.ones_like(cells.counts))
    apart = (vae.encode(cells) - vae.encode(ones)).abs().max().item()
    assert (apart > 1e-2) if sees else (apart < 1e-5)


def test_renaming_the_genes_permutes_the_decoders_means():
    vae, cells = small_vae(), some_cells()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    z = vae.encode(cells)
    before = vae.decode_mu(z, cells.library_size)
    with torch.no_grad():
        for name in ("gene_embedding", "log_theta", "gene_bias"):
            getattr(vae, name).copy_(getattr(vae, name)[order])
    torch.testing.assert_close(vae.decode_mu(z, cells.library_size), before[:, order])


def test_means_of_a_cell_sum_to_its_library_size():
    vae, cells = small_vae(), some_cells()
    torch.testing.assert_close(vae.decode_mu(vae.encode(cells), cells.library_size).sum(1), cells.library_size)


@pytest.mark.parametrize("head", ["nb_shared", "nb_cell"])
def test_tiles_change_neither_the_likelihood_nor_a_gradient(head):
    cells = some_cells()
    grads = []
    for tile in (7, 1000):
        vae = small_vae(head=head)
        vae.nll(cells, vae.encode(cells), tile=tile).mean().backward()
        grads.append({k: p.grad for k, p in vae.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-9, atol=1e-9)


def test_the_sparse_likelihood_equals_the_plain_formula():
    vae, cells = small_vae(), some_cells()
    z = vae.encode(cells)
    decoded = vae.decode(z, cells.library_size)
    plain = -nb_log_prob(cells.dense(40), decoded.mu, decoded.theta).sum(1)
    torch.testing.assert_close(vae.nll(cells, z), plain, rtol=1e-9, atol=1e-9)


def test_scoring_all_genes_as_a_sample_is_the_exact_likelihood():
    vae, cells = small_vae(), some_cells()
    everything = GeneSample(torch.arange(40), torch.ones(40, dtype=torch.float64), torch.arange(40))
    torch.testing.assert_close(vae(cells, everything), vae(cells), rtol=1e-9, atol=1e-9)


def test_the_likelihood_over_sampled_genes_is_unbiased_for_given_proportions():
    cells = some_cells()
    g = torch.Generator().manual_seed(0)
    log_proportion = torch.randn(5, 40, generator=g, dtype=torch.float64).log_softmax(1)
    theta = torch.rand(40, generator=g, dtype=torch.float64) + 0.5
    probability = torch.rand(40, generator=g, dtype=torch.float64) * 0.8 + 0.2
    draws = []
    for _ in range(1000):
        s = sample_genes(probability, g)
        draws.append(nb_nll(cells, log_proportion[:, s.gene_ids], theta[s.gene_ids], s))
    draws = torch.stack(draws)
    error = (draws.mean(0) - nb_nll(cells, log_proportion, theta)).abs()
    assert (error < 4 * draws.std(0) / len(draws) ** 0.5).all()


def test_gene_probabilities_sum_to_the_requested_number_and_favour_expressed_genes():
    mean = torch.tensor([100.0, 10, 1, 0.1, 0.01, 0.001, 0, 0])
    p = gene_probabilities(mean, 3)
    assert p.sum().item() == pytest.approx(3, rel=1e-3)
    assert (p[:-1] >= p[1:]).all()
    assert p.max() <= 1
    assert p.min() > 0
    assert (gene_probabilities(mean, 8) == 1).all()


def test_an_untrained_model_starts_at_the_mean_profile():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(), n_genes=30)
    mean = torch.rand(30) + 0.1
    vae.start_at(mean)
    assert torch.allclose(vae.log_theta.exp(), torch.tensor(THETA_START))
    torch.testing.assert_close(vae.gene_bias.softmax(0), mean / mean.sum())
    with pytest.raises(ValueError, match=r"must be \(30,\)"):
        vae.start_at(mean[:5])


def test_the_pad_limit_of_an_upstream_model_is_reported():
    vae = small_vae(input="log1p", genes_seq_len=3)
    with pytest.raises(ValueError, match=r"more than genes_seq_len \(3\)"):
        vae.encode(some_cells())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (-1.0, r"must not be negative; 1 are not, the first is -1 \(cell 1, gene 2\)"),
        (0.69, r"must be whole numbers, not normalised or log-transformed values; 1 are not, the first is 0.69"),
        (float("nan"), r"must be finite; 1 are not, the first is nan"),
    ],
)
def test_values_that_are_not_counts_are_refused_with_their_cell_and_gene(value, reason):
    counts = torch.ones(2, 3)
    counts[1, 2] = value
    with pytest.raises(ValueError, match=reason):
        CellBatch.from_dense(counts)


def test_mismatched_shapes_types_and_vocabularies_are_refused_with_both_values():
    with pytest.raises(ValueError, match=r"must be \(cells, genes\); got shape \(3,\)"):
        CellBatch.from_dense(torch.ones(3))
    with pytest.raises(ValueError, match=r"conditions\['cell_type'\] must be class ids, int64 of shape \(2,\); got"):
        CellBatch.from_dense(torch.ones(2, 3), {"cell_type": torch.ones(2)})
    vae, cells = small_vae(), some_cells()
    with pytest.raises(ValueError, match="gene id 49 is outside the model's 40 genes"):
        vae.encode(CellBatch.from_dense(torch.ones(1, 50, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"z must be \(b, 4, 6\).*got \(5, 6, 4\)"):
        vae.decode(vae.encode(cells).transpose(1, 2), cells.library_size)
    with pytest.raises(ValueError, match=r"library_size must be \(5,\).*got \(5, 1\)"):
        vae.decode(vae.encode(cells), cells.library_size[:, None])


@pytest.mark.parametrize("plain", [True, False])
def test_an_empty_cell_is_named(plain):
    vae, counts = small_vae(), torch.ones(3, 40, dtype=torch.float64)
    vae.encoder.plain = plain
    counts[1] = 0
    with pytest.raises(ValueError, match=r"cells \[1\] of the batch have no tokens"):
        vae.encode(CellBatch.from_dense(counts))


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"d_model \(30\) must be a multiple of n_heads \(8\)"):
        VAEConfig(d_model=30, n_heads=8)
