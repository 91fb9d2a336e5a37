"""Figures against the process that synthetic cells were drawn from."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import nbinom, poisson

from scldm.metrics.baselines import LabelBaseline
from scldm.metrics.cell_set import CellSet
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.distribution.true_process import PROCESS, TrueProcess, label_nll, nb_nll, truth_scores


def test_likelihood_is_that_of_scipy():
    rng = np.random.default_rng(0)
    mu, theta = rng.gamma(2, 2, (5, 7)), np.array([0.3, 1, 2, 5, 20, 100, np.inf])
    counts = rng.poisson(mu)
    expected = -nbinom.logpmf(counts[:, :6], theta[:6], theta[:6] / (theta[:6] + mu[:, :6])).sum(1)
    expected -= poisson.logpmf(counts[:, 6], mu[:, 6])
    np.testing.assert_allclose(nb_nll(sp.csr_matrix(counts), mu, theta), expected, rtol=1e-6)


def test_likelihood_under_a_label_counts_a_gene_that_the_class_lacks_as_half_a_count():
    counts = sp.csr_matrix([[3.0, 0, 1], [5, 0, 1]])
    fitted = LabelBaseline.fit(counts, np.array(["a", "a"], dtype=object))
    found = label_nll(fitted, np.array(["a"], dtype=object), sp.csr_matrix([[1.0, 1, 0]]))
    profile = np.array([0.8, 0.05, 0.2])  # 8, half and 2 of ten counts
    mu = profile * 2
    plain = nb_nll(sp.csr_matrix([[1.0, 1, 0]]), mu[None], fitted.table["a"].theta)
    assert np.isfinite(found)
    assert found == pytest.approx(plain[0])


def test_cells_of_the_process_are_nearer_to_it_than_shifted_ones():
    rng = np.random.default_rng(1)
    rate, theta = rng.gamma(1, 4, 40), np.full(40, 5.0)
    draw = lambda n, f=1.0: sp.csr_matrix(rng.poisson(rng.gamma(theta, rate * f / theta, (n, 40))).astype(float))  # noqa: E731
    held_out, other = CellSet(draw(200), {}), CellSet(draw(200), {})
    wrong = CellSet(draw(200, np.linspace(0.3, 2, 40)), {})
    space = RealSpace.fit(draw(400), n_top_genes=40, n_pcs=5, seed=0)
    process = TrueProcess(np.tile(rate, (200, 1)), theta, draw(2000))
    found = truth_scores(
        process, held_out, {"generated": other, "wrong": wrong}, space, nll={"the VAE": 1.0}, rows=np.arange(50)
    )
    assert found.frechet["generated"] < found.frechet["wrong"] / 5
    own = nb_nll(held_out.counts[:50], process.expected[:50], theta).mean()
    assert found.nll == {PROCESS: pytest.approx(own), "the VAE": 1.0}
    assert found.n_fresh == 2000
