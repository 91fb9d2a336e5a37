"""The MLP VAE baseline: its terms are those of the formula, its draws come from the generator."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scldm.checkpoints.upstream.names_scvi import scvi_key, scvi_state_from_upstream
from scldm.data.batch import CellBatch
from scldm.nn.config import ScviConfig
from scldm.nn.likelihood import nb_log_prob
from scldm.nn.scvi import NormalLatent, ScviVAE

G = 12


def a_vae(**choices) -> ScviVAE:
    torch.manual_seed(0)
    return ScviVAE(ScviConfig(n_hidden=16, n_layers=2, n_latent=3, **choices), n_genes=G).double().eval()


def some_cells(n: int = 6) -> CellBatch:
    return CellBatch.from_dense(torch.poisson(torch.full((n, G), 2.0), torch.Generator().manual_seed(1)).double())


def test_means_sum_to_the_library_size():
    vae, cells = a_vae(), some_cells()
    mu = vae.decode(vae.encode(cells).loc, cells.library_size).mu
    torch.testing.assert_close(mu.sum(1), cells.library_size)


@pytest.mark.parametrize("shared", [True, False])
def test_the_likelihood_is_the_plain_formula_at_the_drawn_latent(shared):
    vae, cells = a_vae(shared_theta=shared), some_cells()
    eps = torch.randn(6, 3, dtype=torch.float64)
    decoded = vae.decode(vae.encode(cells).sample(eps), cells.library_size)
    plain = -nb_log_prob(cells.dense(G), decoded.mu, decoded.theta.expand_as(decoded.mu)).sum(1)
    torch.testing.assert_close(vae.loss(cells, eps).nll, plain, rtol=1e-12, atol=1e-12)


def test_the_kl_term_is_on_average_the_closed_form_times_its_weight():
    vae, one = a_vae(kl_weight=0.7), some_cells(1)
    q = vae.encode(one)
    exact = 0.7 * kl_divergence(Normal(q.loc, q.scale), Normal(0.0, 1.0)).sum()
    many = CellBatch.from_dense(one.dense(G).expand(2000, -1).clone())
    draws = vae.loss(many, torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)).double()).kl
    assert (draws.mean() - exact).abs() < 4 * draws.std() / 2000**0.5


def test_the_draw_comes_from_the_generator_alone():
    vae, cells = a_vae(), some_cells()
    one, same, other = (vae(cells, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_log_probability_of_a_normal_latent_is_summed_over_its_width():
    q = NormalLatent(torch.zeros(1, 2), torch.ones(1, 2))
    assert q.log_prob(torch.zeros(1, 2)).item() == pytest.approx(-1.8378770664)


def test_a_gene_outside_the_vocabulary_and_another_prior_are_refused():
    with pytest.raises(ValueError, match="gene id 12 is outside the model's 12 genes"):
        a_vae().encode(CellBatch.from_dense(torch.ones(1, 13).double()))
    with pytest.raises(ValueError, match="only the standard normal prior is known"):
        scvi_state_from_upstream({"prior.loc": torch.ones(1, 3)})
    with pytest.raises(KeyError, match="not a parameter of upstream's MLP VAE"):
        scvi_key("encoder.other.weight")
