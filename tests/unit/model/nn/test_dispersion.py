"""Theta of genes: its most probable value, given the means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from scldm.data.batch import CellBatch
from scldm.nn.config import VAEConfig
from scldm.nn.dispersion import PRIOR_SD, GeneEntries, collect_entries, fit_log_theta, fit_theta, slopes
from scldm.nn.likelihood import nb_log_prob
from scldm.nn.vae import VAE

THETA = np.array([0.3, 1.0, 3.0, 10.0, 50.0])


def drawn(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and counts of cells with known theta, (n, g)."""
    rng = np.random.default_rng(seed)
    mu = rng.uniform(2, 12, (n, len(THETA)))
    counts = rng.poisson(mu * rng.gamma(np.broadcast_to(THETA, mu.shape)) / THETA)
    return torch.from_numpy(mu), torch.from_numpy(counts).double()


def entries(counts: torch.Tensor) -> GeneEntries:
    gene, cell = counts.T.nonzero(as_tuple=True)
    return GeneEntries(gene, cell, counts[cell, gene])


def test_slopes_are_the_derivatives_of_the_likelihood():
    mu, counts = drawn(40)
    eta = torch.tensor([-1.0, 0.0, 0.5, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    likelihood = nb_log_prob(counts, mu, eta.exp()).sum(0)
    (first,) = torch.autograd.grad(likelihood.sum(), eta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), eta)
    slope, bend = slopes(eta.detach(), mu, entries(counts), None)
    torch.testing.assert_close(slope, first.detach(), rtol=1e-5, atol=1e-5)  # upstream's epsilon is in the formula
    torch.testing.assert_close(bend, second, rtol=1e-5, atol=1e-5)


def test_newton_ends_where_a_search_ends():
    mu, counts = drawn(300)
    found = fit_log_theta(torch.zeros(5, dtype=torch.float64), mu, entries(counts))

    def at(eta: float, columns: slice) -> torch.Tensor:
        return nb_log_prob(counts[:, columns], mu[:, columns], torch.tensor(eta).double().exp()).sum()

    centre = minimize_scalar(lambda e: -float(at(e, slice(None))), bounds=(-4, 6), method="bounded").x
    for g in range(5):
        goal = lambda e, g=g: -float(at(e, slice(g, g + 1))) + 0.5 * ((e - centre) / PRIOR_SD) ** 2  # noqa: E731
        assert float(found[g]) == pytest.approx(minimize_scalar(goal, bounds=(-4, 6), method="bounded").x, abs=1e-3)


def test_known_dispersions_are_recovered_from_many_cells_and_any_start():
    mu, counts = drawn(20_000)
    for start in (-3.0, 0.0, 5.0):
        found = fit_log_theta(torch.full((5,), start, dtype=torch.float64), mu, entries(counts)).exp()
        np.testing.assert_allclose(found, THETA, rtol=0.1)


def test_a_gene_that_no_cell_expresses_is_unchanged_and_one_of_few_counts_shrinks_to_all_genes():
    mu, counts = drawn(200)
    counts[:, 0] = 0
    counts[:, 1] = 0
    counts[7, 1] = 1
    mu[:, 1] = 0.005
    found = fit_log_theta(torch.full((5,), 2.5, dtype=torch.float64), mu, entries(counts))
    assert float(found[0]) == 2.5
    rest = fit_log_theta(torch.zeros(3, dtype=torch.float64), mu[:, 2:], entries(counts[:, 2:]))
    assert rest.min() < found[1] < rest.max(), "one count says nothing of its own"


def test_genes_that_were_not_measured_are_ignored():
    mu, counts = drawn(400)
    measured = torch.ones_like(mu, dtype=torch.bool)
    measured[200:, 2] = False
    seen = torch.where(measured, counts, 0)
    found = fit_log_theta(torch.zeros(5, dtype=torch.float64), mu, entries(seen), measured=measured)
    alone = fit_log_theta(torch.zeros(5, dtype=torch.float64), mu[:200], entries(counts[:200]))
    blind = fit_log_theta(torch.zeros(5, dtype=torch.float64), mu, entries(seen))
    assert abs(found[2] - alone[2]) < 0.1 < abs(blind[2] - found[2])


@pytest.fixture
def cells() -> CellBatch:
    rng = np.random.default_rng(1)
    return CellBatch.from_dense(torch.from_numpy(rng.poisson(rng.gamma(2.0, 1.0, (50, 30)))).float())


def model(**changes) -> VAE:
    torch.manual_seed(0)
    tiny = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 2, "latent_width": 4}
    return VAE(VAEConfig(**{**tiny, **changes}), n_genes=30)


def test_a_fit_raises_the_likelihood_of_its_cells_and_touches_theta_alone(cells):
    vae = model()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    fit = fit_theta(vae, [cells])
    assert fit.n_cells == 50
    assert fit.nll_after < fit.nll_before
    assert fit.nll_after == pytest.approx(vae.nll(cells, vae.encode(cells)).mean().item(), rel=1e-5)
    changed = {k for k, v in vae.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"log_theta"}


def test_batches_do_not_change_a_fit(cells):
    one, two = model(), model()
    fit_theta(one, [cells])
    dense = torch.zeros(50, 30)
    dense[cells.cell_index, cells.gene_ids] = cells.counts
    fit_theta(two, [CellBatch.from_dense(dense[:20]), CellBatch.from_dense(dense[20:])])
    torch.testing.assert_close(one.log_theta, two.log_theta, rtol=0, atol=1e-5)


def test_a_model_without_theta_of_genes_and_no_cells_are_refused(cells):
    with pytest.raises(ValueError, match="nb_shared"):
        fit_theta(model(head="nb_cell"), [cells])
    with pytest.raises(ValueError, match="no cells"):
        fit_theta(model(), [])


def test_entries_are_those_of_all_batches_by_gene(cells):
    found = collect_entries([cells, cells])
    assert (found.gene.diff() >= 0).all()
    assert found.cell.max() >= 50
    assert float(found.count.sum()) == 2 * float(cells.counts.sum())
